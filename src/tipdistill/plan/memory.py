"""Bytes on one GPU in each phase of a step: rollout, score, loss (forward and backward), optimizer.

What the models compute is replayed (`replay.py`); what is laid out by an engine is written down here, each size once.
P: trained parameters, N: GPUs, e: bytes of an element, n: rollouts of a generation batch on one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..score import chunked
from ..select import kept_counts, needs_teacher
from . import replay
from .models import Sizes
from .replay import Compute

SHARDING = ("none", "zero2", "zero3", "fsdp2")
TEACHERS = ("resident", "offload", "sharded", "server", "lm_head", "student")
ENGINES = ("transformers", "colocate", "server")
PHASES = ("rollout", "score", "loss", "optimizer")
COMPONENTS = (
    "student weights",
    "gradients",
    "optimizer state",
    "teacher weights",
    "gathered and in buckets",
    "teacher hidden states",
    "activations",
    "lm_heads and temporary",
    "KV cache",
)
# Share of the memory that tensors may fill: the CUDA context, NCCL and what the allocator cannot use take the rest.
USABLE = 0.92

# Bytes of state per trained parameter, as a multiple of its element, or in bytes where quantised.
_OPTIMIZERS: dict[str, tuple[float, float]] = {
    "adamw_torch": (2, 0),
    "adamw_torch_fused": (2, 0),
    "adamw_8bit": (0, 2),
    "adamw_bnb_8bit": (0, 2),
    "paged_adamw_8bit": (0, 0),
    "paged_adamw_32bit": (0, 0),
    "sgd": (0, 0),
}
OPTIMIZERS = tuple(_OPTIMIZERS)
# DeepSpeed's defaults, in elements: reduce_bucket_size and stage3_max_live_parameters.
_BUCKET, _LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Setup:
    """A pair, a batch and the machines, as `memory` and `step_time` take them.

    Attributes:
        student, teacher: how they compute (`Compute`), before an engine changes the dtype.
        student_sizes, teacher_sizes: their parameters.
        gpus: N.
        memory: bytes of one GPU.
        device: "cuda" or "cpu".
        sharding: "none" (one GPU, or DDP), "zero2", "zero3" or "fsdp2".
        teacher_place: "resident", "offload" (on the CPU between scoring passes), "sharded", "server", "lm_head" (a
            server gives hidden states, and the lm_head is here) or "student" (the model under the student's adapter,
            which takes no memory of its own).
        other_teachers: bytes of further teachers, on one GPU if they were alone: their weights, or where teachers are
            on the CPU between scoring passes their lm_heads.
        micro_batch: rollouts of a forward and backward (`per_device_train_batch_size`).
        accumulation: micro-batches of a step on one GPU.
        prompt, completion: tokens; of an episode the completion has the tools' results in it.
        turns: of the student's in an episode; 1: it calls no tools.
        results: tokens of all results in a completion.
        rule, retention, scope: of the selection.
        normalization: "batch" scores the generation batch once, ahead of the loss; "running" and "micro_batch" in it.
        backward: "full", or "kept": through the positions of the kept tokens alone.
        logs_divergence: a rule that reads no teacher projects it all the same now and then.
        scoring_tokens: tokens of a scoring forward; 0: micro_batch rollouts.
        checkpointing: gradient checkpointing.
        optimizer: a name in OPTIMIZERS.
        engine: what writes the rollouts: "transformers", "colocate" (vLLM on the same GPUs) or "server".
        vllm_share: of the memory, while vLLM is awake.
        vllm_parallel: GPUs that share vLLM's copy of the student.
        vllm_sleeps: whether it gives its memory back between rollouts.
        padded: sequences differ in length, so that attention takes a mask.
    """

    student: Compute
    teacher: Compute
    student_sizes: Sizes
    teacher_sizes: Sizes
    gpus: int = 1
    memory: int = 80 * 2**30
    device: str = "cuda"
    sharding: str = "none"
    teacher_place: str = "resident"
    other_teachers: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    prompt: int = 2048
    completion: int = 8192
    turns: int = 1
    results: int = 0
    rule: str = "soft_or"
    retention: float = 0.5
    scope: str = "rollout"
    normalization: str = "batch"
    backward: str = "full"
    logs_divergence: bool = True
    scoring_tokens: int = 0
    checkpointing: bool = True
    optimizer: str = "adamw_torch_fused"
    engine: str = "transformers"
    vllm_share: float = 0.3
    vllm_parallel: int = 1
    vllm_sleeps: bool = False
    padded: bool = False

    @property
    def rollouts(self) -> int:
        """Of one GPU's generation batch."""
        return self.micro_batch * self.accumulation

    @property
    def written(self) -> int:
        """Tokens of a completion that the student wrote: those that are scored and trained on."""
        return self.completion - self.results

    @property
    def asks_a_server(self) -> bool:
        """Whether the teacher's backbone is elsewhere."""
        return self.teacher_place in ("server", "lm_head")

    @property
    def scores_ahead(self) -> bool:
        """Whether there is a scoring pass before the loss; one micro-batch that is the whole batch needs none."""
        if self.teacher_place == "offload":
            return True
        is_whole = self.gpus == self.accumulation == 1 and not self.asks_a_server
        return self.normalization == "batch" and self.rule != "all" and not is_whole

    @property
    def chooses_in_one_pass(self) -> bool:
        """Whether the logits that tokens are scored by are held until they are chosen (`fused_selected_loss`)."""
        if self.scores_ahead or self.backward == "kept" or self.asks_a_server or not needs_teacher(self.rule):
            return False
        vocabulary = min(self.student_sizes.vocabulary, self.teacher_sizes.vocabulary)
        return max(self.groups) <= most_chosen(vocabulary, self.logits_dtype, self.device, self.memory)

    @property
    def groups(self) -> list[int]:
        """Tokens of the groups of a micro-batch that are chosen from each without the others."""
        lengths = [self.written] * self.micro_batch
        return lengths if self.normalization == "running" else [sum(lengths)]

    @property
    def logits_dtype(self) -> torch.dtype:
        """What hidden states are in when they meet an lm_head."""
        width = replay.forward(self.computing(self.student), 1, 8).width
        return torch.float32 if width == self.student_sizes.width * 4 else torch.bfloat16

    @property
    def kept_share(self) -> float:
        """Of all positions of a micro-batch, those that predict a token that the loss is over."""
        return self.kept / (self.micro_batch * (self.prompt + self.completion))

    @property
    def kept(self) -> int:
        """Tokens of a micro-batch that the loss is over."""
        lengths = torch.full((self.micro_batch,), self.written)
        return int(kept_counts(lengths, self.retention, self.rule, self.scope).sum())

    def computing(self, compute: Compute) -> Compute:
        """As the engine has it compute: a sharding one holds the weights it multiplies with in bfloat16."""
        if self.sharding == "none" or not self.student.autocast:
            return compute
        return replace(compute, dtype=torch.bfloat16, autocast=False)


