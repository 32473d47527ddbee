"""What is refused before any weights are loaded: datasets that cannot fill a batch, and settings that contradict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from ..arrow import values_of
from ..chat import check_columns, filled_columns
from ..config import TIPConfig
from ..data import IMAGE_COLUMNS, check_prompt
from ..extras import check_packages
from ..teachers.named import SELF, check_teacher_names, named_teachers
from ..text import near_names
from .kept import check_kept
from .lengths import configuration_of

# fields of Trainer's that no step reads, here or in TRL's trainer → the value that asks for nothing, and why
_WITHOUT_EFFECT = {
    "data_seed": (None, "seed draws the order of the prompts too"),
    "label_smoothing_factor": (0.0, "the loss compares two distributions, and has no labels to smooth"),
    "train_sampling_strategy": ("random", "shuffle_dataset says in which order prompts come"),
}


def check_arguments(model: Any, teacher_model: Any, args: TIPConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse arguments of a trainer that contradict each other; see the functions below.

    Raises:
        ValueError: which, and what to give instead.
        ImportError: a package that they ask for is not installed, with the command that does.
    """
    check_packages(args)
    check_has_effect(args)
    check_one_teacher(teacher_model, args)
    args.check_teachers(teacher_model)
    for one in named_teachers(teacher_model, args):
        check_distinct(model, one.model)
    if args.backward == "kept":
        given = dict(args.model_init_kwargs or {})
        student = configuration_of(model, given, args.trust_remote_code)
        check_kept(student, args, given.get("attn_implementation"))
    check_datasets(train_dataset, eval_dataset)
    check_fills_a_batch(train_dataset, args)


