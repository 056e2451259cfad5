"""Benchmarks: correctness first, then time and memory beside named peers. `python -m benchmarks --help`."""
