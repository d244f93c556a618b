"""`python -m purejaxppo`."""

from purejaxppo.cli import entry

entry()
