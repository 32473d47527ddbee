"""The Triton engine on a GPU: larger heads, host synchronisation, memory, and the lines that it must reach.

    pytest tests/gpu tests/score/test_triton.py

The second file holds the awkward cases; with a GPU it runs the compiled kernels instead of the interpreter.
"""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from heads import FIELDS, error, gradients, incoming_of, leaves, make_pair, reference, to, tokens_of

import tipdistill as tip
from benchmarks import gpu_lease
from tipdistill import Head, Selection
from tipdistill.loss import fused_selected_loss
from tipdistill.score import tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# several tiles of tokens and of an odd vocabulary, neither of which fills its last one
ROWS, VOCABULARY = 2500, 20_011
# How far ours may be from float64 of the same inputs: times the naive error; the reasons are those of
# tests/score/test_triton.py.
TIMES = {torch.float32: 3.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def on_gpu(head, dtype):
    head = to(head, dtype)
    return replace(
        head,
        hidden=head.hidden.cuda(),
        weight=head.weight.cuda(),
        bias=None if head.bias is None else head.bias.cuda(),
    )


def pair(dtype, rows=ROWS, vocabulary=VOCABULARY, **options):
    return [on_gpu(head, dtype) for head in make_pair(rows, vocabulary, **options)]


def random_heads(rows, vocabulary, widths=(256, 512), dtype=torch.bfloat16):
    """Two heads made on the GPU, with logits of a standard deviation of 2."""
    return [
        Head(
            torch.randn(rows, width, device="cuda", dtype=dtype),
            torch.randn(vocabulary, width, device="cuda", dtype=dtype) * (2 / width**0.5),
        )
        for width in widths
    ]


def doubles(heads):
    return [to(head, torch.float64) for head in heads]


def fused(heads, weight, **options):
    tensors, student = leaves(heads[0])
    loss = tip.fused_divergence_loss(student, heads[1], weight, **options)
    loss.backward()
    return loss.detach(), [tensor.grad for tensor in tensors]


def chosen(heads, weight, **options):
    """The same, of rows that are chosen by their weights in two groups."""
    tensors, student = leaves(heads[0])
    loss, _, _ = fused_selected_loss(
        student,
        heads[1],
        lambda _, rows: Selection(weight[rows] > 0, weight[rows], weight[rows]),
        [1000, ROWS - 1000],
        fields=["entropy"],
        **options,
    )
    loss.backward()
    return loss.detach(), [tensor.grad for tensor in tensors]


@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 3.0, "logit_scale": 1.3}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, head):
    heads = pair(dtype, **head)
    options = {"token_ids": tokens_of(*heads).cuda(), "temperature": 0.7, "beta": 0.3}
    found = tip.token_scores(*heads, fields=FIELDS, impl="triton", **options)
    truth, naive = reference(*doubles(heads), **options), reference(*heads, **options)
    for name, value in found.present():
        if name == "signal_to_curvature":  # a quotient of two sums that vanish where both models agree
            continue
        exact, rounded = getattr(truth, name).detach(), getattr(naive, name).detach()
        allowed = max(TIMES[dtype] * error(rounded, exact), 8 * torch.finfo(torch.float32).eps)
        assert error(value.detach(), exact) <= allowed, name


