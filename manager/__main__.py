"""`python -m manager`."""

from manager.cli import main

main()
