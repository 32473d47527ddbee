"""What tests/test_trainer.py launches under torchrun: a few steps, the logged figures written by the first process."""

import json
import sys
from pathlib import Path

from datasets import Dataset

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.cli import end_process


class Ragged(TIPTrainer):
    """Rollouts of a length of each prompt's own, so that ranks hold different widths: a random model never ends."""

    def _generate_single_turn(self, prompt_ids, *rest):
        completions = super()._generate_single_turn(prompt_ids, *rest)
        return [ids[: 1 + sum(prompt) % 12] for prompt, ids in zip(prompt_ids, completions, strict=True)]


student, teacher, data, out, settings = sys.argv[1:]
args = TIPConfig(str(Path(out).with_suffix("")), **json.loads(settings))
trainer = Ragged(student, teacher, args, Dataset.from_json(data))
trainer.train()
if trainer.accelerator.is_main_process:
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = {name: [entry[name] for entry in history] for name in history[0]}
    Path(out).write_text(json.dumps({**figures, "processes": trainer.accelerator.num_processes}))
# together, and in order: a process that leaves while another still talks to it aborts that one
trainer.accelerator.wait_for_everyone()
trainer.end()
end_process(0)
