"""`python -m tipdistill.cli`: what accelerate starts in every process."""

from . import run

run()
