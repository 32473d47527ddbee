"""The method on a real language model, on the CPU: prune SmolLM2, heal it on its own rollouts, show what it says.

The teacher is SmolLM2-135M-Instruct, the student lacks ten of its 30 layers (`tasks/smollm2.py`). It is healed four
ways, each a cell of `sweep/demo-lm.yaml`: on all tokens, on half of them, on two tenths. Models and cells that are
finished are kept, so a killed demo goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .demo import GRIDS, in_workers
from .documents import read_json
from .files import alone, write_text
from .sweep import Grid, read_grid
from .sweep.cells import Cells
from .sweep.run import LOG, run_sweep
from .tasks import load_task, smollm2
from .tasks.instructions import as_chat, heldout_prompts
from .text import markdown_table

GRID = "demo-lm"
# dropped: without six the student still writes, and heals too slowly to be seen in minutes
LAYERS = 10
_COMPARED = ("gain_share", "to_random")
# of the map, and of the answers that are shown
_MAP_PROMPTS, _MAP_TOKENS = 32, 32
_SHOWN = ("Name two facts about rabbits.", "Write a short sentence about bees.", "Explain snow to a child.")
_ANSWER_TOKENS = 48
_ANSWER_TEMPERATURE = 0.6  # the likeliest tokens of a damaged model go round in circles


def demo_grid(name: str = GRID, output_dir: Path | None = None, seed: int = 0) -> Grid:
    """The packaged grid on the models and prompts of its output directory, where prompts and grid are written.

    Args:
        name: "demo-lm" or "demo-lm-quick".
        output_dir: where everything goes; None: as the grid has it.
        seed: of prompts' order, sampling and selection.
    """
    text = (GRIDS / f"{name}.yaml").read_text(encoding="utf-8")
    root = output_dir or Path("runs") / name
    smollm2.write_prompts(root)
    text = text.replace(f"runs/{name}", str(root)).replace("seeds: 0", f"seeds: {seed}")
    return read_grid(write_text(root / "grid.yaml", text))


def run(grid: Grid, threads: int, say: Callable[[str], None] = print, layers: int = LAYERS) -> dict[str, Any]:
    """Make the pair, heal every cell, and write results.json, results.md, tip_map.png and report.html.

    Args:
        grid: as `demo_grid` returns it, with one seed.
        threads: of the one process that works at a time.
        say: takes a line of progress.
        layers: how many of its teacher's the student lacks.

    Returns:
        What results.json holds.

    Raises:
        ImportError: SmolLM2's packages are missing, with the commands that install them.
        ChildProcessError: a part failed; what is finished is kept.
        ValueError: another demo or sweep is at work in the directory.
    """
    smollm2.gguf_file()
    with alone(grid.output_dir, "demo"):
        return _run(grid, threads, say, layers)


def _run(grid: Grid, threads: int, say: Callable[[str], None], layers: int) -> dict[str, Any]:
    root, (seed,) = grid.output_dir, grid.seeds
    log = root / LOG
    for _, lines in in_workers({"SmolLM2": (_make_pair, root, layers)}, 1, threads, log):
        say("; ".join(lines))
    cells = Cells(grid, root)
    cells.check()
    swept = run_sweep(cells, workers=1, threads=threads, rerun_changed=True)
    if swept["failed"]:
        raise ChildProcessError(
            f"{len(swept['failed'])} of {grid.number_of_cells()} runs failed ({next(iter(swept['failed'].values()))}); "
            f"{log} holds what they said. Run the same command again: finished parts are kept."
        )
    students = {cell.row.name: str(cells.path(cell)) for cell in cells.every_cell()}
    ((_, looked),) = in_workers({"the answers": (_look, root, students, grid.test, seed)}, 1, threads, log)
    tasks = {cells.tasks[test].divergence or cells.tasks[test].name: test for test in grid.test}
    result = {
        "teacher": smollm2.NAME,
        "dropped": read_json(root / "models" / smollm2.STUDENT / "prune.json")["dropped"],
        "settings": _settings(cells, seed),
        **looked,
        "measured": list(tasks),
        "before": {name: _figure(swept["before"][test]) for name, test in tasks.items()},
        "rows": [
            {
                **{name: row[name] for name in ("name", "rule", "retention", "seconds", "peak_memory_gib")},
                "trained_tokens": int(row["trained_tokens"]),
                **{name: _figure(row["tasks"][test]) for name, test in tasks.items()},
                # of the divergence, which is the first
                **{name: _figure(share) for name in _COMPARED if (share := row["tasks"][grid.test[0]].get(name))},
            }
            for row in swept["rows"]
        ],
        "machine": {name: swept[name] for name in ("hardware", "versions", "commit", "measured")},
    }
    write_text(root / "results.json", json.dumps(result, indent=2) + "\n")
    write_text(root / "results.md", as_markdown(result))
    _report(root, cells)
    return result


def _make_pair(root: Path, layers: int) -> list[str]:
    lines: list[str] = []
    smollm2.prepare(root, layers, say=lines.append)
    return lines


def _settings(cells: Cells, seed: int) -> dict[str, Any]:
    settings = cells.settings(cells.every_cell()[0])
    names = ("max_steps", "per_device_train_batch_size", "max_completion_length", "learning_rate", "temperature")
    return {**{name: settings[name] for name in names}, "seed": seed}


def _figure(figure: Mapping[str, Any]) -> dict[str, float]:
    """Mean and interval over the problems of a task, from sweep.json."""
    return {"mean": figure["mean"], "interval": figure["interval"]}


def _look(root: Path, students: Mapping[str, str], tasks: Sequence[str], seed: int) -> dict[str, Any]:
    """What teacher and students answer, the teacher's accuracy, and the quadrants before; draws tip_map.png."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .report.tip_map import tip_map
    from .rollout import generate
    from .score.models import score_rollouts
    from .select import select
    from .select.quadrants import quadrant_shares, quadrants

    def load(path: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path).eval()

    def write(model: Any, prompts: Sequence[Any], tokens: int, temperature: float) -> list[Any]:
        chats = [text if isinstance(text, list) else as_chat(text) for text in prompts]
        (rollouts,) = generate(
            model, tokenizer, chats, max_new_tokens=tokens, temperature=temperature, seed=seed, batch_size=len(chats)
        )
        return rollouts

    def said(model: Any, prompts: Sequence[Any], tokens: int, temperature: float) -> list[str]:
        written = [rollout.completion_ids for rollout in write(model, prompts, tokens, temperature)]
        return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]

    models = root / "models"
    tokenizer = AutoTokenizer.from_pretrained(models / smollm2.TEACHER, padding_side="left")
    teacher, student = load(models / smollm2.TEACHER), load(models / smollm2.STUDENT)
    rollouts = write(student, heldout_prompts()[:_MAP_PROMPTS], _MAP_TOKENS, temperature=1.0)
    scored = score_rollouts(student, teacher, rollouts)
    owners = [number for number, rollout in enumerate(rollouts) for _ in rollout.completion_ids]
    tip_map(
        scored.scores,
        root / "tip_map.png",
        selection=select(scored.scores, "soft_or", 0.5, rollout=torch.tensor(owners)),
        title="SmolLM2 without some of its layers, before healing; kept by Soft-OR at 50 %",
    )
    quadrant = quadrants(scored.scores)
    shares = quadrant_shares(quadrant), quadrant_shares(quadrant, scored.scores.require("reverse_kl"))
    texts = {
        "teacher": said(teacher, _SHOWN, _ANSWER_TOKENS, _ANSWER_TEMPERATURE),
        "before": said(student, _SHOWN, _ANSWER_TOKENS, _ANSWER_TEMPERATURE),
    }
    accuracy = {}
    for name in tasks:
        task = load_task(name)
        if task.check is None:
            continue  # the teacher's divergence from itself is 0
        responses = said(
            teacher, [problem.text for problem in task.problems], task.max_new_tokens or _ANSWER_TOKENS, 1.0
        )
        right = [task.check(*pair) for pair in zip(responses, [p.answer for p in task.problems], strict=True)]
        accuracy[task.name] = fmean(right)
    del teacher, student
    for name, path in students.items():
        texts[name] = said(load(path), _SHOWN, _ANSWER_TOKENS, _ANSWER_TEMPERATURE)
    return {
        "teacher_accuracy": accuracy,
        "quadrants": {
            f"q{number}": {"token_share": shares[0][number], "divergence_share": shares[1][number]}
            for number in shares[0]
        },
        "answers": [
            {"prompt": prompt, **{who: written[place] for who, written in texts.items()}}
            for place, prompt in enumerate(_SHOWN)
        ],
    }


