"""tipdistill init: a commented recipe for a student and a teacher of your own."""

from __future__ import annotations

import json
from pathlib import Path

from ..terminal import say
from .flags import Parser, at_least

_TOKENS = 1024
RECIPE = """\
# yaml-language-server: $schema={schema}
# {student} learns from {teacher}.
#
# Command: tipdistill train --config {path}
#   Add --dry_run to check everything but the weights first; `tipdistill train --help` explains each field.

# models: one tokenizer, lm_heads of any padding
model_name_or_path: {student}
teacher_model_name_or_path: {teacher}
dtype: float32                          # master weights: at small rates bfloat16 loses updates
teacher_model_init_kwargs: {{dtype: {teacher_dtype}}}
# teacher_url: http://host:8000/v1      # a teacher on a vLLM server, in the place of the two lines above
# use_peft: true                        # train an adapter alone; with it lora_r and lora_alpha
# lora_r: 16

# prompts: a file, a directory or a hub id, with a column `prompt` of texts or of messages
dataset_name: {dataset}
{column}{chat}max_prompt_length: {prompt_tokens:<21}# drop longer ones

# rollouts: {rollouts} a step on one {device}
per_device_train_batch_size: {batch}
gradient_accumulation_steps: {accumulation}
num_generations: 1                      # rollouts per prompt
max_completion_length: {tokens}
temperature: 1.0
# use_vllm: true                        # sample faster: pip install "tipdistill[vllm]"
# vllm_mode: colocate

# selection and loss
selection_rule: soft_or                 # or what `tipdistill probe` advises for this pair
retention: 0.5
beta: 1.0                               # reverse KL

# optimisation
learning_rate: {rate}
lr_scheduler_type: cosine
warmup_steps: 0.05                      # of all steps
num_train_epochs: 1
# max_steps: 100                        # in the place of epochs
gradient_checkpointing: {checkpointing}
{machine}
# measuring and files
# eval_tasks: math500                   # accuracy every eval_steps steps; `reverse_kl=FILE` on held-out prompts
# eval_steps: 50
output_dir: {output}
logging_steps: 1
save_steps: 50
save_total_limit: 2
report_to: none                         # or wandb, tensorboard, trackio
"""


def main(argv: list[str]) -> int:
    """Check the pair, and write its recipe; returns the exit code.

    Raises:
        ValueError, FileNotFoundError: models that cannot be read or do not match, or a recipe that is there.
    """
    options = parser().read(argv)
    path = Path(options.output)
    if path.exists():
        raise ValueError(f"{path} is there already: choose another --output.")
    from ..model_files import check_models, compare_models

    named = ("--model", options.model, None), ("--teacher", options.teacher, None)
    configurations, processors, described = check_models(*named, options.trust_remote_code)
    from ..data import load_prompts
    from ..plan.models import sizes
    from ..positions import position_limit

    chat = bool(getattr(processors[0], "chat_template", None))
    plain = isinstance(load_prompts(options.dataset, "train", column=options.prompt_column)[0]["prompt"], str)
    limits = [limit for limit in map(position_limit, configurations) if limit is not None]
    described |= compare_models(*named, configurations, processors, chat or not plain)
    text = recipe(
        options.model,
        options.teacher,
        options.dataset,
        path,
        prompt_column=options.prompt_column,
        as_chat=chat and plain,
        positions=min(limits, default=None),
        max_new_tokens=options.max_new_tokens,
        parameters=sizes(configurations[0]).parameters,
    )
    from ..files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    say("\n".join(f"# {label:<10}{line}" for label, line in described.items()))
    say(f"{path} is written. Check it: tipdistill train --config {path} --dry_run")
    return 0


def recipe(
    student: str,
    teacher: str,
    dataset: str,
    path: Path,
    *,
    as_chat: bool,
    max_new_tokens: int | None,
    parameters: float,
    prompt_column: str = "prompt",
    positions: int | None = None,
) -> str:
    """The text of a recipe.

    Args:
        student, teacher: as they were given.
        dataset: of the prompts.
        path: where the recipe will lie.
        as_chat: the prompts are plain, and the model has a chat template.
        max_new_tokens: of a rollout; None: 1,024, or half of the positions where they are fewer than twice that.
        parameters: of the student.
        prompt_column: of the dataset.
        positions: that both models have at least; None: no limit.

    Example:
        >>> text = recipe("s", "t", "p.jsonl", Path("my.yaml"), as_chat=True, max_new_tokens=512, parameters=1e9)
        >>> "apply_chat: true" in text
        True
    """
    import torch

    from ..recipes.fields import SCHEMA

    if max_new_tokens is None:
        max_new_tokens = _TOKENS if positions is None else max(1, min(_TOKENS, positions // 2))
    left = _TOKENS if positions is None else max(1, min(_TOKENS, positions - max_new_tokens))
    small = parameters < 3e8
    batch = 8 if small else 4
    accumulation = 1 if small else 8
    on_gpu = torch.cuda.is_available()
    machine = "bf16: true" if on_gpu else "use_cpu: true                           # no GPU here\nbf16: false"
    return RECIPE.format(
        schema=SCHEMA,
        student=_quoted(student),
        teacher=_quoted(teacher),
        path=path,
        dataset=_quoted(dataset),
        column="" if prompt_column == "prompt" else f"prompt_column: {_quoted(prompt_column)}\n",
        prompt_tokens=left,
        chat="apply_chat: true                        # the prompts are plain: each becomes a user's message\n"
        if as_chat
        else "",
        # most CPUs compute in bfloat16 many times slower
        teacher_dtype="bfloat16" if on_gpu else "float32",
        device="GPU" if on_gpu else "CPU",
        rollouts=batch * accumulation,
        batch=batch,
        accumulation=accumulation,
        tokens=max_new_tokens,
        # Table 9 of the paper has 1e-6 for models of 4 and 8 billion parameters; small ones take, and need, more
        rate="1.0e-4" if small else "1.0e-5" if parameters < 3e9 else "1.0e-6",
        checkpointing=str(not small).lower(),
        machine=machine,
        output=_quoted(f"runs/{path.stem}"),
    )


def _quoted(text: str) -> str:
    """A text as YAML: as it stands where that is read back as the same text."""
    import yaml

    try:
        plain = yaml.safe_load(text) == text and ": " not in text and " #" not in text
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text)


def parser() -> Parser:
    """The flags of `tipdistill init`."""
    parser = Parser("init", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="student: a directory or a hub id")
    add("--teacher", required=True, help="teacher: a directory or a hub id")
    add("--dataset", required=True, help="prompts: a JSONL, JSON or Parquet file, a directory, or a hub id")
    add("--prompt_column", default="prompt", help="its column with the prompts (default: prompt)")
    add("--output", required=True, help="the recipe to write, such as my.yaml")
    add(
        "--max_completion_length",
        "--max_new_tokens",
        dest="max_new_tokens",
        type=at_least(1),
        help=f"tokens of a rollout, at most (default: {_TOKENS:,}, or half of the models' positions if those are few)",
    )
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")
    return parser