def fused_workspace(
    rows: int,
    vocabulary: int,
    student: int,
    teacher: int,
    dtype: torch.dtype,
    device: str,
    lends: bool = True,
    memory: int = 80 * 2**30,
    lengths: Sequence[int] | None = None,
) -> int:
    """Bytes that `fused_divergence_loss` (reverse KL) holds beside its gradients: blocks of rows, tiles and scratch.

    Args:
        rows: tokens.
        vocabulary: V.
        student, teacher: widths H_S and H_T.
        dtype: of the hidden states.
        device: "cpu" (chunked) or "cuda" (triton).
        lends: whether the lm_head is trained, so that its gradient's memory can hold the first rows.
        memory: bytes of the GPU, of which the kernels hold logits in a share.
        lengths: of groups that are chosen from, where `fused_selected_loss` is meant.

    Example:
        >>> fused_workspace(10**6, 50_000, 512, 1024, torch.float32, "cpu") / 2**20 < 52
        True
    """
    if device == "cpu":
        hidden, weight = (torch.empty(size, student, device="meta") for size in (rows, vocabulary))
        spans, lent, columns = chunked._fused_spans(hidden, vocabulary, weight if lends else None, lengths)
        most = max((stop - start for start, stop in spans), default=0)
        lent_rows = max((stop - start for start, stop in spans if start >= lent), default=0)
        operands = 0 if dtype == torch.float32 else (columns + most) * (student + teacher) * 4
        tiles = (3 if lent else 1) * most * columns * 4  # scratch, and a lent block's logits before they are moved
        return 2 * lent_rows * vocabulary * 4 + tiles + operands
    of_token = 2 * vocabulary * (4 if dtype == torch.float32 else 2)
    if lengths is not None:  # and a gradient of those that are chosen
        held = min(rows, most_chosen(vocabulary, dtype, device, memory))
        return held * of_token * 3 // 2 + _GPU_SCRATCH
    held = int(memory * GPU_WORKSPACE_SHARE) + (4 * vocabulary * student if lends else 0)
    return min(rows * of_token, held) + _GPU_SCRATCH