def _report(root: Path, cells: Cells) -> None:
    """The page of the run that kept half of its tokens by Soft-OR: its map, its tokens, its curves."""
    from .report.page import write_report

    shown = next((cell for cell in cells.every_cell() if cell.row.rule == "soft_or"), cells.every_cell()[0])
    write_report([cells.path(shown)], root / "report.html")


def as_markdown(result: Mapping[str, Any]) -> str:
    """results.md: the table, what it comes to, three answers."""
    parts = [markdown_table(*table(result)), note(result), markdown_table(*answers(result))]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the demo's table, of what results.json holds."""

    def line(name: str, row: Mapping[str, Any], *rest: str) -> list[str]:
        divergence = row[measured[0]]
        low, high = divergence["interval"]
        accuracies = [f"{row[task]['mean']:.2f}" for task in measured[1:]]
        return [name, f"{divergence['mean']:.2f} [{low:.2f}, {high:.2f}]", *accuracies, *rest]

    measured = result["measured"]
    headings = ["rule", "reverse KL, nats", *measured[1:], "tokens", "time"]
    lines = [line("before healing", result["before"], "", "")]
    for row in result["rows"]:
        name = row["name"] if row["retention"] == 1 else f"{row['name']} {100 * row['retention']:.0f} %"
        lines.append(line(name, row, f"{row['trained_tokens']:,}", f"{row['seconds']:.0f} s"))
    of_teacher = [f"{result['teacher_accuracy'][name]:.2f}" for name in measured[1:]]
    lines.append(["the teacher", "0", *of_teacher, "", ""])
    return headings, lines


