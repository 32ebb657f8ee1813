"""`python -m mixquant` is the command `mixquant`."""

from mixquant.cli import main

main()
