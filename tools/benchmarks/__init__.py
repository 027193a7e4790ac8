"""What `tools/benchmark.py` measures, a file for each of its commands, and how (rounds.py)."""
