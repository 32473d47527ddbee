"""Grids of rule × retention × learning rate × seed, and what their results say."""

from .bootstrap import Bootstrap, interval
from .grid import Cell, Grid, Row, read_grid
from .result import chosen_rate, csv_text, markdown, summarise

__all__ = [
    "Bootstrap",
    "Cell",
    "Grid",
    "Row",
    "chosen_rate",
    "csv_text",
    "interval",
    "markdown",
    "read_grid",
    "summarise",
]
