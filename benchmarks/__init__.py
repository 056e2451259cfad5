"""Benchmarks: correctness first, then time and memory beside peers; `python -m benchmarks`."""
