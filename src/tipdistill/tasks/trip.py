"""Trips planned with four tools: a task of several turns, small enough for one CPU core, with no planted error.

The user asks for a trip of two or three days. The student asks for trains, hotels, places and meals, turn by turn,
reads rows out of a database of the problem's own, and ends with a plan and its total:

    <user> 2 days in madrid from rome for 4 people , budget 18 each , fast train , see modern <end>
    <assistant> <call> trains origin rome destination madrid </call> <end>
    <tool> t1 3 1-free slow t2 4 3-free slow t3 4 5-free fast t4 4 2-free fast t5 5 5-free fast <end>
    <assistant> <think> fast t1 3 1-free slow ... train t3 = 4 </think> <call> hotels city madrid </call> <end>
    ...
    <assistant> <think> ... </think> train t3 sleep h2 see-1 p2 ... total 15 <end>

All words are known beforehand, and each is a token. Code checks the plan against the database: see `trip_world.check`.
Both models are taught from scratch on what a solver does: it looks at rows, the cheapest first, and takes the first
that fits. In a fifth of its episodes a call fails, and it goes on from there.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from ..environments.world import World, tools_of
from ..evaluate import task as evaluated
from ..files import write_text
from ..types import Verdict
from . import trip_world, written
from .trip_world import (
    CITIES,
    MOST_DAYS,
    MOST_SEATS,
    MOST_SLACK,
    MOST_TOTAL,
    ROWS,
    ROWS_THERE,
    SLOTS,
    SPEEDS,
    STYLES,
    Hotel,
    Place,
    Problem,
    Train,
    check,
    looked_at,
    plan_text,
    problem_of,
)
from .written import Training, fit, point_to, taught_once, untaught

# seeds of problems, which never meet: measured, trained on by a recipe, and taught before
HELD_OUT, TRAINED_ON, TAUGHT = range(256), range(1 << 10, 1 << 20), (1 << 20, 1 << 31)
# longest episode and result, in tokens, and turns: half as much again as the solver's
EPISODE_TOKENS, RESULT_TOKENS, MOST_ROUNDS = 384, 64, 8
SECONDS = 60.0
NOTHING, ANY = "none", "any"


class Trip:
    """The environment: a database, four tools that ask it, and the check of the plan."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._database: sqlite3.Connection | None = None

    def reset(self, seed: int, there: tuple[int, int] = ROWS_THERE, **row: Any) -> None:
        """Begin with a problem.

        Args:
            seed, there: of the problem, see `problem_of`.
            row: what else the dataset has.
        """
        self._problem = problem_of(seed, there)
        if self._database is not None:
            self._database.close()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)  # an object may be reset in another
        for table in ("trains", "hotels", "places", "meals"):
            rows = getattr(self._problem, table)
            self._database.execute(f"CREATE TABLE {table} ({', '.join(rows[0]._fields)})")
            self._database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    def trains(self, origin: str, destination: str) -> str:
        """Trains between two cities, there and back.

        Args:
            origin: city that they leave.
            destination: city that they reach.

        Returns:
            Codes, prices, free seats and speeds, the cheapest first.
        """
        columns = "code, price, seats || '-free', speed"
        return self._listed(f"SELECT {columns} FROM trains WHERE origin = ? AND city = ?", origin, destination)

    def hotels(self, city: str) -> str:
        """Hotels of a city.

        Args:
            city: where.

        Returns:
            Codes, prices of the whole stay, free beds and styles, the cheapest first.
        """
        return self._listed("SELECT code, price, beds || '-free', style FROM hotels WHERE city = ?", city)

    def places(self, city: str) -> str:
        """Places to see in a city.

        Args:
            city: where.

        Returns:
            Codes, prices, the day that each is closed on (0: none) and styles, the cheapest first.
        """
        return self._listed("SELECT code, price, 'closed-' || closed, style FROM places WHERE city = ?", city)

    def meals(self, city: str) -> str:
        """Restaurants of a city.

        Args:
            city: where.

        Returns:
            Codes, prices and styles, the cheapest first.
        """
        return self._listed("SELECT code, price, style FROM meals WHERE city = ?", city)

    def _listed(self, query: str, *values: Any) -> str:
        assert self._database is not None, "reset comes first"
        rows = self._database.execute(f"{query} ORDER BY price, code", values).fetchall()
        return " ".join(str(value) for row in rows for value in row) or NOTHING

    def _verdict(self, response: str) -> Verdict:
        """What is right about the plan."""
        assert self._problem is not None, "reset comes first"
        return check(response, self._problem)


