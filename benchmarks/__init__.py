"""What the stages cost, and what the paper's claims come to: measured files, and the tables made of them.

Run as modules from the repository's root; each has --help:

    python -m benchmarks.head         score + select + loss of two lm_heads, beside plain PyTorch, TRL and Liger
    python -m benchmarks.step         a whole training step of real architectures with random weights
    python -m benchmarks.kernels      what the compiler makes of the Triton kernels; no GPU needed
    python -m benchmarks.errors       gradients near agreement against float64; no GPU needed, TRITON_INTERPRET=1
    python -m benchmarks.gpu_lease    all that needs a GPU, in one command of nine minutes
    python -m benchmarks.select       the rules alone, at growing numbers of tokens
    python -m benchmarks.records      writing and showing token records
    python -m benchmarks.plan         the memory that `tipdistill plan` expects, beside measured steps
    python -m benchmarks.table        the tables of docs/ and results/engine.md, from results/*.json
    python -m benchmarks.plan_tables  the tables of docs/scaling.md and results/plan.md, from the plan itself
    python -m benchmarks.replication  the tables of docs/replication.md and results/replication.md, from sweeps

`make bench`, `make gpu` and `make replicate` run all of it. (`python benchmarks/select.py` does not work: a script's
folder comes first in its imports, and select and records would hide other modules of those names.)
"""
