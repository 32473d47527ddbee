"""A plan as it is shown and written: does it fit, what to change first, where the time goes, what selection buys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from .beside import SERVER_SHARE, best_split
from .memory import COMPONENTS, PHASES, USABLE, Setup, memory, peak
from .time import PARTS, Machine, step_time, vllm_tokens

RETENTIONS = (1.0, 0.5, 0.2, 0.1)
_GIB = 2**30


def fits(setup: Setup, taken: int) -> bool:
    """Whether so many bytes fit on a GPU beside what the context, NCCL and the allocator keep, and a rollout into vLLM.

    Example:
        >>> from tipdistill.plan import setup_of
        >>> fits(setup_of("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", memory=80 * 2**30), 79 * 2**30)
        False
    """
    if setup.engine == "colocate" and vllm_tokens(setup) < setup.prompt + setup.completion:
        return False
    return taken <= USABLE * setup.memory


def plan(setup: Setup, machine: Machine, retentions: Sequence[float] = RETENTIONS) -> dict[str, Any]:
    """Everything that is known of a step before it is run, as JSON has it.

    Args:
        setup: what is planned.
        machine: rates of one of its GPUs.
        retentions: to compare; 1 is all tokens.

    Returns:
        {"memory": phase → component → bytes, "peak": {"phase", "bytes", "usable_bytes", "fits"}, "change": lines,
        "seconds": part → seconds, "bottleneck": part, "retentions": rows, "settings": rows, "assumptions": lines}.
    """
    phases = memory(setup)
    phase, taken = peak(phases)
    seconds = step_time(setup, machine)
    return {
        "gpus": setup.gpus,
        "memory": phases,
        "peak": {
            "phase": phase,
            "bytes": taken,
            "usable_bytes": int(USABLE * setup.memory),
            "fits": fits(setup, taken),
        },
        "change": [] if fits(setup, taken) else changes(setup),
        "seconds": seconds,
        "bottleneck": max(seconds, key=seconds.__getitem__),
        "retentions": [_at(setup, machine, retention) for retention in retentions],
        "settings": [
            *(_with(name, changed, machine) for name, changed in _settings(setup)),
            *_written_beside(setup, machine),
        ],
        "assumptions": assumptions(setup, machine),
    }


def _at(setup: Setup, machine: Machine, retention: float) -> dict[str, Any]:
    """A row of the table over retentions; 1 is the rule "all"."""
    rule = "all" if retention == 1 else ("soft_or" if setup.rule == "all" else setup.rule)
    setup = replace(setup, rule=rule, retention=retention, backward="full" if rule == "all" else setup.backward)
    phases, seconds = memory(setup), step_time(setup, machine)
    phase, taken = peak(phases)
    total = sum(seconds.values())
    return {
        "rule": rule,
        "retention": retention,
        "peak_bytes": taken,
        "phase": phase,
        "loss_bytes": sum(phases["loss"].values()),
        "teacher_hidden_bytes": phases["loss"]["teacher hidden states"],
        "lm_heads_seconds": seconds["lm_heads"],
        "step_seconds": total,
        "without_rollout_seconds": total - seconds["rollout"],
    }


def _settings(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Settings that keep the rule and change what a step computes, the recipe's own first."""
    yield "as the recipe has it", setup
    needs_batch = setup.asks_a_server or setup.teacher_place == "offload"
    running = setup if needs_batch else replace(setup, normalization="running")
    if running.scores_ahead != setup.scores_ahead:
        yield "normalization: running", running
    if setup.rule == "all":
        return
    if setup.backward == "full" and setup.sharding not in ("zero2", "zero3"):
        kept = replace(running, backward="kept")
        is_news = kept.normalization != setup.normalization
        yield "backward: kept" + (", normalization: running" if is_news else ""), kept
    elif setup.backward == "kept":
        yield "backward: full", replace(setup, backward="full")


