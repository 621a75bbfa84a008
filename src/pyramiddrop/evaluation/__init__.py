"""Evaluate any model under any method: benchmarks, scores and studies."""
