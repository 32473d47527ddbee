"""The paper's claims, tried on three small tasks: grids, verdicts, tables.

machine.yaml, modular.yaml, planted.yaml   the grids of `tipdistill sweep`; more in rates/, screening/, small/, teacher/
results.py                                 which results there are, rows of them, differences of two rows
claims.py                                  the claims, and verdicts as a function of an interval
tables.py                                  every table of docs/replication.md and results/replication.md
tokens_before.py                           what the tokens are like before distillation, from token records
teacher_entropy.py, candidates.py          rules that only these grids use

    python -m benchmarks.replication --collect runs/replication    # keeps each sweep's result, then writes the tables
    python -m benchmarks.replication                               # writes the tables from what is kept
"""
