"""The model card of a distilled student: TRL's, with what selection did, and the paper of the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import write_text
from ..select import rule_name
from ..text import markdown_table, printable

TAGS = ["trl", "tipdistill", "distillation"]
PAPER = {
    "title": "TIP: Token Importance in On-Policy Distillation",
    "id": "2604.14084",
    "citation": """@misc{xu2026tip,
    title         = {{TIP: Token Importance in On-Policy Distillation}},
    author        = {Yuanda Xu and Hejian Sang and Zhengze Zhou and Ran He and Zhipeng Wang and Alborz Geramifard},
    year          = 2026,
    eprint        = {2604.14084},
    archivePrefix = {arXiv},
    primaryClass  = {cs.LG},
    url           = {https://arxiv.org/abs/2604.14084},
}""",
}
_BEFORE = "### Framework versions"


def complete_card(
    path: Path, student: str, teacher: str, args: Any, history: Sequence[Mapping[str, Any]], place: str
) -> None:
    """Write what was trained on into a card of TRL's, and put right what it says of models on the disk.

    Args:
        path: of the card.
        student: what the run began with, a directory or a hub id.
        teacher: its name, a directory or a server.
        args: of the run.
        history: what it logged (`log_history`).
        place: where the trained model is, a directory or a hub id.
    """
    text = path.read_text(encoding="utf-8")
    # without a hub id TRL writes None in their places, and a licence where none was given
    text = text.replace("[None](https://huggingface.co/None)", f"`{printable(student)}`")
    text = text.replace('model="None"', f'model="{printable(place)}"').replace("licence: license\n", "")
    settings = [
        ["teacher", f"`{printable(teacher)}`"],
        ["selection rule", f"`{rule_name(args.selection_rule)}`"],
        ["retention", f"{args.retention:g} of the completion tokens"],
        ["budget", f"per {args.selection_scope}"],
        ["normalization", f"`{args.normalization}`"],
        ["backward", f"`{args.backward}`"],
        ["temperature", f"{args.temperature:g}"],
    ]
    section = [
        "### Which tokens were trained on",
        "",
        "On-policy: the student learned from the teacher's distribution at the tokens of its own rollouts that "
        "[tipdistill](https://pypi.org/project/tipdistill) selected.",
        "",
        markdown_table(["setting", "value"], settings),
    ]
    figures = _figures(history)
    if figures:
        section += ["", markdown_table(["figure", "first", "last"], figures)]
    head, heading, versions = text.partition(_BEFORE)
    assert heading, "TRL's card lists versions"
    added = "\n".join([*section, "", heading, "", f"- tipdistill: {version('tipdistill')}", versions.lstrip()])
    write_text(path, head + added)


def _figures(history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """First and last of the divergence and of each evaluation's result; tokens trained on."""
    rows = []
    names = dict.fromkeys(name for entry in history for name in entry)
    for name in names:
        result = name.startswith("eval_") and (name.endswith("/mean") or "/mean_at_" in name)
        if name in ("reverse_kl", "selection/kept_fraction") or result:
            values = [entry[name] for entry in history if name in entry]
            rows.append([f"`{name}`", *(f"{value:.4g}" for value in (values[0], values[-1]))])
    trained = [entry["selection/trained_tokens"] for entry in history if "selection/trained_tokens" in entry]
    if trained:
        rows.append(["tokens trained on", "", f"{int(trained[-1]):,}"])
    return rows