def most_chosen(vocabulary: int, dtype: torch.dtype, device: str, memory: int) -> int:
    """Longest group of tokens that is chosen from in one pass (the engine's `choice_rows`); see `fused_workspace`.

    Example:
        >>> most_chosen(151_936, torch.bfloat16, "cuda", 80 * 2**30)
        5889
    """
    if device == "cpu":
        return chunked.CPU_CHOICE // (2 * vocabulary * 4)
    return int(memory * GPU_WORKSPACE_SHARE) // (3 * vocabulary * (4 if dtype == torch.float32 else 2))


# Of triton.py, which cannot be imported everywhere: its WORKSPACE_SHARE, and two float32 tiles. A test compares them.
GPU_WORKSPACE_SHARE = 1 / 16
_GPU_SCRATCH = 2 * 4096 * 4096 * 4


def scoring_workspace(rows: int, vocabulary: int, widths: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that `token_scores` holds: a tile of each model's logits and its scratch. Arguments: `fused_workspace`."""
    if device != "cpu":
        return _GPU_SCRATCH
    tokens = chunked._even(rows, chunked.CPU_TILE[0])
    columns = chunked._tile_shape(torch.empty(tokens, 1, device="meta"), vocabulary)[1]
    operands = 0 if dtype == torch.float32 else (columns + tokens) * widths * 4
    return 3 * tokens * columns * 4 + operands


def memory(setup: Setup) -> dict[str, dict[str, int]]:
    """Bytes on one GPU: phase → component → bytes, at the moment of the phase that takes the most.

    Args:
        setup: what is planned.

    Example:
        >>> from tipdistill.plan import setup_of
        >>> table = memory(setup_of("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", completion=512, prompt=128))
        >>> list(table) == list(PHASES), table["loss"]["teacher weights"] == 1_720_574_976 * 2
        (True, True)
    """
    resident, gradients = _resident(setup)
    cached = _cached_rows(setup)
    # the batch of the step before is let go when this one's is ready
    phases = {phase: {**dict.fromkeys(COMPONENTS, 0), **resident} for phase in PHASES}
    for phase in PHASES:
        phases[phase]["teacher hidden states"] = cached
    _rollout(setup, phases["rollout"])
    _score(setup, phases["score"], cached)
    _loss(setup, phases["loss"], gradients)
    _optimizer(setup, phases["optimizer"], gradients)
    return phases


def peak(phases: dict[str, dict[str, int]]) -> tuple[str, int]:
    """The phase that takes the most, and how many bytes.

    Example:
        >>> peak({"score": {"activations": 2}, "loss": {"activations": 3, "gradients": 1}})
        ('loss', 4)
    """
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    phase = max(totals, key=totals.__getitem__)
    return phase, totals[phase]


def _resident(setup: Setup) -> tuple[dict[str, int], int]:
    """What stays through all phases, and the bytes of a full set of gradients on this GPU."""
    n = setup.gpus
    student_bytes, trained, trained_bytes = replay.weights(setup.student)
    of_element, quantised = _OPTIMIZERS[setup.optimizer]
    resident = dict.fromkeys(COMPONENTS, 0)
    if setup.sharding == "none":
        resident["student weights"] = student_bytes
        resident["optimizer state"] = int(of_element * trained_bytes + quantised * trained)
        gradients = trained_bytes
        if n > 1:  # DDP's buckets are a second copy: gradient_as_bucket_view is off by default
            resident["gathered and in buckets"] = trained_bytes
    elif setup.sharding == "fsdp2":
        resident["student weights"] = student_bytes // n
        resident["optimizer state"] = int(of_element * trained_bytes + quantised * trained) // n
        gradients = trained_bytes // n
        resident["gathered and in buckets"] = _gathered(setup)
    else:  # DeepSpeed: bfloat16 weights and gradients, float32 master copy and states in shards
        bf16 = setup.student.autocast
        of_weight = 2 if bf16 else setup.student.dtype.itemsize
        master = 4 if bf16 else 0
        resident["optimizer state"] = int((master + 4 * of_element + quantised) * trained) // n
        weights = student_bytes // setup.student.dtype.itemsize * of_weight
        resident["student weights"] = weights // (n if setup.sharding == "zero3" else 1)
        gradients = of_weight * trained // n
        resident["gathered and in buckets"] = min(trained, _BUCKET) * of_weight + _gathered(setup)
    teacher_bytes = replay.weights(setup.teacher)[0] + setup.other_teachers
    head = setup.other_teachers + setup.teacher_sizes.lm_head * setup.teacher.dtype.itemsize
    resident["teacher weights"] = {
        "resident": teacher_bytes,
        "offload": head,
        "sharded": teacher_bytes // n,
        "server": 0,
        "student": 0,
        "lm_head": head,
    }[setup.teacher_place]
    return resident, gradients


def _gathered(setup: Setup) -> int:
    """Full parameters that a sharded engine has at hand: layers under way, and both lm_heads for the loss."""
    of_compute = setup.computing(setup.student).dtype.itemsize
    student, teacher = setup.student_sizes, setup.teacher_sizes
    total = 0
    if setup.sharding == "zero3":
        total += min(student.parameters, max(_LIVE, 2 * student.layer)) * of_compute + student.lm_head * of_compute
    elif setup.sharding == "fsdp2":  # a layer, the next one, and the gradient of the last; the root stays whole
        total += 3 * student.layer * of_compute + student.lm_head * of_compute * (1 if student.tied else 2)
    if setup.teacher_place == "sharded":
        total += (2 * teacher.layer + teacher.lm_head) * setup.teacher.dtype.itemsize
    return total


def _teacher_width(setup: Setup) -> int:
    """Bytes of a hidden state of the teacher."""
    return replay.forward(setup.computing(setup.teacher), 1, 8).width


def _caches(setup: Setup) -> bool:
    if not setup.scores_ahead or setup.asks_a_server:
        return False
    return needs_teacher(setup.rule) or setup.logs_divergence or setup.teacher_place == "offload"


def _cached_rows(setup: Setup) -> int:
    """Bytes of the teacher's hidden states of the kept rows of a generation batch."""
    return setup.accumulation * setup.kept * _teacher_width(setup) if _caches(setup) else 0


def _vllm(setup: Setup, awake: bool) -> int:
    return (
        int(setup.vllm_share * setup.memory) if setup.engine == "colocate" and (awake or not setup.vllm_sleeps) else 0
    )


def _rollout(setup: Setup, parts: dict[str, int]) -> None:
    parts["KV cache"] = _vllm(setup, awake=True)
    if setup.engine != "transformers":
        return
    compute = setup.computing(setup.student)
    # transformers keeps nothing between turns: the last one begins with all that stands before it
    before = setup.prompt + setup.completion - setup.written // setup.turns if setup.turns > 1 else setup.prompt
    prefill = replay.forward(compute, setup.rollouts, before, setup.padded, cached=True)
    last = replay.decoding(compute, setup.rollouts, setup.prompt + setup.completion, setup.padded)
    cache = int(prefill.cache * setup.rollouts * (setup.prompt + setup.completion))
    # the last token's logits, as float32 and as probabilities
    logits = 3 * setup.rollouts * setup.student_sizes.vocabulary * 4
    if setup.sharding == "zero3":  # ds3_gather_for_generation
        parts["gathered and in buckets"] += setup.student_sizes.parameters * compute.dtype.itemsize
    if prefill.peak >= last + logits:
        cache = int(prefill.cache * setup.rollouts * before)
        parts["KV cache"] += cache
        parts["lm_heads and temporary"] = prefill.peak - cache
    else:
        parts["KV cache"] += cache
        parts["lm_heads and temporary"] = last - cache + logits


def _score(setup: Setup, parts: dict[str, int], cached: int) -> None:
    parts["KV cache"] = _vllm(setup, awake=False)
    if not setup.scores_ahead:
        return
    length = setup.prompt + setup.completion
    chunk = max(1, setup.scoring_tokens // length) if setup.scoring_tokens else setup.micro_batch
    chunk = min(chunk, setup.rollouts)
    rows = chunk * setup.written
    student = replay.forward(setup.computing(setup.student), chunk, length, setup.padded)
    own = rows * student.width
    moments = [student.peak]
    of_teacher = 0
    if _caches(setup):
        teacher = replay.forward(setup.computing(setup.teacher), chunk, length, setup.padded)
        of_teacher = rows * teacher.width
        moments.append(student.casts + own + teacher.peak)
    vocabulary = min(setup.student_sizes.vocabulary, setup.teacher_sizes.vocabulary)
    widths = setup.student_sizes.width + setup.teacher_sizes.width
    moments.append(own + of_teacher + scoring_workspace(rows, vocabulary, widths, setup.logits_dtype, setup.device))
    everything = setup.rollouts * setup.written * _teacher_width(setup) if _caches(setup) else 0
    last = max(moments) + max(0, everything - of_teacher)
    chosen = everything + cached  # all rows, and copies of the kept ones, before the former go
    parts["teacher hidden states"] += max(0, everything - of_teacher) if last >= chosen else chosen
    parts["lm_heads and temporary"] = max(moments) if last >= chosen else 0
    if setup.teacher_place == "offload":
        parts["teacher weights"] = replay.weights(setup.teacher)[0] + setup.other_teachers


def _loss(setup: Setup, parts: dict[str, int], gradients: int) -> None:
    parts["KV cache"] = _vllm(setup, awake=False)
    compute = setup.computing(setup.student)
    length = setup.prompt + setup.completion
    every = setup.micro_batch * setup.written
    vocabulary = min(setup.student_sizes.vocabulary, setup.teacher_sizes.vocabulary)
    widths = setup.student_sizes.width + setup.teacher_sizes.width
    forward = replay.forward(compute, 1, 8)
    dtype = setup.logits_dtype
    own, its = setup.student_sizes.width, setup.teacher_sizes.width
    lends = setup.student.lora is None
    workspace = fused_workspace(setup.kept, vocabulary, own, its, dtype, setup.device, lends, setup.memory)
    teacher = 0
    teacher_rows = setup.kept * _teacher_width(setup)
    if not _caches(setup) and setup.teacher_place != "server":
        teacher = replay.forward(setup.computing(setup.teacher), setup.micro_batch, length, setup.padded).peak
        if setup.chooses_in_one_pass:  # all rows of both models, and in two copies those that are kept
            teacher_rows = every * _teacher_width(setup)
            lengths = setup.groups
            workspace = fused_workspace(every, vocabulary, own, its, dtype, setup.device, lends, setup.memory, lengths)
        elif not setup.scores_ahead and setup.kept < every:  # scored here: all rows of both models, then the kept ones
            teacher_rows += every * (_teacher_width(setup) + forward.width)
            workspace = max(workspace, scoring_workspace(every, vocabulary, widths, dtype, setup.device))
    sharded = setup.sharding != "none"
    reads = setup.backward == "kept"
    counted = replay.training(
        compute,
        setup.micro_batch,
        1 if reads else setup.prompt,
        -(-setup.kept // setup.micro_batch) if reads else setup.completion,  # kept positions stand close together
        setup.kept,
        teacher,
        teacher_rows,
        workspace,
        checkpointing=setup.checkpointing and not reads,
        accumulated=setup.accumulation > 1 and not sharded,
        sharded=sharded,
        padded=setup.padded,
    )
    parts["gradients"] = gradients if sharded or setup.accumulation > 1 else counted.gradients
    beside = most = counted.peak - counted.gradients
    if reads:  # keys and values of all positions, first alone and then with those of the kept ones among them
        reading = replay.forward(compute, setup.micro_batch, length, setup.padded, cached=True)
        cache = int(reading.cache * setup.micro_batch * length)
        parts["KV cache"] += cache
        most = max(beside, reading.peak - cache)
    parts["activations"] = min(counted.saved, beside)
    parts["lm_heads and temporary"] = most - parts["activations"]


def _optimizer(setup: Setup, parts: dict[str, int], gradients: int) -> None:
    parts["KV cache"] = _vllm(setup, awake=False)
    parts["gradients"] = gradients
    if setup.sharding in ("zero2", "zero3") and setup.student.autocast:
        parts["lm_heads and temporary"] = 2 * gradients  # a float32 copy of the shard's bfloat16 gradients
    if setup.optimizer == "adamw_torch":
        _, trained, trained_bytes = replay.weights(setup.student)
        if setup.device == "cuda":  # its foreach form takes the root of all second moments at once
            shard = trained_bytes // setup.gpus if setup.sharding != "none" else trained_bytes
            parts["lm_heads and temporary"] += shard
        else:
            parts["lm_heads and temporary"] += 2 * min(setup.student_sizes.largest, trained) * 4
