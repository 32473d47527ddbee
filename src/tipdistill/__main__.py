"""`python -m tipdistill`: the command line."""

from .cli import run

run()
