"""The study of several detectors in one process; `python -m studies.stacked` starts it."""
