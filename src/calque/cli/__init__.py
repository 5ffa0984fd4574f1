"""The command line: a thin shell over the API, and the only room that prints."""

from calque.cli.commands import main, run

__all__ = ["main", "run"]
