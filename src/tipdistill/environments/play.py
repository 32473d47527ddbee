"""The loop of a rollout with tools: the student writes, its calls are answered, it goes on until it answers.

    prompt ─► student's turn ─► calls? ── no ─► over
                   ▲              │ yes
                   └── results ◄──┘

Training, `score`, `probe`, `eval` and `eval_tasks` all play episodes here, whatever engine writes the turns. Tokens are
only ever appended: what the student wrote is never decoded and encoded again, so a completion holds exactly what was
sampled.

What the tools say is not to be trusted. The tokens of the chat template are broken up where they stand in it as text,
so that no result can end a turn, open one, or pass for the student's words.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ..types import ToolResult, Turn, Verdict
from .world import ToolTimeoutError, World

# Tokens of a turn, and whether it ended by itself.
Written = tuple[Sequence[int], bool]
# The engine: contexts, and how many tokens each turn may take at most → the turns.
Writer = Callable[[list[list[int]], list[int]], Sequence[Written]]
# Agrees with the other processes: rows to write here → rows that every process is to write.
InStep = Callable[[int], int]

_CHARACTERS_OF_TOKEN = 64  # more than any token but a run of blanks stands for
_UNREADABLE = "the call could not be read; write it as the tools' description says"


@dataclass(frozen=True)
class Limits:
    """How far an episode may go.

    Args:
        tokens: of a completion, results included.
        rounds: turns of the student's that call tools; the next one is told to answer.
        result_tokens: of one result; what is longer is cut, with a mark.
        seconds: that a tool may take.

    Raises:
        ValueError: a number that is not positive.
    """

    tokens: int
    rounds: int = 50
    result_tokens: int = 1024
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, said in (
            ("tokens", "max_completion_length"),
            ("rounds", "max_tool_calling_iterations"),
            ("result_tokens", "max_tool_result_tokens"),
            ("seconds", "tool_timeout"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{said} must be positive, got {getattr(self, name)}.")


@dataclass
class Episode:
    """A completion that was played.

    Attributes:
        completion_ids: what the student and its tools wrote.
        turns: that it consists of.
        ending: one of `tipdistill.types.ENDINGS`.
        response: text of the student's last turn, without special tokens.
        verdict: what the environment says of it; None: nothing.
        unanswered: calls that were made and whose results had no room.
    """

    completion_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    ending: str = ""
    response: str = ""
    verdict: Verdict | None = None
    unanswered: int = 0

    @property
    def written(self) -> list[bool]:
        """Of each token, whether the student wrote it."""
        return [turn.role == "student" for turn in self.turns for _ in range(turn.tokens)]

    @property
    def results(self) -> list[ToolResult]:
        """All that was called, and what came of it."""
        return [result for turn in self.turns for result in turn.results]


@dataclass(frozen=True)
class Dialect:
    """How a tokenizer's model speaks with tools.

    Attributes:
        tokenizer: with a `response_template` or a `response_schema`.
        chat_template: in the place of the tokenizer's own; None: its own.
        settings: `chat_template_kwargs`.
    """

    tokenizer: Any
    chat_template: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def read_dialect(tokenizer: Any, settings: dict[str, Any] | None = None) -> Dialect:
    """How a tokenizer's model calls tools and reads results; its calls can be parsed afterwards.

    Args:
        tokenizer: whose chat template it is; gets a `response_template` where TRL knows one for it.
        settings: passed to the chat template.

    Raises:
        ValueError: it has no chat template, or one that renders no calls, whose calls cannot be parsed, or that renders
            earlier turns anew when others follow and for which TRL has no other.
    """
    # not for `tipdistill demo --help`
    from trl.chat_template_utils import (
        add_response_schema,
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        supports_tool_calling,
    )

    if tokenizer.chat_template is None:
        raise ValueError("tools need a chat template, and the tokenizer has none: take an instruction-tuned student.")
    if not supports_tool_calling(tokenizer):
        raise ValueError(
            "the student's chat template cannot render a conversation with tools (a call, its arguments and a result): "
            "take a student whose template can, such as Qwen3 or Llama 3.1."
        )
    if getattr(tokenizer, "response_template", None) is None and getattr(tokenizer, "response_schema", None) is None:
        try:
            add_response_schema(tokenizer)
        except ValueError as error:
            raise ValueError(
                "how the student writes calls is not known for its chat template: set tokenizer.response_template "
                "(https://huggingface.co/docs/transformers/main/en/chat_response_parsing)."
            ) from error
    template = None
    if not is_chat_template_prefix_preserving(tokenizer):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                "the student's chat template renders earlier turns anew when others follow, so that tokens could not "
                f"be appended, and TRL has no other for it: {error}"
            ) from error
    dialect = Dialect(tokenizer, template, dict(settings or {}))
    _check_reads_back(dialect)
    return dialect


def _check_reads_back(dialect: Dialect) -> None:
    """Refuse a way to read calls by which the template's own are none."""
    tokenizer = dialect.tokenizer
    options = {"tokenize": True, "return_dict": False, "chat_template": dialect.chat_template, **dialect.settings}
    asked = {"role": "user", "content": "-"}
    look = _Call("look", {"place": "Ulm"})
    function = {"name": look.name, "arguments": look.arguments}
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    prompt = tokenizer.apply_chat_template([asked], add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([asked, calling], add_generation_prompt=False, **options)
    common = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    turn = whole[common:]
    if tokenizer.eos_token_id in turn:
        turn = turn[: turn.index(tokenizer.eos_token_id) + 1]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in turn:
        return  # a vocabulary without these words: nothing can be told by them
    calls = [_call_of(call) for call in parsed_turn(tokenizer, turn, prefix=prompt).get("tool_calls") or []]
    if calls != [look]:
        raise ValueError(
            "a call that the student's chat template writes is not read back as one, so no call would be answered: "
            f"mend tokenizer.response_template. What it writes: {tokenizer.decode(turn)!r:.200}"
        )


def check_conversational(prompts: Sequence[Any]) -> None:
    """Refuse plain prompts, in which no tool can be described.

    Args:
        prompts: plain or conversational.

    Raises:
        ValueError: the first that is plain, with its number.
    """
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(
                f"prompt {row} (counting from 0) is plain text, and tools are called in conversations: set apply_chat "
                f"(--apply_chat), or give messages; got {prompt!r:.60}."
            )


def play(
    write: Writer,
    dialect: Dialect,
    prompt_ids: Sequence[Sequence[int]],
    worlds: Sequence[World],
    limits: Limits,
    tools: Sequence[Callable[..., Any]] = (),
    first: Sequence[Written] | None = None,
    in_step: InStep | None = None,
) -> list[Episode]:
    """Play an episode for each prompt, all of them a turn at a time.

    Args:
        write: the engine. It is given whole contexts, and how many tokens each may take.
        dialect: how calls and results are written.
        prompt_ids: tokens of each prompt, descriptions of the tools included.
        worlds: of each rollout, begun.
        limits: see `Limits`.
        tools: their descriptions, by which arguments are read in their types.
        first: the first turns, where they are written already.
        in_step: where several processes write together, each must write as often as the others, and where one engine
            serves them all, as many rows: rows to write here → rows that each process is to write.

    Returns:
        The episodes, judged by their environments.

    Raises:
        ValueError: an environment's verdict failed.
    """
    episodes = [Episode() for _ in prompt_ids]
    active = list(range(len(episodes)))
    for number in range(limits.rounds + 2):  # the last one is told to answer, and may call once more in vain
        if number == 0 and first is not None:
            written = first
        else:
            rows = len(active) if in_step is None else in_step(len(active))
            if not rows:
                break
            contexts = [[*prompt_ids[row], *episodes[row].completion_ids] for row in active]
            most = [limits.tokens - len(episodes[row].completion_ids) for row in active]
            # a process whose episodes are over writes a token for nothing, since the others wait for it
            idle = rows - len(active)
            turns = write([*contexts, *[list(prompt_ids[0])] * idle], [*most, *[1] * idle])[: len(active)]
            written = [(ids[:room], ended and len(ids) <= room) for (ids, ended), room in zip(turns, most, strict=True)]
        called = []
        for row, (ids, ended) in zip(active, written, strict=True):
            episode = episodes[row]
            calls = _take_turn(episode, dialect, prompt_ids[row], list(ids), ended, tools)
            if episode.ending:
                continue
            if number > limits.rounds:
                episode.ending = "too many calls"
            else:
                called.append((row, calls))
        allowed = number < limits.rounds
        started = time.monotonic()
        coming = [(row, _begin(worlds[row], calls, allowed, limits)) for row, calls in called]
        results = [(row, _collected(worlds[row], begun, started, limits)) for row, begun in coming]
        active = []
        for row, of_row in results:
            if _append(episodes[row], dialect, of_row, limits):
                active.append(row)
    for episode, world in zip(episodes, worlds, strict=True):
        assert episode.ending, "every episode ends"
        episode.verdict = world.verdict(episode.response, limits.seconds)
    return episodes


# The student's turn.


@dataclass(frozen=True)
class _Call:
    """What the student asked for; without arguments it could not be read."""

    name: str
    arguments: Any = None
    unreadable: bool = False

    @property
    def told(self) -> str:
        return "" if self.unreadable else json.dumps(self.arguments, ensure_ascii=False)


def _take_turn(
    episode: Episode,
    dialect: Dialect,
    prompt_ids: Sequence[int],
    ids: list[int],
    ended: bool,
    tools: Sequence[Callable[..., Any]],
) -> list[_Call]:
    """Append what the student wrote; its calls, or none and an ending."""
    tokenizer = dialect.tokenizer
    before = [*prompt_ids, *episode.completion_ids]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    episode.turns.append(Turn("student", len(episode.completion_ids), len(ids), text))
    episode.completion_ids += ids
    episode.response = tokenizer.decode(ids, skip_special_tokens=True)
    if not ended:
        episode.ending = "cut"
        return []
    parsed = parsed_turn(tokenizer, ids, prefix=before, tools=list(tools) or None)
    calls = [_call_of(call) for call in parsed.get("tool_calls") or []]
    if not calls and _opens_call(tokenizer, text):
        calls = [_Call("", unreadable=True)]
    if not calls:
        episode.ending = "answered"
    return calls


def parsed_turn(tokenizer: Any, ids: list[int], **options: Any) -> dict[str, Any]:
    """What a turn says, as TRL parses it; plain text where the parser fails at what a model may write.

    Args:
        tokenizer: with a `response_template` or a `response_schema`.
        ids: tokens of the turn.
        options: see `trl.chat_template_utils.parse_response`.
    """
    from trl.chat_template_utils import parse_response  # as in read_dialect

    try:
        return parse_response(tokenizer, ids, **options)
    except Exception:  # such as a thousand brackets, which no JSON parser gets through
        return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}