def _with(name: str, setup: Setup, machine: Machine) -> dict[str, Any]:
    seconds = step_time(setup, machine)
    total = sum(seconds.values())
    return {
        "setting": name,
        "peak_bytes": peak(memory(setup))[1],
        "step_seconds": total,
        "without_rollout_seconds": total - seconds["rollout"],
    }


def _written_beside(setup: Setup, machine: Machine) -> Iterator[dict[str, Any]]:
    """The same GPUs, some of them given to a vLLM server that writes in turn with the training, or ahead of it."""
    split = best_split(setup, machine)
    if split is None:
        return
    name, taken = f"vllm_mode: server on {split.writers:,} of the {setup.gpus:,} GPUs", peak(memory(split.trainers))[1]
    for setting, seconds in (
        (name, split.rollout + split.training),
        (f"{name}, rollout_ahead: 1", max(split.rollout, split.training)),
    ):
        yield {
            "setting": setting,
            "peak_bytes": taken,
            "step_seconds": seconds,
            "without_rollout_seconds": split.training,
        }


def _ways(setup: Setup) -> Iterator[list[tuple[str, Callable[[Setup], Setup]]]]:
    """What could be changed, the cheapest in time and quality first; each with its degrees, the mildest first."""
    if not setup.checkpointing and setup.backward == "full":
        yield [("gradient_checkpointing: true", lambda setup: replace(setup, checkpointing=True))]
    if setup.engine == "colocate" and not setup.vllm_sleeps:
        yield [("vllm_enable_sleep_mode: true", lambda setup: replace(setup, vllm_sleeps=True))]
    if setup.engine == "colocate":
        parallel = [2**power for power in range(4) if 2**power > setup.vllm_parallel and setup.gpus % 2**power == 0]
        yield [(f"vllm_tensor_parallel_size: {count}", _vllm_over(count)) for count in parallel]
    if setup.engine == "transformers":
        name = "use_vllm: true with vllm_enable_sleep_mode: true (transformers holds the cache of all rollouts at once)"
        yield [(name, lambda setup: replace(setup, engine="colocate", vllm_sleeps=True))]
    sizes = [size for size in range(setup.micro_batch - 1, 0, -1) if setup.rollouts % size == 0]
    yield [
        (
            f"per_device_train_batch_size: {size}, gradient_accumulation_steps: {setup.rollouts // size}",
            _in_micro_batches(size),
        )
        for size in sizes
    ]
    if setup.optimizer == "adamw_torch":
        yield [("optim: adamw_torch_fused", lambda setup: replace(setup, optimizer="adamw_torch_fused"))]
    if setup.teacher_place == "resident" and setup.sharding == "none":
        yield [("teacher_offload: true", _with_teacher("offload"))]
    if setup.gpus > 1 and setup.sharding in ("none", "zero2"):
        yield [("accelerate_config: zero3, which shards the teacher too", _sharded_over(setup.gpus))]
    if not setup.asks_a_server and setup.teacher_place != "student":
        yield [("the teacher on a server of its own", _with_teacher("server"))]
    if setup.student.lora is None:
        yield [("use_peft: true (LoRA)", lambda setup: replace(setup, student=replace(setup.student, lora=(16, None))))]
    more = [2**power for power in range(1, 13) if 2**power > setup.gpus]
    yield [(f"{gpus} GPUs with accelerate_config: zero3", _sharded_over(gpus)) for gpus in more]


def _with_teacher(place: str) -> Callable[[Setup], Setup]:
    """The teacher where it scores ahead of the loss, which `normalization: batch` alone can do."""
    return lambda setup: replace(setup, teacher_place=place, normalization="batch")


def _vllm_over(count: int) -> Callable[[Setup], Setup]:
    return lambda setup: replace(setup, vllm_parallel=count)


