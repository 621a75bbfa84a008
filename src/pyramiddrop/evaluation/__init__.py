"""Benchmarks of any model under any method."""
