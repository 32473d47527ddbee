"""tipdistill prune: a student made of its teacher, by dropping the layers that matter least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import alone
from ..pair import DTYPES
from ..terminal import say
from .flags import Parser, at_least


def main(argv: list[str]) -> int:
    """Measure each layer's influence, drop the least of them, and write the model; returns the exit code.

    Raises:
        ValueError, FileNotFoundError: a model or a file that cannot be read, layers out of range, a directory in use.
    """
    options = parser().read(argv)
    directory = Path(options.output_dir)
    if (directory / "config.json").exists():
        raise ValueError(f"{directory} holds a model already: choose another --output_dir.")
    from ..model_files import read_models
    from ..pair import device_of

    device_of(options.device)
    (config,), _, _ = read_models([("model", "--model", options.model, None)], options.trust_remote_code)
    count = config.get_text_config().num_hidden_layers
    if options.layers > count - 2:
        raise ValueError(
            f"--layers: {options.model} has {count} layers, of which {count - 2} can go; got {options.layers}."
        )
    with alone(directory, "pruning"):
        return _prune(options, directory)


def _prune(options: Any, directory: Path) -> int:
    from ..data import check_text_alone, load_prompts
    from ..pair import device_of
    from ..prune import write_pruned
    from ..tasks.instructions import as_chat, train_prompts

    if options.dataset is None:
        prompts: list[Any] = list(map(as_chat, train_prompts()))
    else:
        dataset = load_prompts(options.dataset, "train", column=options.prompt_column)
        dataset = dataset.select(range(min(options.max_prompts, len(dataset))))
        check_text_alone(dataset, options.dataset)
        prompts = dataset["prompt"][:]
    dropped = write_pruned(
        options.model,
        options.layers,
        directory,
        prompts[: options.max_prompts],
        dtype=options.dtype,
        device=str(device_of(options.device)),
        trust_remote_code=options.trust_remote_code,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    say(f"{directory}: {options.model} without layers {', '.join(map(str, dropped))} (counted from 0).")
    say(f"Heal it: tipdistill train --model_name_or_path {directory} --teacher_model_name_or_path {options.model} ...")
    return 0


def parser() -> Parser:
    """The flags of `tipdistill prune`."""
    parser = Parser("prune", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="the teacher: a directory or a hub id")
    add("--layers", type=at_least(1), required=True, help="how many layers to drop; the first and the last stay")
    add("--output_dir", required=True, help="where the student goes")
    add("--dataset", help="prompts whose answers the influence is measured on; default: some of our own")
    add("--prompt_column", default="prompt", help="column that holds the prompts")
    add("--max_prompts", type=at_least(1), default=64, help="take the first so many prompts")
    add(
        "--max_completion_length",
        "--max_new_tokens",
        dest="max_new_tokens",
        type=at_least(1),
        default=48,
        help="tokens of an answer, at most",
    )
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as they were saved")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    add("--seed", type=at_least(0), default=0, help="of the answers' sampling")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser
