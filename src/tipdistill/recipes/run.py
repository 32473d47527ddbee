"""A run of `tipdistill train`: one configuration from a recipe and flags, checked, then trained.

Everything is refused in the order of its cost: names, then files, then tokenizers and data, then weights.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from trl import get_dataset, get_peft_config, get_quantization_config

from ..chat import check_chat_template_kwargs, is_conversational
from ..data import as_conversations, drop_long_prompts, load_prompts, prepare_prompts, prompt_lengths
from ..dotted import names_only
from ..environments.play import check_conversational, read_dialect
from ..model_files import check_chat_template, check_models, compare_models, of_one, read_models
from ..positions import check_positions
from ..signals import end_with_parent
from ..supervise import supervise
from ..teachers import TeacherUnavailableError, open_server
from ..teachers.named import SELF, named_teachers
from ..teachers.served import check_ends
from ..text import printable
from ..training.ahead import IN_TURN
from ..training.checkpoints import checkpoint_to_resume, final_step, finished
from ..training.evaluation import load_tasks
from ..training.images import prepared, text_alone
from ..training.kept import check_kept
from ..training.lengths import REMEDY, check_problems_fit, check_prompts_fit, configuration_of, position_limits
from ..training.shared_tokens import check_problems_shared, check_prompts_shared
from ..vocabulary import Names, check_same_tokenizer, described_differences
from .hub import check_hub
from .launch import check_launched, is_launched, launch_arguments, num_processes
from .noise import logged, quiet
from .read import Request, as_yaml, build, read_arguments, write_config
from .trust import FLAG

_DRY_RUN_PATIENCE = 5.0  # seconds


def run_recipe(argv: list[str]) -> int:
    """Distil as the recipe and the flags say; returns the exit code.

    Args:
        argv: `--config F.yaml` (a file or a packaged recipe's name) and any field as a flag.

    Raises:
        ValueError, FileNotFoundError, ImportError: anything that can be refused before weights are loaded.
    """
    arguments = read_arguments(argv)
    _resume(arguments.values)  # refuses before anything is loaded
    if arguments.values.dry_run:  # starts nothing, and imports nothing that the recipe names
        with names_only(), quiet(arguments.values.verbose):
            return _train(build(arguments), arguments.values, arguments.code)
    launch = launch_arguments(arguments.values)
    if launch or not arguments.environment.items() <= os.environ.items():
        return _start_again(launch, [*argv, FLAG] if arguments.code else argv, arguments.environment)
    if is_launched():
        end_with_parent()
    check_launched(bool(arguments.values.use_cpu))
    with quiet(arguments.values.verbose):
        request = build(arguments)
        from ..training.resumable import alone_in  # loads TRL's trainer

        with alone_in(request.config.output_dir):
            return _train(request, arguments.values)


# What a run would overwrite, and how it is started.


def _resume(namespace: Namespace, steps: int | None = None) -> tuple[str | None, int | None]:
    """The checkpoint to resume from, if any, and the step of a run that is finished; refuses to start over a run.

    Args:
        namespace: what was asked for.
        steps: of the whole run; None where they are not known yet, and nothing is decided but what is refused anyhow.
    """
    asked, directory = str(namespace.resume_from_checkpoint).lower(), Path(namespace.output_dir or "trainer_output")
    resumes = asked not in ("none", "false", "null", "")
    if resumes and namespace.overwrite_output_dir:
        raise ValueError("resume_from_checkpoint and overwrite_output_dir contradict each other: give one of them.")
    done = final_step(directory) if resumes else None
    if done is not None and asked in ("true", "auto") and steps is None:
        return None, None
    if done is not None and steps is not None and done >= steps:
        named = Path(namespace.resume_from_checkpoint)
        if asked in ("true", "auto") or (named.resolve().parent == directory.resolve() and _step_of(named) >= steps):
            return None, done
    checkpoint = checkpoint_to_resume(namespace.resume_from_checkpoint, directory) if resumes else None
    left = [*sorted(directory.glob("checkpoint-[0-9]*")), *sorted(directory.glob("*.safetensors"))]
    if asked == "auto":  # checkpoints that are not whole are what a first save left that was killed
        left = [path for path in left if path.is_file()]
    if checkpoint is None and left and not namespace.overwrite_output_dir:
        goes_on = final_step(directory) is not None or checkpoint_to_resume("auto", directory) is not None
        raise ValueError(
            f"{directory} already holds a run ({', '.join(path.name for path in left[:3])}): "
            f"{'continue it with --resume_from_checkpoint true, ' if goes_on else ''}start over with "
            "--overwrite_output_dir true, or choose another --output_dir."
        )
    return checkpoint, None


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isascii() and step.isdecimal() else -1


def _start_again(launch: list[str], argv: list[str], environment: dict[str, str]) -> int:
    """Run the same command under accelerate, or under the recipe's environment, which libraries read on import."""
    launcher = ["-m", "accelerate.commands.launch", *launch] if launch else []
    command = [sys.executable, *launcher, "-m", "tipdistill.cli", "train", *argv]
    variables = {**os.environ, **environment, "TIPDISTILL_LAUNCHED": "1"}
    return supervise(command, variables)


def _num_processes(request: Request) -> int:
    """Processes of the run: those running now, or in a dry run those that would be started."""
    if not request.script.dry_run or request.config.world_size > 1:
        return request.config.world_size
    return num_processes(request.script)


# The run.


def _train(request: Request, namespace: Namespace, code: Sequence[str] = ()) -> int:
    script, config, model = request.script, request.config, request.model
    main_process = config.process_index == 0
    tokenizer, teacher_tokenizer, described, compared = _check_models(request)
    check_chat_template_kwargs(_as_dict(config.chat_template_kwargs), tokenizer)
    train_dataset, dropped = _prompts(request, "train", tokenizer)
    eval_dataset = _prompts(request, "test", tokenizer)[0] if config.eval_strategy != "no" else None
    blind = text_alone(config.teacher_model_name_or_path, config, tokenizer)
    train_dataset = prepared(train_dataset, "the training set", config, tokenizer, blind)
    eval_dataset = prepared(eval_dataset, "the evaluation set", config, tokenizer, blind)
    described |= _describe_steps(request, train_dataset, dropped, tokenizer)
    if config.push_to_hub and main_process:
        described["hub"] = check_hub(config)
    if script.dry_run:  # a run's trainer does the same
        if config.rollout_ahead and not (config.use_vllm and config.vllm_mode == "server"):
            described["rollouts"] = IN_TURN
        if config.backward == "kept":
            given = {"revision": model.model_revision}
            student = configuration_of(model.model_name_or_path, given, config.trust_remote_code)
            check_kept(student, config, model.attn_implementation)
        if config.environment is not None:
            read_dialect(getattr(tokenizer, "tokenizer", tokenizer), _as_dict(config.chat_template_kwargs))
            if isinstance(train_dataset, Dataset):
                check_conversational(train_dataset["prompt"][:1])
        limits = position_limits(model.model_name_or_path, config.teacher_model_name_or_path, config)
        check_prompts_fit(limits, eval_dataset, tokenizer, config, "the evaluation set")
        tasks = load_tasks(config.task_names(), config)
        check_problems_fit(limits, tasks, tokenizer, config)
        differing, warnings = compared(train_dataset)
        described |= warnings
        check_prompts_shared(differing, train_dataset, tokenizer, config, "the training set")
        check_prompts_shared(differing, eval_dataset, tokenizer, config, "the evaluation set")
        check_problems_shared(differing, tasks, tokenizer, config)
    if code:
        described["code"] = f"named and not imported; {FLAG} runs it: {'; '.join(code)}"
    lines = [f"# {label:<9} {_line(text)}" for label, text in described.items()]
    if main_process:
        if script.dry_run:
            print(printable(as_yaml(request.values)), end="")
        print("\n".join(lines), flush=True)
    if script.dry_run:
        return 0
    steps = _steps(request, train_dataset)
    from ..training.resumable import from_main

    resume, done = from_main(lambda: _resume(namespace, steps))
    if done is not None:
        if main_process:
            print(finished(config.output_dir, done, steps))
        return 0
    datasets, tokenizers = (train_dataset, eval_dataset), (tokenizer, teacher_tokenizer)
    if not main_process:
        return _run(request, datasets, tokenizers, resume)
    with logged(Path(config.output_dir)) as log:
        for line in lines:
            log.info(line)
        return _run(request, datasets, tokenizers, resume)


def _run(request: Request, datasets: tuple[Any, Any], tokenizers: tuple[Any, Any], resume: str | None) -> int:
    """Load the models and train.

    Args:
        datasets: to train and to evaluate on.
        tokenizers: the student's and the teacher's.
        resume: a checkpoint, or None.
    """
    from transformers import ProgressCallback

    from ..trainer import TIPTrainer
    from ..training.progress import StepTable

    script, config, model = request.script, request.config, request.model
    main_process = config.process_index == 0
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **_as_dict(config.model_init_kwargs),
    }
    named = named_teachers(config.teacher_model_name_or_path, config)
    config.teacher_model_init_kwargs = (
        None
        if all(one.model is None for one in named)
        else {
            "revision": config.teacher_model_revision,
            "trust_remote_code": config.trust_remote_code,
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
            **_as_dict(config.teacher_model_init_kwargs),
        }
    )
    trainer = TIPTrainer(
        model=model.model_name_or_path,
        teacher_model=config.teacher_model_name_or_path,
        args=config,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        processing_class=tokenizers[0],
        teacher_processing_class=tokenizers[1],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    table = StepTable()
    if not config.disable_tqdm:  # as in TRL: where it is on, each step's figures are printed as a dict
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(table)
    output_dir = Path(config.output_dir)
    if main_process:
        if script.overwrite_output_dir:
            # a stale checkpoint would outlive the new ones and be what a later resume finds
            for checkpoint in output_dir.glob("checkpoint-[0-9]*"):
                shutil.rmtree(checkpoint)
        write_config(request.values, output_dir / "config.yaml")
    with trainer.stop_request:  # a signal after the last step waits for the model
        try:
            trainer.train(resume_from_checkpoint=resume)
        except TeacherUnavailableError:
            raise  # one line says it all, and where the checkpoint is
        except (ValueError, OSError):
            # whatever fails this late is no matter of a flag: one line would not do
            print(printable(traceback.format_exc()), file=sys.stderr)
            raise
        finally:
            table.close()
        trainer.save_model(config.output_dir)
        trainer.save_state()  # the log of the run, which the report draws, and the sign that it is finished
    trainer.accelerator.print(
        printable(
            f"The distilled student is in {config.output_dir}. Its curves and tokens: tipdistill report "
            f"{shlex.quote(config.output_dir)}"
        )
    )
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.wait_for_everyone()  # a process that leaves while another still talks to it aborts that one
    trainer.end()
    return 0


def _line(text: str) -> str:
    return printable(" ".join(text.split()))


def _as_dict(value: Any) -> dict[str, Any]:
    assert value is None or isinstance(value, dict), "TrainingArguments turns JSON strings into dicts"
    return value or {}


_Compared = Callable[[Any], tuple[dict[int, Names], dict[str, str]]]


def _check_models(request: Request) -> tuple[Any, Any, dict[str, str], _Compared]:
    """Both tokenizers, once they and the lm_heads agree, and a line on each model. Loads no weights.

    The last is for a dry run, since a run's trainer says the same: dataset → reserved tokens that differ, and a line on
    each thing that the models are used to differently.
    """
    config, model = request.config, request.model
    student = ("--model_name_or_path", model.model_name_or_path, model.model_revision)
    named = named_teachers(config.teacher_model_name_or_path, config)
    _, (tokenizer,), described = read_models([("student", *student)], config.trust_remote_code)
    teacher_tokenizer, differing = None, dict[int, Names]()
    comparisons: list[tuple[str, Callable[..., dict[str, str]]]] = []
    for one in named:
        if one.args.teacher_url is not None:
            check_ends(one.args, None)
            described[one.called] = one.args.teacher_url
            if request.script.dry_run:  # which asks once; a run waits for a server that is still loading
                server = open_server(one.args, tokenizer, _DRY_RUN_PATIENCE)
                described[one.called] = f"{server.model} at {server.url}, which gives {server.gives}"
                differing |= server.differing
                said = {"warning": described_differences(server.differing)} if server.differing else {}
                described |= of_one(one.name, said)
        elif one.model == SELF:
            described[one.called] = f"the student itself ({config.teacher_update})"
        else:
            teacher = (f"--teachers {one.name}" if one.name else "--teacher_model_name_or_path", one.model)
            pair = student, (*teacher, one.args.teacher_model_revision)
            configurations, processors, lines = check_models(*pair, config.trust_remote_code, config.end_as_teacher)
            described |= of_one(one.name, lines)
            differing |= check_same_tokenizer(*processors)
            compare = partial(compare_models, *pair, configurations, processors)
            comparisons.append((one.name, compare))
            if len(named) == 1:
                teacher_tokenizer = processors[1]

    def compared(dataset: Any) -> tuple[dict[int, Names], dict[str, str]]:
        of_run = is_conversational(dataset), _as_dict(config.chat_template_kwargs), config.end_as_teacher
        said = [of_one(name, compare(*of_run)) for name, compare in comparisons]
        return differing, {label: line for lines in said for label, line in lines.items()}

    return tokenizer, teacher_tokenizer, described, compared


def _prompts(request: Request, purpose: str, tokenizer: Any) -> tuple[Dataset | IterableDataset, int]:
    """The prompts to train or evaluate on, and how many were dropped for their length."""
    script, mixture = request.script, request.mixture
    split = script.dataset_train_split if purpose == "train" else script.dataset_test_split
    shape: dict[str, Any] = {
        "column": script.prompt_column,
        "template": script.prompt_template,
        "as_chat": script.apply_chat,
    }
    if mixture.datasets:
        splits = get_dataset(mixture)
        if purpose not in splits:
            raise ValueError("evaluation needs a test split: set test_split_size beside `datasets`.")
        dataset = prepare_prompts(splits[purpose], name="the mixture", **shape)
    else:
        dataset = load_prompts(
            script.dataset_name, split, config=script.dataset_config, streaming=script.dataset_streaming, **shape
        )
    if script.apply_chat:
        dataset = as_conversations(dataset, request.config.teacher_prompt_column)
    if not isinstance(dataset, Dataset):
        if script.max_prompt_length is not None:
            raise ValueError("max_prompt_length counts tokens ahead, which a stream cannot: unset dataset_streaming.")
        return dataset, 0
    check_chat_template(dataset[0]["prompt"], tokenizer, request.model.model_name_or_path, script.apply_chat)
    if script.max_prompt_length is None:
        return dataset, 0
    return drop_long_prompts(
        dataset, tokenizer, script.max_prompt_length, _as_dict(request.config.chat_template_kwargs)
    )


def _describe_steps(request: Request, dataset: Any, dropped: int, tokenizer: Any) -> dict[str, str]:
    config = request.config
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * _num_processes(request)
    per_step = rollouts // config.num_generations
    tokens = rollouts * config.max_completion_length
    described = {
        "step": f"{per_step:,} prompts × {config.num_generations} rollouts × up to {config.max_completion_length:,} "
        f"tokens = {tokens:,} completion tokens, trained on by {config.selection_rule} at retention {config.retention}"
    }
    if isinstance(dataset, Dataset):
        kind = "plain" if isinstance(dataset[0]["prompt"], str) else "conversational"
        described["prompts"] = f"{len(dataset):,}, {kind}"
        if request.script.dry_run:  # takes a while on a large set
            longest = max(prompt_lengths(dataset["prompt"][:], tokenizer, _as_dict(config.chat_template_kwargs)))
            described["prompts"] += f", the longest has {longest:,} tokens"
            limits = position_limits(request.model.model_name_or_path, config.teacher_model_name_or_path, config)
            check_positions(limits, longest, config.max_completion_length, "--max_completion_length", REMEDY)
        if request.script.max_prompt_length is not None:
            described["prompts"] += f" ({dropped:,} longer than {request.script.max_prompt_length:,} dropped)"
        if len(dataset) < per_step:
            raise ValueError(
                f"{len(dataset):,} prompts do not fill one step of {per_step:,}: lower per_device_train_batch_size or "
                "gradient_accumulation_steps, or add prompts."
            )
        described["steps"] = f"{_steps(request, dataset):,}"
    return described


def _steps(request: Request, dataset: Dataset | IterableDataset) -> int:
    """Optimiser steps of the whole run."""
    config = request.config
    if config.max_steps > 0:
        return config.max_steps
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * _num_processes(request)
    assert isinstance(dataset, Dataset), "Trainer refuses a stream without max_steps"
    return math.ceil(config.num_train_epochs * (len(dataset) // (rollouts // config.num_generations)))