def note(result: Mapping[str, Any]) -> str:
    """What the table comes to: the share of the gain of each row, and whether it beats random tokens.

    Example:
        >>> kept = {"name": "Soft-OR", "retention": 0.5, "gain_share": {"mean": 0.98, "interval": [0.94, 1.02]}}
        >>> note({"rows": [kept]})
        'Of what all tokens gain, Soft-OR at 50 % keeps 98 % [94 %, 102 %].'
    """
    shares, against = [], []
    for row in result["rows"]:
        name = f"{row['name']} at {100 * row['retention']:.0f} %"
        if "gain_share" in row:
            low, high = row["gain_share"]["interval"]
            shares.append(
                f"{name} keeps {100 * row['gain_share']['mean']:.0f} % [{100 * low:.0f} %, {100 * high:.0f} %]"
            )
        if "to_random" in row:
            mean, (low, high) = row["to_random"]["mean"], row["to_random"]["interval"]
            said = "is better than" if high < 0 else "is worse than" if low > 0 else "is not told apart from"
            against.append(f"{name} {said} as many random tokens ({mean:+.2f} nats [{low:+.2f}, {high:+.2f}]).")
    sentences = [f"Of what all tokens gain, {', '.join(shares)}."] if shares else []
    return " ".join([*sentences, *against])


def answers(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the three prompts and their answers."""
    after = next((row["name"] for row in result["rows"] if row["rule"] == "soft_or"), result["rows"][0]["name"])
    headings = ["prompt", "the teacher", "the student before", f"after ({after})"]
    return headings, [
        [" ".join(row[name].split()) or "(nothing)" for name in ("prompt", "teacher", "before", after)]
        for row in result["answers"]
    ]
