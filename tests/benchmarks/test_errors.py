import pytest
import torch

from benchmarks.errors import run_errors

triton = pytest.importorskip("triton", reason="triton is built for Linux")
import triton.language as tl  # noqa: E402

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are not interpreted")


@triton.jit
def copied(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


@needs_interpreter
def test_the_interpreter_rounds_as_a_gpu_does():
    source = torch.randn(256, generator=torch.Generator().manual_seed(0))
    source[:3] = torch.tensor([float("inf"), float("-inf"), 0.0])
    target = torch.empty(256, dtype=torch.bfloat16)
    copied[(1,)](source, target, SIZE=256)
    assert torch.equal(target, source.to(torch.bfloat16))


@needs_interpreter
def test_a_gradient_is_no_further_from_float64_than_a_few_roundings_of_bfloat16():
    cases = run_errors(4, 300, 16, say=lambda line: None)["cases"]
    assert len(cases) == 12
    for name, case in cases.items():
        of_bfloat16 = cases[name.replace("bfloat16", "float16").replace("float16", "bfloat16")]["rounding"]
        assert case["fused loss"]["hidden"] < 4 * of_bfloat16["hidden"], name


def test_without_the_interpreter_it_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        run_errors()