def _in_micro_batches(size: int) -> Callable[[Setup], Setup]:
    def change(setup: Setup) -> Setup:
        return replace(setup, micro_batch=size, accumulation=setup.rollouts // size, padded=setup.padded and size > 1)

    return change


def _sharded_over(gpus: int) -> Callable[[Setup], Setup]:
    def change(setup: Setup) -> Setup:
        place = setup.teacher_place if setup.asks_a_server else "sharded"
        return replace(setup, gpus=gpus, sharding="zero3", teacher_place=place)

    return change


def changes(setup: Setup) -> list[str]:
    """What to change so that the step fits: the first change that is enough alone, else those that are together.

    Args:
        setup: one that does not fit.

    Returns:
        Lines of a recipe, or words; the last says what the peak is then. Nothing helps: one line that says so.
    """
    names: list[str] = []
    together, (_, best) = setup, peak(memory(setup))
    room = _room(setup)
    for degrees in _ways(setup):
        for name, change in degrees:
            _, alone = peak(memory(change(setup)))
            if fits(setup, alone):
                return [name, f"then {alone / _GIB:.1f} GiB"]
        for name, change in degrees:
            candidate = change(together)
            _, taken = peak(memory(candidate))
            if fits(setup, taken):
                return [*names, name, f"together {taken / _GIB:.1f} GiB"]
        if degrees and (taken < best or _room(candidate) > room):  # its last degree, and something else beside it
            names.append(name)
            together, best, room = candidate, taken, _room(candidate)
    return ["nothing that is planned here is enough: take a smaller student"]


def _room(setup: Setup) -> int:
    return vllm_tokens(setup) if setup.engine == "colocate" else 0


def assumptions(setup: Setup, machine: Machine) -> list[str]:
    """What the figures rest on, one line each."""
    lines = [
        f"each of {setup.gpus:,} GPU(s): {setup.accumulation} micro-batches of {setup.micro_batch} rollouts, "
        f"{setup.prompt:,} + {setup.completion:,} tokens, every completion as long as it may be",
        f"{machine.flops / 1e12:.0f} Tflop/s × {machine.utilization:g} for the models, × {machine.head_utilization:g} "
        f"for the lm_heads; {machine.bandwidth / 1e12:.2f} TB/s of memory, {machine.link / 1e9:.0f} GB/s inside a node "
        f"of {machine.node}, {machine.network / 1e9:.0f} GB/s beyond it, each × {machine.bandwidth_utilization:g}; no "
        "overlap",
        f"{USABLE:.0%} of a GPU's memory for tensors, the rest for the context, NCCL and fragmentation",
        "memory on the CPU is checked against measured steps (benchmarks/results/plan.md); on GPUs neither memory "
        "nor time has been measured",
    ]
    if setup.turns > 1:
        again = {
            "transformers": "transformers computes the whole context anew before each turn",
            "colocate": "vLLM's prefix cache keeps the context between turns",
            "server": "the server writes the turns",
        }
        lines.append(
            f"an episode has {setup.turns:,} turns of the student's (--turns) and {setup.results:,} tokens of results "
            f"(--result_tokens): {setup.written:,} of a completion's {setup.completion:,} tokens are its own, and "
            f"these alone are scored and trained on; {again[setup.engine]}; the tools take no time"
        )
    if setup.engine == "colocate":
        lines.append(
            f"vLLM holds {setup.vllm_share:.0%} of the GPU"
            + (" while it writes" if setup.vllm_sleeps else " all the time")
            + f", room for {vllm_tokens(setup):,} tokens of cache on {setup.vllm_parallel} GPU(s)"
        )
    if setup.engine == "server":
        lines.append("rollouts are written by a vLLM server on other GPUs, whose memory and time are not counted")
    if setup.other_teachers:
        lines.append(
            f"{setup.other_teachers / _GIB:.1f} GiB of weights are those of further teachers; every rollout is timed "
            "as if the largest read it"
        )
    if setup.teacher_place == "student":
        lines.append("the teacher is the model under the student's adapter, and takes no memory of its own")
    if setup.rule != "all" and setup.sharding not in ("zero2", "zero3"):
        lines.append(
            f"with backward: kept, {setup.kept_share:.1%} of the positions go forward and backward, and no activation "
            "is recomputed; it is an approximation that learns less from a step (docs/scaling.md), and its memory was "
            "not measured"
        )
    if setup.engine != "server" and setup.gpus > 1:
        lines.append(
            f"with vllm_mode: server, vLLM has {SERVER_SHARE:.0%} of its GPUs' memory, the others train on all "
            "rollouts, and sending the weights takes no time; rollout_ahead: 1 trains on rollouts that are a step old "
            "(docs/scaling.md)"
        )
    if setup.asks_a_server:
        lines.append("the teacher's server is on other GPUs; its memory, time and traffic are not counted")
    return lines


def as_text(planned: dict[str, Any]) -> str:
    """A plan for a terminal; also valid Markdown."""
    verdict = planned["peak"]
    lines = [memory_table(planned), ""]
    lines.append(
        f"{'Fits' if verdict['fits'] else 'Does not fit'}: {verdict['bytes'] / _GIB:.1f} GiB in the phase "
        f"{verdict['phase']}, {verdict['usable_bytes'] / _GIB:.1f} GiB usable."
    )
    if planned["change"]:
        lines.append("Change first: " + "; ".join(planned["change"]) + ".")
    lines += [
        "",
        time_table(planned),
        "",
        f"The bottleneck is: {planned['bottleneck']}.",
        "",
        retention_table(planned),
        "",
        settings_table(planned),
        "",
    ]
    lines += [f"- {line}" for line in planned["assumptions"]]
    return "\n".join(lines)


def memory_table(planned: dict[str, Any]) -> str:
    """GiB on one GPU by component and phase."""
    phases = planned["memory"]
    rows = []
    for component in COMPONENTS:
        values = [phases[phase][component] for phase in PHASES]
        if any(values):
            rows.append([component, *(f"{value / _GIB:.2f}" for value in values)])
    rows.append(["**together**", *(f"**{sum(phases[phase].values()) / _GIB:.2f}**" for phase in PHASES)])
    return _table(["GiB per GPU", *PHASES], rows)


def time_table(planned: dict[str, Any]) -> str:
    """Seconds of a step by part."""
    total = sum(planned["seconds"].values())
    rows = [[part, f"{planned['seconds'][part]:.2f}", f"{planned['seconds'][part] / total:.0%}"] for part in PARTS]
    return _table(["part of a step", "seconds", "share"], [*rows, ["**together**", f"**{total:.2f}**", ""]])


def retention_table(planned: dict[str, Any]) -> str:
    """What selection buys, beside all tokens in the same engine."""
    every = next((row for row in planned["retentions"] if row["retention"] == 1), None)
    rows = []
    for row in planned["retentions"]:
        saved = "" if every is None else f"{1 - row['without_rollout_seconds'] / every['without_rollout_seconds']:.0%}"
        rows.append(
            [
                "all tokens" if row["rule"] == "all" else f"{row['rule']} {row['retention']:g}",
                f"{row['peak_bytes'] / _GIB:.1f} ({row['phase']})",
                f"{row['loss_bytes'] / _GIB:.1f}",
                f"{row['teacher_hidden_bytes'] / _GIB:.2f}",
                f"{row['lm_heads_seconds']:.2f}",
                f"{row['step_seconds']:.1f}",
                saved,
            ]
        )
    header = ["", "peak (GiB)", "in the loss", "teacher hidden states", "lm_heads (s)", "step (s)"]
    return _table([*header, "saved of the time without rollout"], rows)


def settings_table(planned: dict[str, Any]) -> str:
    """What a step would take with other settings, beside the recipe's."""
    first = planned["settings"][0]
    rows = [
        [
            row["setting"],
            f"{row['peak_bytes'] / _GIB:.1f}",
            f"{row['step_seconds']:.1f}",
            f"{row['without_rollout_seconds']:.1f}",
            f"{row['without_rollout_seconds'] / first['without_rollout_seconds']:.2f}",
            f"{row['step_seconds'] / first['step_seconds']:.2f}",
        ]
        for row in planned["settings"]
    ]
    header = ["setting", "peak (GiB)", "step (s)", "without rollout (s)", "of the recipe's", "step, of the recipe's"]
    return _table(header, rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
