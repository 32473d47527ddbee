"""What every victim imports, once for all of them."""

import os
from importlib import import_module

os.environ["HF_HUB_OFFLINE"] = "1"

MODULES = (
    *(
        "torch",
        "accelerate",
        "datasets",
        "math_verify",
        "peft",
        "pyarrow.parquet",
        "transformers",
        "trl",
        "torch.optim",
    ),
    *(f"tipdistill.cli.{command}" for command in ("demo", "eval", "score", "sweep", "train")),
    *("tipdistill.demo", "tipdistill.evaluate.run", "tipdistill.evaluate.engines", "tipdistill.trainer"),
    *("tipdistill.records", "tipdistill.rollout", "tipdistill.score.models", "tipdistill.tasks.arithmetic"),
    *("transformers.models.qwen3.modeling_qwen3", "transformers.generation", "transformers.integrations.peft"),
)
for module in MODULES:
    import_module(module)

import_module("torch").set_num_threads(1)