def _call_of(call: dict[str, Any]) -> _Call:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # some templates write them as text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return _Call(function["name"], unreadable=True)
    return _Call(function["name"], arguments)


def _opens_call(tokenizer: Any, text: str) -> bool:
    """Whether a text that was parsed as no call begins one, after its thoughts."""
    fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
    of_calls, thought = fields.get("tool_calls", {}), fields.get("reasoning_content", {})
    # of a pattern, the text that it begins with: what follows, such as a name, may be what is malformed
    literal = re.match(r"(?:[^\\\[\](){}.*+?^$|]|\\[^\w\s])+", of_calls.get("open_pattern") or "")
    opening = of_calls.get("open") or (re.sub(r"\\(.)", r"\1", literal[0]) if literal else "")
    if not opening:
        return False
    if thought.get("close_pattern"):
        text = re.split(thought["close_pattern"], text)[-1]
    return opening in text


# What comes of its calls.


def _begin(world: World, calls: Sequence[_Call], allowed: bool, limits: Limits) -> list[tuple[_Call, Any]]:
    """Each call with the result to come, or with what is wrong about it: (outcome, message)."""
    begun: list[tuple[_Call, Any]] = []
    for call in calls:
        if not allowed:
            said = f"no further call is answered after {limits.rounds}; answer with what you know"
            begun.append((call, ("too many calls", said)))
        elif call.unreadable:
            begun.append((call, ("malformed", _UNREADABLE)))
        else:
            try:
                begun.append((call, world.call(call.name, call.arguments)))
            except LookupError as error:
                begun.append((call, ("unknown tool", error.args[0])))
            except TypeError as error:
                begun.append((call, ("bad arguments", str(error))))
    return begun


