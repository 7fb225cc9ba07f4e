"""`python -m megalith` is the `megalith` command."""

from megalith.cli.main import main

main()
