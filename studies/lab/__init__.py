"""What studies share: kept cells, one command line, tables, statistics and figures that no user needs."""
