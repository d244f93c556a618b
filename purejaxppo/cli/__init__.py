"""Command-line interface."""

from purejaxppo.cli.main import entry, main

__all__ = ["entry", "main"]