def check_has_effect(args: TIPConfig) -> None:
    """Refuse settings of TRL's and Trainer's that would do nothing, or something else than they say.

    Args:
        args: of the run.

    Raises:
        ValueError: which, and what to set instead.
    """
    for name, (value, reason) in _WITHOUT_EFFECT.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name} = {getattr(args, name)} would do nothing: {reason}. Leave it out.")
    returned = (args.generation_kwargs or {}).get("num_return_sequences", 1)
    if returned != 1:
        raise ValueError(
            f"generation_kwargs: num_return_sequences = {returned} writes completions that belong to no row: set "
            "num_generations, the rollouts of each prompt."
        )
    if args.auto_find_batch_size and args.gradient_accumulation_steps > 1:
        raise ValueError(
            "auto_find_batch_size with gradient_accumulation_steps > 1 would leave out half of the prompts, and take "
            "the others twice, once it has halved the batch: set per_device_train_batch_size."
        )


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse datasets without a row or without a `prompt` column.

    Args:
        train_dataset: a dataset or None.
        eval_dataset: a dataset, several by name, or None.

    Raises:
        ValueError: which dataset, and what to rename where a column is near.
    """
    for name, dataset in (("train_dataset", train_dataset), *_by_name(eval_dataset)):
        if dataset is None:
            continue
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"{name} is empty: at least one row with a 'prompt' is needed.")
        columns = getattr(dataset, "column_names", None)
        if columns is not None and "prompt" not in columns:
            near = near_names("prompt", columns, cutoff=0.4)
            hint = f" Rename '{near[0]}': dataset.rename_column('{near[0]}', 'prompt')." if near else ""
            raise ValueError(f"{name} has no 'prompt' column, its columns are {', '.join(columns)}.{hint}")
        if isinstance(dataset, IterableDataset) or (
            isinstance(dataset, Dataset) and not isinstance(dataset[0]["prompt"], str)
        ):
            check_columns(filled_columns(dataset), name)


def _by_name(eval_dataset: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(eval_dataset, dict):
        yield from ((f"eval_dataset[{name!r}]", part) for name, part in eval_dataset.items())
    else:
        yield "eval_dataset", eval_dataset


def check_one_teacher(teacher_model: Any, args: TIPConfig) -> None:
    """Refuse a run with no teacher, or with two.

    Args:
        teacher_model: a model, a directory or a hub id, or None.
        args: whose `teacher_url` or `teachers` name others.

    Raises:
        ValueError: what to give, or to leave out.
    """
    given = {"teacher_model": teacher_model, "teacher_url": args.teacher_url, "teachers": args.teachers}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(named)} each name the teacher: give one of them. Several teachers go into `teachers`."
        )
    if not named:
        raise ValueError(
            "a teacher is needed: pass teacher_model, a model, a directory or a hub id, or set teacher_url."
        )
    of_args = args.teacher_model_name_or_path
    if of_args is not None and isinstance(teacher_model, str | Mapping) and teacher_model != of_args:
        raise ValueError(
            f"teacher_model = {teacher_model!r:.80} and teacher_model_name_or_path = {of_args!r:.80} name two "
            "teachers: give one of them."
        )
    if args.teacher_update != "frozen" and all(one.model != SELF for one in named_teachers(teacher_model, args)):
        raise ValueError(
            f'teacher_update = {args.teacher_update} is for the teacher "self", which follows the student: leave it '
            "out, or let the student be its own teacher."
        )


def teacher_prompt_column(teacher_model: Any, args: TIPConfig, train_dataset: Any, eval_dataset: Any) -> str | None:
    """The column that the teacher's own prompts are in, None where no dataset has it; and the columns checked.

    Args:
        teacher_model, args: which name the teachers.
        train_dataset, eval_dataset: as given to the trainer. A stream's rows are looked at as they come.

    Raises:
        ValueError: the first row that names no teacher, or whose teacher prompt cannot be read; a teacher that is the
            student and sees nothing that the student does not.
    """
    named, column = named_teachers(teacher_model, args), args.teacher_prompt_column
    datasets = [(name, dataset) for name, dataset in (("train_dataset", train_dataset), *_by_name(eval_dataset))]
    has_prompts = False
    for name, dataset in datasets:
        if dataset is None:
            continue
        columns = dataset.column_names
        has_prompts |= columns is None or column in columns
        if named[0].name:
            check_teacher_names(dataset, name, [one.name for one in named], args.teacher_column)
        if isinstance(dataset, Dataset) and column in columns:
            for row, prompt in enumerate(values_of(dataset, column)):
                if prompt is not None:
                    try:
                        check_prompt(prompt, row, name)
                    except ValueError as error:
                        raise ValueError(f"column {column!r} of {error}") from error
            if any(image in columns for image in IMAGE_COLUMNS):
                raise ValueError(
                    f"{name} has the columns {column!r} and images, and a teacher with prompts of its own reads text "
                    "alone: remove one of them."
                )
    if len(named) == 1 and named[0].model == SELF and not has_prompts and args.teacher_update != "base":
        raise ValueError(
            f"the student is its own teacher and both read the same prompt, so there is nothing to learn: give the "
            f"dataset a column {column!r} with what the teacher sees besides (teacher_prompt_column names another)."
        )
    return column if has_prompts else None


def used_columns(args: TIPConfig) -> list[str]:
    """The columns of a dataset that `remove_unused_columns` leaves: those that the student and its teachers read.

    Args:
        args: of the run.
    """
    return ["prompt", *IMAGE_COLUMNS, args.teacher_column, args.teacher_prompt_column]


def check_distinct(model: Any, teacher_model: Any) -> None:
    """Refuse a student and a teacher that share weights: freezing the one would freeze the other.

    Args:
        model, teacher_model: a model, a directory or a hub id each, or None.

    Raises:
        ValueError: what to pass instead.
    """
    if not (hasattr(model, "named_parameters") and hasattr(teacher_model, "named_parameters")):
        return
    student = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} - {0}
    shared = [
        name
        for name, parameter in teacher_model.named_parameters()
        if parameter.untyped_storage().data_ptr() in student
    ]
    if shared:
        what = "are one object" if model is teacher_model else f"share weights ({shared[0]})"
        raise ValueError(
            f"student and teacher {what}, and the teacher has to stay as it is: pass copy.deepcopy of the model, or "
            "its path, as teacher_model."
        )


def check_fills_a_batch(train_dataset: Any, args: TIPConfig) -> None:
    """Refuse a dataset that holds fewer prompts than one step takes, or a stream that would have to repeat them.

    Args:
        train_dataset: a dataset, a stream or None.
        args: of the run.

    Raises:
        ValueError: how many prompts there are, and how many one step takes.
    """
    rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    prompts = rollouts // args.num_generations
    if isinstance(train_dataset, Dataset) and len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, fewer than the {prompts} of one generation batch "
            f"({rollouts} rollouts / {args.num_generations} per prompt), so no step would be taken: lower "
            "per_device_train_batch_size or gradient_accumulation_steps, or add prompts."
        )
    if isinstance(train_dataset, IterableDataset) and args.num_generations > 1:
        raise ValueError(
            f"num_generations = {args.num_generations} repeats prompts, which a stream does not: give a Dataset or "
            "num_generations = 1."
        )
