"""What Ekiben costs, each figure beside its peer in the same run. `python -m benchmarks NAME…`; see README.md."""
