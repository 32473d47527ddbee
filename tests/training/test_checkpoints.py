"""Which checkpoint is whole, and where a run goes on."""

import json
import re
import shutil
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import save_file

from tipdistill.training.checkpoints import checkpoint_to_resume, final_step, incomplete, last_complete_checkpoint

SOURCE = Path(__file__).parents[2] / "src" / "tipdistill"


def write(path: Path, step: int, ranks: int = 1) -> Path:
    """A checkpoint as Trainer writes it."""
    path.mkdir(parents=True)
    save_file({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, path / "model.safetensors", {"format": "pt"})
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
        torch.save({"state": torch.ones(8)}, path / name)
    for rank in range(ranks):
        torch.save({"cpu": torch.ones(8)}, path / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"))
    (path / "config.json").write_text("{}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "checkpoint-4", 4)
    write(tmp_path / "checkpoint-6", 6)
    return tmp_path


NEEDED = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
CUT = (*NEEDED, "training_args.bin", "config.json")


@pytest.mark.parametrize("name", NEEDED)
def test_a_file_that_is_missing(run, name):
    (run / "checkpoint-6" / name).unlink()
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("length", ["empty", "one byte", "half", "all but one byte"])
def test_a_file_that_is_cut_off(run, name, length):
    path = run / "checkpoint-6" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: {"empty": 0, "one byte": 1, "half": len(whole) // 2}.get(length, len(whole) - 1)])
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    path.write_bytes(b"\0" * len(whole))  # the length was written and the content was not: a power cut
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")


DEEP = b"[" * 100_000
DAMAGED = {
    "deep state": ("trainer_state.json", DEEP),
    "empty state": ("trainer_state.json", b"{}"),
    "list state": ("trainer_state.json", b"[]"),
    "null step": ("trainer_state.json", b'{"global_step": null}'),
    "true step": ("trainer_state.json", b'{"global_step": true}'),
    "another step": ("trainer_state.json", b'{"global_step": 4}'),
    "deep config": ("config.json", DEEP),
    "latin-1 config": ("config.json", b'{"a": "\xff"}'),
    "deep header": ("model.safetensors", len(DEEP).to_bytes(8, "little") + DEEP),
    "text offsets": ("model.safetensors", (30).to_bytes(8, "little") + b'{"a":{"data_offsets":[0,"8"]}}'),
    "list of shards": ("model.safetensors.index.json", b'{"weight_map": ["a"]}'),
    "shard that is a list": ("model.safetensors.index.json", b'{"weight_map": {"a": ["b"]}}'),
    "latin-1 latest": ("latest", b"global_step\xff"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_whatever_a_damaged_one_holds_the_one_before_it_is_taken(run, damage):
    name, content = DAMAGED[damage]
    (run / "checkpoint-6" / name).write_bytes(content)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    with pytest.raises(ValueError, match=f"cannot be resumed from: .*{name}"):
        checkpoint_to_resume(str(run / "checkpoint-6"), run)


def test_a_whole_one_is_taken_whatever_is_beside_it(run):
    (run / "checkpoint-10").mkdir()
    for name in ("best", "²", "٣", "-8", "8 "):
        write(run / f"checkpoint-{name}", 8)
    (run / "checkpoint-12").write_text("a file")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")


def test_shards_ranks_and_engines(tmp_path):
    several = write(tmp_path / "checkpoint-1", 1, ranks=3)
    assert incomplete(several) is None
    (several / "rng_state_1.pth").unlink()
    assert "random state" in incomplete(several)

    sharded = write(tmp_path / "checkpoint-2", 2)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00002.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert incomplete(sharded) == "model.safetensors.index.json was not written to its end"
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model-00002-of-00002.safetensors")
    assert incomplete(sharded) is None

    deepspeed = write(tmp_path / "checkpoint-3", 3)
    for name in ("optimizer.pt", "scheduler.pt"):
        (deepspeed / name).unlink()
    (deepspeed / "latest").write_text("global_step3")
    assert incomplete(deepspeed) == "latest was not written to its end"
    (deepspeed / "global_step3").mkdir()
    (deepspeed / "optimizer_and_more.txt").touch()
    torch.save({}, deepspeed / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert incomplete(deepspeed) is None

    fsdp = write(tmp_path / "checkpoint-4", 4)
    for name in ("model.safetensors", "optimizer.pt"):
        (fsdp / name).unlink()
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / folder).mkdir()
        (fsdp / folder / "__0_0.distcp").write_bytes(b"x")
    assert "distcp was not written to its end" in incomplete(fsdp)
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / folder / ".metadata").write_bytes(b"x")
    assert incomplete(fsdp) is None


def test_what_resume_from_checkpoint_means(run, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for asked in (None, False, "false", "None"):
        assert checkpoint_to_resume(asked, run) is None
    for asked in (True, "true", "auto", str(run / "checkpoint-6")):
        assert checkpoint_to_resume(asked, run) == str(run / "checkpoint-6")
    assert checkpoint_to_resume("auto", empty) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint_to_resume(True, empty)
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"cannot be resumed from: it holds no state of the optimizer"):
        checkpoint_to_resume(str(run / "checkpoint-6"), run)


def test_a_run_is_finished_once_its_log_lies_beside_its_model(run):
    assert final_step(run) is None
    (run / "trainer_state.json").write_text('{"global_step": 6}')
    assert final_step(run) is None
    save_file({"weight": torch.ones(4)}, run / "model.safetensors")
    assert final_step(run) == 6
    for state in (b"[" * 100_000, b"[]", b"{}", b'{"global_step": null}', b'{"global_step": true}'):
        (run / "trainer_state.json").write_bytes(state)
        assert final_step(run) is None
    (run / "trainer_state.json").write_text('{"global_step": 6}')
    data = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(data[:-1])
    assert final_step(run) is None


@pytest.mark.slow
def test_a_half_written_checkpoint_is_passed_over_in_a_fresh_process(run, tmp_path):
    """accelerate's logger raises where there is no trainer yet, which is where this is asked."""
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    code = "import sys; from tipdistill.trainer import last_complete_checkpoint as last; print(last(sys.argv[1]))"
    log = tmp_path / "log"
    assert forks.run(forks.script, code, [str(run)], log=log) == 0, log.read_text()
    assert log.read_text().splitlines()[-1] == str(run / "checkpoint-4")
    assert "checkpoint-6 is passed over: an interrupted save left trainer_state.json out." in log.read_text()


def test_accelerates_logger_is_used_where_there_is_a_trainer_and_nowhere_else():
    users = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if re.search(r"accelerate\.logging|accelerate import .*logging", path.read_text(encoding="utf-8"))
    }
    assert users == {
        "trainer.py",
        "training/ahead.py",
        "training/rollouts.py",
        "training/shared_tokens.py",
    }  # all are called by a trainer alone
