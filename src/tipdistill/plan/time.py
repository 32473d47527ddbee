"""Seconds of each part of a step on one GPU, from flops, bytes and stated rates. Parts are summed: nothing overlaps.

A token's forward takes 2 flops per parameter it is multiplied with and 4·(t/2)·A per layer for attention to t tokens
before it (A: widths of all heads); a backward takes twice that, gradient checkpointing once more. Decoding reads all
weights and the cache once a token. Rates are peak · utilisation, and these are assumptions, not measurements.
"""

from __future__ import annotations

from ..select import needs_teacher
from . import replay
from .machines import MACHINES, Machine
from .memory import Setup
from .models import Sizes

__all__ = ["MACHINES", "PARTS", "Machine", "communication_bytes", "head_flops", "step_time", "vllm_tokens"]


PARTS = (
    "rollout",
    "student scoring",
    "teacher",
    "lm_heads",
    "student forward and backward",
    "optimizer",
    "communication",
)


def step_time(setup: Setup, machine: Machine) -> dict[str, float]:
    """Seconds of a step: part → seconds, for one GPU of the run.

    Args:
        setup: what is planned; completions are taken to be as long as they may be.
        machine: its rates.

    Example:
        >>> from tipdistill.plan import setup_of
        >>> parts = step_time(setup_of("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", completion=512), MACHINES["h100"])
        >>> list(parts) == list(PARTS), all(seconds >= 0 for seconds in parts.values())
        (True, True)
    """
    student, teacher = setup.student_sizes, setup.teacher_sizes
    rate, of_heads = machine.flops * machine.utilization, machine.flops * machine.head_utilization
    length, rollouts = setup.prompt + setup.completion, setup.rollouts
    own = rollouts * _sequence_flops(student, length) / rate
    backward = 3.0 if setup.student.lora is None else 2.0  # frozen weights need no gradient of their own
    passes = backward + (1 if setup.checkpointing else 0)
    if setup.backward == "kept":  # all positions are read, some go forward and backward, and none is recomputed
        passes = 1 + backward * setup.kept_share
    return {
        "rollout": _rollout(setup, machine),
        "student scoring": own if setup.scores_ahead else 0.0,
        "teacher": 0.0 if setup.asks_a_server else rollouts * _sequence_flops(teacher, length) / rate,
        "lm_heads": head_flops(setup) / of_heads,
        "student forward and backward": passes * own,
        "optimizer": _optimizer(setup, machine),
        "communication": _communication(setup, machine),
    }


def head_flops(setup: Setup) -> float:
    """Flops of both lm_heads: scores 2·N·V·(H_S + H_T), and of the kept rows as much again and two products back.

    Where tokens are chosen while their logits are held, the kept rows are projected once.

    Example:
        >>> from dataclasses import replace
        >>> from tipdistill.plan import setup_of
        >>> half = setup_of("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", retention=0.5, completion=2048)
        >>> half = replace(half, accumulation=2)
        >>> all_tokens = replace(half, rule="all", retention=1.0)
        >>> t = 4096 / 2560
        >>> abs(head_flops(half) / head_flops(all_tokens) - (1 + t + 0.5 * (3 + t)) / (3 + t)) < 1e-9
        True
        >>> held = replace(half, normalization="running")  # rollouts whose logits fit into the engine's workspace
        >>> abs(head_flops(held) / head_flops(all_tokens) - (1 + t + 0.5 * 2) / (3 + t)) < 1e-9
        True
    """
    vocabulary = min(setup.student_sizes.vocabulary, setup.teacher_sizes.vocabulary)
    student, teacher = setup.student_sizes.width, setup.teacher_sizes.width
    if setup.teacher_place == "server":
        teacher = 0
    tokens, kept = setup.rollouts * setup.written, setup.accumulation * setup.kept
    scored = 0 if setup.rule == "all" else student + (teacher if needs_teacher(setup.rule) else 0)
    of_kept = 2 * student if setup.chooses_in_one_pass else 3 * student + teacher
    return 2.0 * vocabulary * (tokens * scored + kept * of_kept)


def _sequence_flops(sizes: Sizes, length: float) -> float:
    """Of a forward of the backbone over a sequence: a token attends to half of it on average."""
    return length * (2.0 * sizes.backbone + 2.0 * sizes.attention * length)


