"""The study of how fast detectors train; `python -m studies.throughput` starts it."""
