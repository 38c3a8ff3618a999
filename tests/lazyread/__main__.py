"""Builds the readers of lazy layers."""

from tests.lazyread import MISSING, readers

if __name__ == "__main__":
    print(readers() or MISSING)