def _rollout(setup: Setup, machine: Machine) -> float:
    """Prefill, then one token after another until the longest rollout is done; of an episode, turn by turn."""
    sizes = setup.student_sizes
    if setup.engine == "server":
        return 0.0  # on other machines, which are not planned here
    parallel = setup.vllm_parallel if setup.engine == "colocate" else 1
    rollouts = setup.rollouts * parallel  # those of all GPUs that share a copy
    rate = machine.flops * machine.utilization * parallel
    bandwidth = machine.bandwidth * machine.bandwidth_utilization * parallel
    compute = setup.computing(setup.student)
    of_weight = 2 if setup.engine == "colocate" else compute.dtype.itemsize
    cache = float(replay.forward(compute, 1, 8, cached=True).cache)
    if setup.engine == "colocate":
        cache = cache / compute.dtype.itemsize * 2
        rollouts_at_once = min(rollouts, max(1, vllm_tokens(setup) // (setup.prompt + setup.completion)))
    else:
        rollouts_at_once = rollouts
    waves = rollouts / rollouts_at_once  # vLLM starts the next as soon as one is done
    prefill = rollouts * _prefill_flops(setup) / rate
    # on average over what is written, in however many turns
    context = setup.prompt + setup.completion / 2
    read = ((sizes.backbone + sizes.lm_head) * of_weight + rollouts_at_once * context * cache) / bandwidth
    work = rollouts_at_once * (2.0 * (sizes.backbone + sizes.lm_head) + 4.0 * sizes.attention * context) / rate
    launch = machine.kernel_launch * sizes.layers if setup.engine == "transformers" else 0.0
    return prefill + waves * setup.written * max(read, work, launch)


def _prefill_flops(setup: Setup) -> float:
    """Of one rollout: its prompt, and before each further turn what transformers or vLLM has to compute of the context.

    Turns and results are taken to be of one length each. transformers begins each turn with the whole context. vLLM's
    prefix cache keeps it, so that the results alone are new; they attend to all before them.
    """
    own = setup.written / setup.turns
    results = setup.results / max(1, setup.turns - 1)
    contexts = [setup.prompt + turn * (own + results) for turn in range(setup.turns)]
    whole = sum(_sequence_flops(setup.student_sizes, length) for length in contexts)
    if setup.engine == "transformers":
        return whole
    return whole - sum(_sequence_flops(setup.student_sizes, length - results) for length in contexts[1:])


def vllm_tokens(setup: Setup) -> int:
    """Tokens that vLLM's cache holds on the GPUs that share its copy: its share less its weights."""
    weights = setup.student_sizes.parameters * 2
    cache = float(replay.forward(setup.computing(setup.student), 1, 8, cached=True).cache)
    cache = cache / setup.computing(setup.student).dtype.itemsize * 2
    return max(0, int((setup.vllm_share * setup.memory * setup.vllm_parallel - weights) / cache))


def _optimizer(setup: Setup, machine: Machine) -> float:
    """AdamW reads parameter, gradient and both moments and writes three of them, in float32 where it is sharded."""
    _, trained, trained_bytes = replay.weights(setup.student)
    touched = 7 * trained_bytes if setup.sharding == "none" else 7 * 4 * trained // setup.gpus
    return touched / (machine.bandwidth * machine.bandwidth_utilization)


def communication_bytes(setup: Setup) -> float:
    """Bytes that a GPU sends in a step: ring collectives, (N − 1) / N of what they carry, an all-reduce twice.

    DDP: all-reduce of the gradients once a step. ZeRO-2: reduce-scatter of the gradients per micro-batch, all-gather of
    the weights once. ZeRO-3, FSDP2: all-gather of the weights per forward and per backward, reduce-scatter of the
    gradients per micro-batch. A sharded teacher: all-gather per forward. vLLM and servers: not counted.
    """
    n = setup.gpus
    if n == 1:
        return 0.0
    _, trained, trained_bytes = replay.weights(setup.student)
    of_compute = setup.computing(setup.student).dtype.itemsize
    weights = setup.student_sizes.parameters * of_compute
    gradients = trained * of_compute
    micro = setup.accumulation
    scoring = micro if setup.scores_ahead else 0
    if setup.sharding == "none":
        carried = 2.0 * trained_bytes
    elif setup.sharding == "zero2":
        carried = micro * gradients + weights
    else:
        forwards = micro * (3 if setup.checkpointing or setup.backward == "kept" else 2) + scoring
        carried = forwards * weights + micro * gradients
    if setup.teacher_place == "sharded":
        carried += micro * setup.teacher_sizes.parameters * setup.teacher.dtype.itemsize
    return float(carried) * (n - 1) / n


def _communication(setup: Setup, machine: Machine) -> float:
    rate = machine.link if setup.gpus <= machine.node else machine.network
    return communication_bytes(setup) / (rate * machine.bandwidth_utilization)
