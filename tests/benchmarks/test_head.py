"""The head benchmark: what it measures, what it refuses."""

import pytest
import torch

from benchmarks import head
from benchmarks.head import HeadSettings, HeadWork, Variant, run_head, run_scaling, variants_of
from tipdistill.score import chunked
from tipdistill.training import monitor

SMALL = {"tokens": 24, "vocabulary": 67, "student_width": 8, "teacher_width": 12, "rollout_length": 7}


class Inline:
    """Stands for Worker without a process, which takes seconds to start."""

    def __init__(self, build, *arguments):
        self.work = build(*arguments)

    def ask(self, command):
        try:
            return getattr(self.work, command)()
        except Exception as error:
            raise RuntimeError(repr(error)) from error

    def close(self):
        pass


@pytest.fixture(autouse=True)
def _inline(monkeypatch):
    monkeypatch.setattr(head, "Worker", Inline)


def work(variant, **sizes):
    return HeadWork(HeadSettings(**{**SMALL, **sizes}), variant)


@pytest.mark.parametrize("variant", variants_of("cpu"), ids=lambda variant: variant.name)
def test_every_variant_agrees_with_float64(variant):
    errors = work(variant).errors()
    assert set(errors) == {"loss", "hidden", "weight", "misranked"}
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_wrong_gradient_is_an_error(name):
    wrong = work(Variant("plain"))
    run = wrong.run

    def spoiled():
        loss_and_mask = run()
        getattr(wrong.student, name).grad[0, 0] += 1.0
        return loss_and_mask

    wrong.run = spoiled
    errors = wrong.errors()
    assert errors[name] > 1e-2
    assert errors["loss"] < 1e-5


def test_a_wrong_selection_is_an_error():
    own = work(Variant("chunked", "soft_or", 0.5))
    student, teacher = head._double(own.student), head._double(own.teacher)
    _, mask = own.run()
    assert head._misranked(own.variant, student, teacher, own.rollout, mask) == 0
    swapped = mask.clone()
    swapped[:7] = ~mask[:7]  # of 7 tokens 3 are kept: 4 is another number
    assert head._misranked(own.variant, student, teacher, own.rollout, swapped) == 1
    swapped = mask.clone()
    swapped[[mask[:7].nonzero()[0].item(), (~mask[:7]).nonzero()[0].item()]] ^= True
    assert head._misranked(own.variant, student, teacher, own.rollout, swapped) == pytest.approx(2 / 24)


def test_a_result_has_times_ratios_memory_and_where_it_was_measured():
    variants = [Variant("plain"), Variant("chunked"), Variant("chunked", "entropy", 0.2)]
    said = []
    result = run_head(rounds=2, say=said.append, variants=variants, **SMALL)
    assert (result["benchmark"], result["preset"], result["settings"]["vocabulary"]) == ("head", "cpu", 67)
    assert result["versions"]["torch"] == torch.__version__
    assert result["hardware"]["threads"] == 1
    assert [entry["floor"] for entry in result["variants"].values()] == [4.5, 4.5, 1 + 0.2 * 4.5]
    for name, entry in result["variants"].items():
        assert entry["seconds"]["runs"] == 2
        assert entry["over_floor"]["median"] > 0
        assert entry["extra_bytes"] >= entry["gradient_bytes"] == (24 + 67) * 8 * 4
        assert ("plain" in entry.get("ratio", {})) == (name != "plain")
    assert sum(line.startswith("round") for line in said) == 2


def test_a_variant_that_disagrees_is_refused_and_has_no_time(monkeypatch):
    monkeypatch.setitem(head.TOLERANCES, "float32", 0.0)
    result = run_head(rounds=1, say=lambda line: None, variants=[Variant("plain")], **SMALL)
    entry = result["variants"]["plain"]
    assert "does not agree with the float64 reference" in entry["refused"]
    assert "seconds" not in entry


def test_a_variant_that_fails_is_refused_and_the_others_are_measured():
    variants = [Variant("liger"), Variant("plain")]  # it needs a GPU
    result = run_head(rounds=1, say=lambda line: None, variants=variants, **SMALL)["variants"]
    assert "liger" in result["liger"]["refused"]
    assert result["plain"]["seconds"]["runs"] == 1


def test_without_trl_the_others_are_measured_beside_plain(monkeypatch):
    monkeypatch.setattr(head, "find_spec", lambda package: None)
    said = []
    result = run_head(rounds=1, say=said.append, **SMALL)
    assert result["left_out"] == {"trl": "trl is not installed", "liger": "it needs a GPU"}
    assert "trl: left out, trl is not installed" in said
    assert any(line.startswith("chunked soft_or 0.5:") and " of plain, " in line for line in said)
    assert "trl" not in result["variants"]
    assert all("plain" in entry["ratio"] for name, entry in result["variants"].items() if name != "plain")


