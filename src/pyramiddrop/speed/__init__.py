"""Measure time and memory of models and methods side by side on this machine."""
