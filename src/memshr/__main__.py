"""``python -m memshr``: the command line."""

from memshr.cli.main import main

main()
