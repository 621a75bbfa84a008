"""Owns the measurement of answers: benchmarks that any model and any method can be run on."""