# How it is written.

WORDS = (
    *map(str, range(MOST_TOTAL + MOST_SLACK + 1)),
    *CITIES,
    *SPEEDS,
    *STYLES,
    *(f"{number}-free" for number in range(1, MOST_SEATS + 1)),  # seats or beds
    *(f"closed-{day}" for day in range(MOST_DAYS + 1)),
    *(f"{letter}{number}" for letter in "thpm" for number in range(1, ROWS + 1)),
    *SLOTS,
    *("trains", "hotels", "places", "meals", "origin", "destination", "city"),  # tools, and what they take
    *("flights", "rooms", "sights", "food", "start", "town"),  # what is mistaken for them
    *("days", "in", "from", "for", "people", "budget", "each", "see", "eat", ","),  # the user's
    *(NOTHING, ANY, '{"error":', "again", "=", "total"),
)
ROLES = ("<user>", "<assistant>", "<tool>", "<tools>")
MARKS = ("<think>", "</think>", "<call>", "</call>")

CHAT_TEMPLATE = """
{%- if tools %}<tools>{% for tool in tools %} {{ tool.function.name }}{% endfor %} <end> {% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" %} <assistant>
{%- if message.reasoning_content %} <think> {{ message.reasoning_content }} </think>{% endif %}
{%- if message.content %} {{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %} <call> {{ call.function.name }}
{%- for key, value in call.function.arguments.items() %} {{ key }} {{ value }}{% endfor %} </call>
{%- endfor %} <end>
{%- elif message.role == "tool" %} <tool> {{ message.content }} <end>
{%- else %} <user> {{ message.content }} <end>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %} <assistant>{% endif %}"""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<call>\s+(?P<name>[^\s<]+)",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"(?P<key>[^\s<]+)\s+(?P<value>[^\s<]+)",
                "value_parser": {"name": "text"},
            },
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<end>\s*", "content": "text"},
    },
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, words parted by blanks; `<end>` ends a turn, and a word that is not known is `<unk>`."""
    words = ("<pad>", "<end>", "<unk>", *ROLES, *MARKS, *WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(ROLES))
    # thoughts are told from the plan in a text without special tokens
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in MARKS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(ROLES),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.response_template = RESPONSE_TEMPLATE
    return fast


# How it is solved.

MISTAKEN = {
    "trains": "flights",
    "hotels": "rooms",
    "places": "sights",
    "meals": "food",
    "origin": "start",
    "city": "town",
}
FAILURES = ("unknown tool", "bad arguments", "nothing there")
FAILURE_SHARE = 1 / 5
Call = tuple[str, dict[str, Any]]


def solve(problem: Problem, draw: random.Random, world: World) -> list[dict[str, Any]]:
    """The solver's episode, as messages from the request to the plan.

    Args:
        problem: what is asked.
        draw: decides whether a call fails, which and how.
        world: of the problem, reset; it answers the calls.

    Returns:
        Messages; a turn whose call is mistaken says so in "mistaken".
    """
    looked = looked_at(problem)
    assert looked is not None, "every problem has a plan"
    thoughts = _thoughts(problem, looked)
    there = {"city": problem.destination}
    calls: list[Call] = [
        ("trains", {"origin": problem.origin, "destination": problem.destination}),
        ("hotels", there),
        ("places", there),
        ("meals", there),
    ]
    failing = draw.choice(calls) if draw.random() < FAILURE_SHARE else None
    messages: list[dict[str, Any]] = [{"role": "user", "content": problem.request}]
    for thought, call in zip(("", *thoughts[:-1]), calls, strict=True):
        if call is failing:
            turn, result = _turn(thought, _mistaken(call, draw.choice(FAILURES), problem), world)
            messages += [{**turn, "mistaken": True}, result]
            thought = "again"
        messages += _turn(thought, call, world)
    plan = {slot: rows[-1] for slot, rows in looked.items()}
    return [*messages, {"role": "assistant", "reasoning_content": thoughts[-1], "content": plan_text(plan)}]


def _thoughts(problem: Problem, looked: dict[str, list[Any]]) -> list[str]:
    """What is thought of each result: what is wished, then its rows up to one that fits, which goes into the sum."""
    wishes = {"train": "fast" if problem.fast else "", "sleep": problem.sleep, "see": problem.see, "eat": problem.eat}
    words = {verb: [wish or ANY] for verb, wish in wishes.items()}
    total = 0
    for slot, rows in looked.items():
        total += rows[-1].price
        words[slot.partition("-")[0]] += [*map(_listing, rows), f"{slot} {rows[-1].code} = {total}"]
    return [" ".join(of_verb) for of_verb in words.values()]


def _listing(row: Any) -> str:
    """A row as its tool lists it."""
    match row:
        case Train():
            return f"{row.code} {row.price} {row.seats}-free {row.speed}"
        case Hotel():
            return f"{row.code} {row.price} {row.beds}-free {row.style}"
        case Place():
            return f"{row.code} {row.price} closed-{row.closed} {row.style}"
        case _:
            return f"{row.code} {row.price} {row.style}"


def _mistaken(call: Call, failure: str, problem: Problem) -> Call:
    """A call that fails in one of the `FAILURES`."""
    name, arguments = call
    if failure == "unknown tool":
        return MISTAKEN[name], arguments
    if failure == "bad arguments":
        return name, {MISTAKEN.get(key, key): value for key, value in arguments.items()}
    return name, {key: problem.origin if value == problem.destination else value for key, value in arguments.items()}


def _turn(thought: str, call: Call, world: World) -> list[dict[str, Any]]:
    """A turn with a call, and its result as the loop gives it."""
    name, arguments = call
    called = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turn = {"role": "assistant", "reasoning_content": thought, "content": "", "tool_calls": [called]}
    return [turn, {"role": "tool", "name": name, "content": _result(world, call)}]


def _result(world: World, call: Call) -> str:
    try:
        return world.answer(world.call(*call), SECONDS)
    except (LookupError, TypeError) as error:
        return json.dumps({"error": error.args[0]}, ensure_ascii=False)


# How both models are taught.

TEACHER = Training(layers=2, width=64, steps=2000, learning_rate=3e-3, batch=8)
STUDENT = Training(layers=2, width=64, steps=2000, learning_rate=3e-3, batch=8, seed=1, stop=840)
GROWING = ((300, (2, 2)), (600, (2, 3)))  # up to which step there are how many rows


def transcript(
    problem: tuple[int, tuple[int, int]],
    draw: random.Random,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    tools: Sequence[Any],
) -> tuple[list[int], list[bool]]:
    """The solver's episode of a problem as token ids, and which of them are taught.

    What the tools wrote is not taught, and neither is a call that fails: only how to go on from it.

    Args:
        problem: its seed and the number of its rows, see `problem_of`.
        draw: see `solve`.
        world: is reset to the problem.
        tokenizer: of the task.
        tools: as the chat template takes them.

    Returns:
        Token ids, and for each whether it is taught.
    """
    world.reset(dict(zip(("seed", "there"), problem, strict=True)), SECONDS)
    messages = solve(problem_of(*problem), draw, world)
    text = tokenizer.apply_chat_template(messages, tools=list(tools), tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    turns = iter([message for message in messages if message["role"] == "assistant"])
    begins, calls, ends = tokenizer.convert_tokens_to_ids(["<assistant>", "<call>", "<end>"])
    taught, writing, turn = [], False, {}
    for token in ids:
        writing = writing and not (token == calls and "mistaken" in turn)
        taught.append(writing)
        if token == begins:
            writing, turn = True, next(turns)
        elif token == ends:
            writing = False
    return ids, taught


def model_config(layers: int, width: int) -> Qwen3Config:
    """A Qwen3 configuration for this task: a head of 32 for each 16 of width, tied embeddings.

    Args:
        layers: decoder layers.
        width: hidden size, a multiple of 16.
    """
    tokenizer = build_tokenizer()
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        head_dim=32,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        initializer_range=0.05,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def teach(training: Training, on_step: Callable[[int, float], None] | None = None) -> PreTrainedModel:
    """Train a model from scratch on the solver's episodes.

    L = −(1 / n) Σ log P(y_t | c_t), the cross-entropy of the n tokens of a batch that are taught (see `transcript`).

    Copying out of a list is learnt sooner where the list is short, so the first steps have small databases (`GROWING`).

    Args:
        training: architecture, data and schedule.
        on_step: called with the step and its loss (nats per token).

    Returns:
        The model, in evaluation mode.
    """
    model = untaught(model_config(training.layers, training.width), training.seed)
    draw, tokenizer = random.Random(training.seed), build_tokenizer()
    world, tools = World((), Trip), tools_of(Trip())
    step = 0

    def loss() -> Tensor:
        nonlocal step
        there = next((small for end, small in GROWING if step < end), ROWS_THERE)
        step += 1
        rows = [
            transcript((draw.randrange(*TAUGHT), there), draw, world, tokenizer, tools) for _ in range(training.batch)
        ]
        longest = max(len(ids) for ids, _ in rows)
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
        taught = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in rows])[:, 1:]
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        return torch.nn.functional.cross_entropy(model.lm_head(hidden[taught]), tokens[:, 1:][taught])

    try:
        return fit(model, loss, training, on_step)
    finally:
        world.close()


def prepare(root: str | Path, prompts: int, report: Callable[[str, int, float], None] | None = None) -> None:
    """Both models under `root`/models and training prompts in `root`/prompts.jsonl, where the recipe finds them.

    Args:
        root: what is there already is kept.
        prompts: how many; none of them held out.
        report: called with the model's name, the step and its loss.

    Raises:
        ValueError: more prompts than there are, or none.
    """
    if not 1 <= prompts <= len(TRAINED_ON):
        raise ValueError(f"prompts must be in 1..{len(TRAINED_ON):,}, got {prompts}.")
    sources = [__file__, str(trip_world.__file__), str(written.__file__)]
    for name, training in (("teacher", TEACHER), ("student", STUDENT)):
        made = partial(_taught, training, report and partial(report, name))
        point_to(taught_once(name, asdict(training), Path(root) / "models", sources, made))
    lines = (json.dumps(row_of(seed)) for seed in TRAINED_ON[:prompts])
    write_text(Path(root) / "prompts.jsonl", "\n".join(lines) + "\n")


def _taught(
    training: Training, on_step: Callable[[int, float], None] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return teach(training, on_step), build_tokenizer()


def row_of(seed: int) -> dict[str, Any]:
    """A row of a dataset of this task: the request, and the seed that its environment begins from."""
    return {"prompt": [{"role": "user", "content": problem_of(seed).request}], "seed": seed}


def evaluation() -> evaluated.Task:
    """The task as an entry of `tipdistill.tasks.TASKS`: 256 held-out problems."""
    rows = [row_of(seed) for seed in HELD_OUT]
    return evaluated.Task(
        "trip",
        tuple(evaluated.Problem(row["prompt"], "-", row) for row in rows),
        prompt="own",
        environment=Trip,
        max_new_tokens=EPISODE_TOKENS,
        max_tool_calling_iterations=MOST_ROUNDS,
        max_tool_result_tokens=RESULT_TOKENS,
    )
