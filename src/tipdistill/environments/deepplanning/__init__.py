"""DeepPlanning's travel problems (arXiv 2601.18137), from a directory that the user brings; docs/deepplanning.md.

    tipdistill eval --model M --tasks deepplanning=DIR --num_samples 16 --output_dir D
    python -m tipdistill.tasks deepplanning DIR      # writes prompts to train on; the recipes name this environment

DIR is a checkout of the benchmark with its databases unpacked. Code, prompts and grammar here are this project's own.

    data.py         the user's files, checked; which ids are held out
    environment.py  the nine tools, and the verdict
    prompts.py      what the student is told
    plan.py         the grammar of a plan; converter.py: a model that reads plans instead
    hard.py, commonsense.py, score.py    what a plan is worth
"""

from .environment import DeepPlanning

__all__ = ["DeepPlanning"]
