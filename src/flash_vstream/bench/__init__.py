"""Benchmarks of speed and memory, each next to its theoretical limit."""
