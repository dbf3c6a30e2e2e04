"""Benchmarks: `python -m benchmarks` measures times, `python -m benchmarks.instructions` counts."""