def _collected(world: World, begun: Sequence[tuple[_Call, Any]], started: float, limits: Limits) -> list[ToolResult]:
    results = []
    last = started + limits.seconds
    for call, coming in begun:
        if isinstance(coming, Future):
            # one after another in one thread: the first may take all of its time, and so may the next
            try:
                outcome, said = "ok", world.answer(coming, max(0.0, last - time.monotonic()))
            except ToolTimeoutError as error:
                outcome, said = "timed out", str(error)
            except Exception as error:  # the tool's own
                outcome, said = "raised", str(error) or type(error).__name__
            last = time.monotonic() + limits.seconds
        else:
            outcome, said = coming
        text = said if outcome == "ok" else json.dumps({"error": said}, ensure_ascii=False)
        results.append(ToolResult(call.name, call.told, outcome, text.encode("utf-8", "replace").decode()))
    return results


def _append(episode: Episode, dialect: Dialect, results: list[ToolResult], limits: Limits) -> bool:
    """Append the results of a turn's calls as the chat template writes them; False where they have no room.

    A quarter of the tokens that are left stays the student's own.
    """
    left = limits.tokens - len(episode.completion_ids)
    room, cap = left - max(1, left // 4), limits.result_tokens
    while True:
        shown = [replace(result, text=capped(dialect.tokenizer, result.text, cap)) for result in results]
        ids = result_ids(dialect, shown)
        excess = len(ids) - room
        if excess <= 0:
            break
        longest = max(len(dialect.tokenizer(result.text)["input_ids"]) for result in shown)
        cap = min(cap, longest) - -(-excess // len(results))
        if cap < 1:
            episode.ending, episode.unanswered = "no room", len(results)
            return False
    text = dialect.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    episode.turns.append(Turn("tool", len(episode.completion_ids), len(ids), text, tuple(shown)))
    episode.completion_ids += ids
    return True


def capped(tokenizer: Any, text: str, tokens: int) -> str:
    """A result as it is shown: without the template's tokens, of at most so many tokens, and a mark where longer.

    Args:
        tokenizer: which counts.
        text: any.
        tokens: at most; the mark comes on top.

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> capped(build_tokenizer(), "12+34=", 4)
        '12+3 [cut: 6 characters in all]'
    """
    begun = text[: tokens * _CHARACTERS_OF_TOKEN]
    broken = broken_up(tokenizer, begun)
    encoded = tokenizer(broken, add_special_tokens=False, return_offsets_mapping=True)
    if len(encoded["input_ids"]) <= tokens and len(begun) == len(text):
        return broken
    offsets = encoded["offset_mapping"][:tokens]
    kept = broken[: offsets[-1][1]] if offsets else ""
    return f"{kept} [cut: {len(text):,} characters in all]"


def result_ids(dialect: Dialect, results: Sequence[ToolResult]) -> list[int]:
    """Tokens that follow a turn with calls: the results, and the opening of the student's next turn.

    Args:
        dialect: how results are written.
        results: of the turn's calls.
    """
    plain = [result.name or "unknown" for result in results]
    names = [broken_up(dialect.tokenizer, name) for name in plain]
    messages = [
        {"role": "tool", "name": name, "content": broken_up(dialect.tokenizer, result.text)}
        for name, result in zip(names, results, strict=True)
    ]
    ids = _suffix(dialect, messages)
    empty = _suffix(dialect, [{**message, "name": "f", "content": "0"} for message in messages])
    if _added(dialect.tokenizer, ids) != _added(dialect.tokenizer, empty):
        # the tokenizer reads tokens of the template out of a text that does not hold them
        content = '{"error": "the result cannot be shown"}'
        ids = _suffix(dialect, [{**message, "name": "f", "content": content} for message in messages])
    return ids


def _suffix(dialect: Dialect, messages: list[dict[str, Any]]) -> list[int]:
    """What a conversation has more than one that ends with the calls, from the end of their turn on; as TRL does it."""
    tokenizer = dialect.tokenizer
    call = {"type": "function", "function": {"name": messages[0]["name"], "arguments": {}}}
    begun = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    options = {"tokenize": True, "return_dict": False, "chat_template": dialect.chat_template, **dialect.settings}
    before = tokenizer.apply_chat_template(begun, add_generation_prompt=False, **options)
    whole = tokenizer.apply_chat_template([*begun, *messages], add_generation_prompt=True, **options)
    # templates write a line break after the end of a turn, which the student's turn does not have
    last = max((place for place, index in enumerate(before) if index == tokenizer.eos_token_id), default=None)
    before = before if last is None else before[: last + 1]
    assert whole[: len(before)] == before, "the chat template preserves prefixes"
    return whole[len(before) :]


def broken_up(tokenizer: Any, text: str) -> str:
    """A text in which no special token stands: a blank goes behind the first character of each.

    Args:
        tokenizer: whose special and added tokens.
        text: any.

    Example:
        >>> from types import SimpleNamespace
        >>> tokenizer = SimpleNamespace(get_added_vocab=lambda: {"<|end|>": 3, "<|start|>": 4})
        >>> broken_up(tokenizer, "no <|end|> here")
        'no < |end|> here'
    """
    tokens = sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
    if not tokens:
        return text
    pattern = re.compile("|".join(map(re.escape, tokens)))
    while pattern.search(text):
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}" if len(match[0]) > 1 else "�", text)
    return text


def _added(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    added = set(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}  # which a text may hold
    return [index for index in ids if index in added]
