"""This project against eager PyTorch on the same work: `python scripts/benchmark.py`."""
