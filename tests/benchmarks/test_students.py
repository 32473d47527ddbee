"""Kinds of students, on a tiny model in the place of SmolLM2."""

import json
import math

import pytest
import torch
from tiny_smollm2 import write_tiny_pair

from benchmarks import measure, students
from benchmarks.table import TABLES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tiny_pair(tmp_path_factory.mktemp("smollm2"))


def test_each_student_is_measured_and_has_its_line(root):
    threads = torch.get_num_threads()
    healed = root / "models" / "student"
    result = students.run_students(root, prompts=4, tokens=6, healed=healed, threads=threads, say=lambda line: None)
    entries = result["students"]
    assert list(entries) == [
        "the teacher itself",
        *(f"without {layers} layers" for layers in students.LAYERS),
        "rounded to 4 bits",
        "healed",
    ]
    assert entries["the teacher itself"]["reverse_kl"] == pytest.approx(0, abs=1e-5)
    for name in list(entries)[1:]:
        assert entries[name]["reverse_kl"] > 1e-4, name
    # the directory holds the student that lacks as many layers, and both wrote from one seed
    assert entries["healed"]["reverse_kl"] == pytest.approx(entries["without 6 layers"]["reverse_kl"], rel=1e-4)
    for entry in entries.values():
        assert [sum(kinds["shares"]) for kinds in entry["quadrants"]] == pytest.approx([1.0] * len(students.THRESHOLDS))
    table = TABLES["students-smollm2"](result)
    assert all(f"| {name} |" in table for name in entries)


def test_without_a_teacher_the_command_that_writes_it_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run `python -m tipdistill\.tasks smollm2` first"):
        students.run_students(tmp_path)


def test_what_the_verdicts_say_of_the_teachers_entropy_is_in_its_file():
    result = json.loads((measure.RESULTS / "students-smollm2.json").read_text(encoding="utf-8"))
    pruned = result["students"]["without 6 layers"]
    teacher, student = (pruned[name] / math.log(49_152) for name in ("teacher_entropy", "entropy"))
    page = " ".join((measure.ROOT / "docs" / "replication.md").read_text(encoding="utf-8").split())
    assert f"SmolLM2 has plenty ({teacher:.2f}; its pruned student {student:.2f})" in page
