"""A script of TRL's, before and after: what changes, and what does not.

    python examples/from_trl.py --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-1.7B --dataset prompts.jsonl

It trains with TRL's trainer, then with ours on all tokens, which is the same, then on half of them, and prints a line
for each. Prompts are rows with a `prompt`, texts or lists of messages.
"""

import argparse

from datasets import load_dataset
from trl import DistillationConfig, DistillationTrainer

from tipdistill import TIPConfig, TIPTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--teacher", required=True)
parser.add_argument("--dataset", required=True)
parser.add_argument("--output_dir", default="runs/from_trl")
parser.add_argument("--max_steps", type=int, default=20)
parser.add_argument("--max_completion_length", type=int, default=256)
parser.add_argument("--per_device_train_batch_size", type=int, default=4)
parser.add_argument("--use_cpu", action="store_true")
options = parser.parse_args()

prompts = load_dataset("json", data_files=options.dataset, split="train")
# every argument of TRL's configuration keeps its name and meaning
settings = {
    "max_steps": options.max_steps,
    "max_completion_length": options.max_completion_length,
    "per_device_train_batch_size": options.per_device_train_batch_size,
    "use_cpu": options.use_cpu,
    "bf16": not options.use_cpu,
    "beta": 1.0,  # the reverse KL, the default of both
    "learning_rate": 1e-5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def train(trainer, config, name, **selection):
    arguments = config(f"{options.output_dir}/{name}", **settings, **selection)
    run = trainer(options.model, options.teacher, arguments, train_dataset=prompts)
    run.train()
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    kept = steps[-1].get("selection/kept_fraction", 1.0)
    print(f"{name}: first loss {steps[0]['loss']:.6f}, last {steps[-1]['loss']:.6f}, tokens trained on {kept:.0%}")


# before
train(DistillationTrainer, DistillationConfig, "trl")
# after: two names change. On all tokens it is the same run
train(TIPTrainer, TIPConfig, "all tokens", selection_rule="all", retention=1.0)
# and two arguments are new: which tokens, and how many
train(TIPTrainer, TIPConfig, "half of them", selection_rule="soft_or", retention=0.5)
