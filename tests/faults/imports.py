"""What every process of tests/forks.py imports, once for all of them."""

import os
from importlib import import_module
from importlib.util import find_spec

import once

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

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
    *(["deepspeed"] if find_spec("deepspeed") else []),  # accelerate imports it wherever it is
    *(f"tipdistill.cli.{command}" for command in ("demo", "eval", "score", "sweep", "train")),
    *("tipdistill.demo", "tipdistill.evaluate.run", "tipdistill.evaluate.engines", "tipdistill.trainer"),
    *("tipdistill.records", "tipdistill.rollout", "tipdistill.score.models", "tipdistill.tasks.arithmetic"),
    *("transformers.models.qwen3.modeling_qwen3", "transformers.generation", "transformers.integrations.peft"),
)
for module in MODULES:
    import_module(module)

import_module("torch").set_num_threads(1)
# built when the first model is loaded: a thousand patterns
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("qwen3")
once.prepare()
