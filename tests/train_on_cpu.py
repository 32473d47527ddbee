"""What tests/cli/test_launch.py has accelerate launch: `tipdistill train`, with FSDP2 or DeepSpeed allowed on a CPU."""

import os
import sys

from sharded_run import on_cpu

from tipdistill.cli import end_process, main
from tipdistill.recipes import run

engines = {"ACCELERATE_USE_FSDP": "fsdp2", "ACCELERATE_USE_DEEPSPEED": "zero"}
(engine,) = (name for variable, name in engines.items() if os.environ.get(variable) == "true")
on_cpu(engine)
run.check_launched = lambda use_cpu: None
end_process(main(["train", *sys.argv[1:], *(["--use_cpu"] if engine == "fsdp2" else [])]))