@pytest.mark.parametrize(
    ("variant", "of_scores"),
    [
        (Variant("chunked", "soft_or", 0.5), {"entropy", "entropy_norm", "reverse_kl"}),
        (Variant("chunked", "entropy", 0.5), {"entropy", "entropy_norm"}),
        (Variant("chunked"), None),
        (Variant("chunked", "soft_or", 0.5, one_pass=True), {"entropy", "entropy_norm", "reverse_kl"}),
    ],
    ids=["soft_or", "entropy", "all", "one pass"],
)
def test_what_is_timed_is_what_a_training_step_does(variant, of_scores, monkeypatch):
    """Scores without a gradient and with the logged statistics, then the fused loss of the kept rows."""
    assert head.LOGGED_FIELDS == monitor.LOGGED_FIELDS
    calls = []

    def recorded(name):
        function = getattr(head, name)

        def call(*arguments, **options):
            calls.append((name, len(arguments[0].hidden), set(options.get("fields", ())), torch.is_grad_enabled()))
            return function(*arguments, **options)

        monkeypatch.setattr(head, name, call)

    own = work(variant)
    for name in ("token_scores", "fused_divergence_loss", "fused_selected_loss"):
        recorded(name)
    _, mask = own.run()
    if variant.one_pass:
        assert calls == [("fused_selected_loss", 24, of_scores, True)]
        assert mask.sum() == 3 + 3 + 3 + 1
    elif of_scores is None:
        assert calls == [("fused_divergence_loss", 24, set(head.LOGGED_FIELDS), True)]
    else:
        kept = 3 + 3 + 3 + 1  # half of rollouts of 7, 7, 7 and 3 tokens
        assert calls == [("token_scores", 24, of_scores, False), ("fused_divergence_loss", kept, set(), True)]


def test_a_variant_that_runs_out_of_memory_in_a_round_is_refused_alone(monkeypatch):
    def fails(self):
        if self.variant.engine == "plain":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"seconds": 1.0, "processor_seconds": 1.0, "matmul_rate": 1e9}

    monkeypatch.setattr(HeadWork, "round", fails)
    flushed = []
    variants, settings = [Variant("plain"), Variant("chunked")], HeadSettings(**SMALL)
    entries = head.measure(settings, variants, 2, lambda line: None, lambda entries: flushed.append(len(entries)))
    assert "out of memory" in entries["plain"]["refused"]
    assert entries["chunked"]["seconds"]["runs"] == 2
    assert "ratio" not in entries["chunked"]
    assert flushed == [2, 2]


def test_switches_hold_while_a_variant_runs(monkeypatch):
    pytest.importorskip("triton", reason="triton is built for Linux")
    from tipdistill.score import triton as engine

    before, seen = engine.TILE, []
    own = work(Variant("plain", switches=(("TILE", (64, 32, 16, 1)),)))
    plain = own.work
    own.work = lambda: (seen.append(engine.TILE), plain())[1]
    own.run()
    assert seen == [engine.Tile(64, 32, 16, 1)]
    assert before == engine.TILE


@pytest.mark.slow
def test_time_is_linear_in_tokens_and_extra_memory_flat(monkeypatch):
    """The claim of docs/engine.md in small: memory beside the gradients does not follow N or V, plain's does."""
    monkeypatch.setattr(chunked, "CPU_TILE", (64, 2**14))
    monkeypatch.setattr(chunked, "CPU_WORKSPACE", 2**19)
    monkeypatch.setitem(head.PRESETS, "scaling", {"student_width": 16, "teacher_width": 16})
    monkeypatch.setattr(head, "SCALING_FIXED", {"tokens": 256, "vocabulary": 2048})
    # two thirds of the time, and no part of the growth
    monkeypatch.setattr(head, "kernels", lambda *_: [])
    monkeypatch.setattr(head, "time_split", lambda *_: {})
    monkeypatch.setattr(head, "matmul_rate", lambda *_: 1.0)
    sizes = {"tokens": (128, 1024), "vocabulary": (1024, 8192)}
    result = run_scaling(rounds=5, say=lambda line: None, **sizes)
    assert [point["size"] for point in result["points"]] == [*sizes["tokens"], *sizes["vocabulary"]]
    growth = result["growth"]
    for axis in sizes:
        assert growth["plain"][axis]["memory"] > 0.9
        for ours in ("chunked", "chunked soft_or 0.5"):
            assert growth[ours][axis]["memory"] < 0.25, (ours, axis, growth[ours])
    # 1 were it not for what a call costs whatever its size; 2 would be quadratic
    assert 0.5 < growth["chunked"]["tokens"]["time"] < 1.3


@pytest.mark.parametrize(
    ("preset", "sizes", "message"),
    [
        ("cpus", {}, "preset must be one of cpu, .*, got 'cpus'. Did you mean 'cpu'"),
        ("qwen3-4", {}, "Did you mean 'qwen3-4k'"),
        ("cpu", {"tokens": 0}, "tokens must be positive, got 0"),
        ("cpu", {"vocabulary": 1}, "vocabulary must be positive"),
        ("cpu", {"dtype": "float23"}, "dtype must be one of .*, got 'float23'. Did you mean 'float32'"),
    ],
)
def test_what_cannot_be_measured_is_refused(preset, sizes, message):
    with pytest.raises(ValueError, match=message):
        run_head(preset, **sizes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_preset_for_a_gpu_says_so():
    with pytest.raises(ValueError, match="needs a GPU"):
        run_head("qwen3-4k")
