"""What dloop costs: `python -m benchmarks` in time, `python -m benchmarks.instructions` in CI."""
