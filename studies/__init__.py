"""Studies: what the method is worth and what it costs, each started by `python -m studies.NAME`."""
