"""The command line."""

from purejaxppo.cli.main import entry, main

__all__ = ["entry", "main"]