@pytest.mark.parametrize("way", ["scored", "fused", "chosen"])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, kind, way):
    heads = pair(dtype, bias=True, softcap=3.0, logit_scale=1.3)
    incoming = incoming_of(ROWS, torch.float32).cuda()

    def of(heads, impl):
        options = {"divergence": kind, "temperature": 0.7, "beta": 0.3, "impl": impl}
        if way == "scored":
            return gradients(*heads, incoming.to(heads[0].hidden.dtype), **options)
        call = {"fused": fused, "chosen": chosen}[way]
        return call(heads, incoming.abs().to(heads[0].hidden.dtype), denominator=100.0, **options)[1]

    exact, naive = of(doubles(heads), "reference"), of(heads, "reference")
    for value, truth, rounded in zip(of(heads, "triton"), exact, naive, strict=True):
        assert value.dtype == dtype
        floor = (8 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
        assert error(value, truth) <= max(TIMES[dtype] * error(rounded, truth), floor)


def test_auto_takes_triton_where_it_can_be_had():
    from tipdistill.score import triton

    heads = pair(torch.bfloat16, 8, 300)
    assert tokens._engine("auto", *heads) is triton
    assert tokens._engine("auto", *doubles(heads)) is tokens.chunked
    ours, forced = (tip.token_scores(*heads, impl=impl).reverse_kl for impl in ("auto", "triton"))
    assert torch.equal(ours, forced)


def test_bad_numbers_are_refused_on_a_gpu_as_on_a_cpu():
    heads = pair(torch.bfloat16, 3, 300)
    ids = torch.tensor([0, 300, 1], device="cuda")
    for impl in ("triton", "chunked", "reference"):
        with pytest.raises(ValueError, match=r"token_ids must lie in \[0, 300\)"):
            tip.token_scores(*heads, token_ids=ids, impl=impl)
        for weight, denominator in (([1.0, -1.0, 1.0], 3.0), ([1.0, float("nan"), 1.0], 3.0), ([1.0] * 3, 0.0)):
            weight, denominator = torch.tensor(weight, device="cuda"), torch.tensor(denominator, device="cuda")
            with pytest.raises(ValueError, match="weights must be finite"):
                tip.fused_divergence_loss(*heads, weight, denominator=denominator, impl=impl)


def waits(function):
    """How often the host waited for the device, and what the function gave."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            result = function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen), result


def test_the_host_waits_once_a_call():
    heads = random_heads(4096, 32_000)
    tensors, student = leaves(heads[0])
    token_ids = torch.randint(32_000, (4096,), device="cuda")
    weight, kept = torch.ones(4096, device="cuda"), torch.arange(4096, device="cuda") % 7 == 0
    denominator = torch.tensor(4096.0, device="cuda")

    def score():
        return tip.token_scores(student, heads[1], token_ids=token_ids, fields=FIELDS, impl="triton")

    def loss():
        return tip.fused_divergence_loss(student, heads[1], weight, denominator=denominator, impl="triton")

    (score().divergence * kept).sum().backward()  # compiles
    loss().backward()
    assert waits(lambda: torch.ones(1, device="cuda").item())[0] == 1  # a wait is seen
    count, scores = waits(score)
    assert count == 1, "the finite check alone"
    total = (scores.divergence * kept).sum()
    assert waits(total.backward)[0] == 2, "the count of kept rows, and whether their gradient is finite"
    count, value = waits(loss)
    assert count == 2, "the finite check, and whether the gradient is finite"
    assert waits(value.backward)[0] == 0
    assert all(tensor.grad is not None for tensor in tensors[:2])


def extra_bytes(function):
    """The most memory that was allocated while the function ran, beyond what was before."""
    function()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("fields", [["entropy", "reverse_kl"], ["jsd", "hellinger"]], ids=["one look", "two looks"])
def test_memory_of_scoring_is_flat_in_tokens_and_vocabulary(fields):
    sizes = [(2**14, 2**16), (2**16, 2**16), (2**14, 2**18)]
    peaks = []
    for rows, vocabulary in sizes:
        heads = random_heads(rows, vocabulary, (64, 128))
        peaks.append(extra_bytes(lambda heads=heads: tip.token_scores(*heads, fields=fields, impl="triton")))
        peaks[-1] -= 64 * 4 * rows  # a few numbers per token are what is asked for
        del heads
    assert max(peaks) < 1.25 * min(peaks)
    assert max(peaks) < 2**14 * 2**16 * 4


def test_memory_of_a_backward_is_flat_beside_its_gradients():
    peaks = []
    for rows, vocabulary in [(2**14, 2**16), (2**16, 2**16), (2**14, 2**18)]:
        heads = random_heads(rows, vocabulary, (64, 128))
        _, student = leaves(heads[0])
        scores = tip.token_scores(student, heads[1], fields=["divergence"], impl="triton")
        total = scores.divergence.sum()
        peak = extra_bytes(lambda total=total: total.backward(retain_graph=True))
        # the gathered rows, their float32 gradient, and that gradient twice in bfloat16; the weight gradient
        peaks.append(peak - rows * (64 + 128) * 2 - rows * 64 * (4 + 2 + 2) - 2 * student.weight.nbytes)
        del heads, student, scores, total
    assert max(peaks) < 1.1 * 2**30, "the workspace"


def test_a_frozen_lm_head_costs_no_weight_gradient():
    heads = random_heads(512, 2**18, (512, 512))
    weight_bytes = heads[0].weight.nbytes
    frozen = replace(heads[0], hidden=heads[0].hidden.requires_grad_())
    _, trained = leaves(heads[0])
    of = [
        extra_bytes(lambda head=head: tip.fused_divergence_loss(head, heads[1], impl="triton").backward())
        for head in (frozen, trained)
    ]
    assert of[1] - of[0] > 0.9 * weight_bytes


def test_the_search_is_made_once_and_not_under_deterministic_algorithms(monkeypatch):
    from tipdistill.score import triton

    searched = []
    search = triton._search
    monkeypatch.setattr(triton, "_found", {})
    monkeypatch.setattr(triton, "_search", lambda scorer: searched.append(search(scorer)) or searched[-1])
    heads = random_heads(4096, 32_000)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = tip.token_scores(*heads, fields=["reverse_kl"], impl="triton").reverse_kl
        again = tip.token_scores(*heads, fields=["reverse_kl"], impl="triton").reverse_kl
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, again)
    assert not searched
    for _ in range(3):
        tip.token_scores(*heads, fields=["reverse_kl"], impl="triton")
    assert len(searched) == 1
    assert searched[0] in triton.CANDIDATES


def test_a_second_device_is_taken_as_it_comes():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    heads = [replace(h, hidden=h.hidden.to("cuda:1"), weight=h.weight.to("cuda:1")) for h in pair(torch.float32, 9, 99)]
    found = tip.token_scores(*heads, impl="triton").reverse_kl
    torch.testing.assert_close(found, tip.token_scores(*heads, impl="chunked").reverse_kl)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_lines_of_the_engine(tmp_path):
    """Time beside TRL's loss and the floor, memory: of benchmarks/targets.py, by the command that fills the tables."""
    name = torch.cuda.get_device_name()
    if not any(card in name for card in ("H100", "H200")):
        pytest.skip(f"the lines are of an H100 or H200, this is {name}")
    path = tmp_path / "result.json"
    # the tests are this run's own
    stages = ["head", "memory", "step"]
    assert gpu_lease.main(["--output", str(path), "--only", *stages]) == 0
    lines = json.loads(path.read_text(encoding="utf-8"))["lines"]
    measured = [line for line in lines if line["line"] != "tests that fail"]
    assert [line for line in measured if not line["holds"]] == []
