"""`python -m ekiben.cli`: the ekiben command, where no script is installed."""

from ekiben.cli import main

main()
