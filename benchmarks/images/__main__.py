"""`python -m benchmarks.images`."""

from benchmarks.images import main

main()
