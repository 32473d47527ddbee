"""The tools of one rollout: plain functions, or the public methods of an object that is the rollout's own.

Tools are someone else's code, and may raise, hang or return anything. Each rollout's calls run in a thread of its own:
a tool that hangs costs its rollout and not the run, and what belongs to a thread (a database connection) stays in one.
A thread that does not come back is left behind with its object; the rollout after it gets a fresh one.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any

from .. import dotted
from ..text import nearest
from ..types import Verdict

# what TRL's protocol calls itself
_OF_PROTOCOL = ("reset", "get_reward")
_DEAD = "it has not come back from an earlier call"


class ToolTimeoutError(Exception):
    """A tool did not come back in time."""


def read_environment(source: Any) -> Callable[[], Any]:
    """An environment's class, checked: it can be reset, and has tools whose schemas can be told to the student.

    Args:
        source: the class or another callable without arguments, or its dotted path.

    Returns:
        The class; inside `dotted.names_only()` what stands for it there.

    Raises:
        ValueError: there is none of that name, it cannot be made or reset, or has no tool or one without a schema.

    Example:
        >>> read_environment("math.pi")
        Traceback (most recent call last):
        ValueError: the environment math.pi is a float, and not a class ...
    """
    name = source if isinstance(source, str) else getattr(source, "__qualname__", type(source).__name__)
    unknown = f"there is no environment {name!r}: give the dotted path of a class, package.module.Class."
    factory = dotted.load(source, unknown) if isinstance(source, str) else source
    if isinstance(factory, dotted.NotImported):
        return factory
    if not callable(factory):
        raise ValueError(
            f"the environment {name} is a {type(factory).__name__}, and not a class or another callable that makes one."
        )
    try:
        made = factory()
    except Exception as error:  # the user's own code
        raise ValueError(
            f"the environment {name} cannot be made without arguments: {type(error).__name__}: {error}."
        ) from error
    if not callable(getattr(made, "reset", None)):
        raise ValueError(
            f"the environment {name} has no method `reset(**row)`, which begins a rollout: define one. It may return "
            "None or a text for the student to read."
        )
    if not tools_of(made):
        raise ValueError(
            f"the environment {name} has no tool: give it a public method; each but reset and get_reward is one."
        )
    check_tools(tools_of(made), f"the environment {name}")
    return factory


def tools_of(environment: Any) -> list[Callable[..., Any]]:
    """The tools of an environment's object: its public methods, but for reset and get_reward.

    Args:
        environment: the object.
    """
    # of the class, as TRL does: properties of the object are not evaluated
    return [
        getattr(environment, name)
        for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)
        if not name.startswith("_") and name not in _OF_PROTOCOL
    ]


def check_tools(tools: Sequence[Callable[..., Any]], owner: str) -> None:
    """Refuse tools of which a student cannot be told what they take.

    Args:
        tools: functions or methods.
        owner: whose they are, for errors.

    Raises:
        ValueError: which tool, and what it lacks.
    """
    from transformers.utils import get_json_schema  # not for `tipdistill demo --help`
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    for tool in tools:
        name = getattr(tool, "__name__", repr(tool))
        try:
            get_json_schema(tool)
        except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
            raise ValueError(
                f"{owner}: the tool {name} gives no schema: {str(error).strip()} Give it a docstring with an Args: "
                "section, and type hints for all that it takes."
            ) from error


class World:
    """The tools of one rollout, called one after another in a thread of its own.

    Args:
        tools: functions that all rollouts share.
        factory: makes the rollout's own object; None: there is none.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]] = (), factory: Callable[[], Any] | None = None) -> None:
        self._shared, self._factory = list(tools), factory
        self._environment: Any = None
        self._tools: dict[str, Callable[..., Any]] = {tool.__name__: tool for tool in self._shared}
        self._work: queue.SimpleQueue | None = None

    @property
    def names(self) -> list[str]:
        """Names of the tools."""
        return list(self._tools)

    def reset(self, row: Mapping[str, Any], seconds: float) -> str | None:
        """Begin a rollout: a new object where there is none yet, or where the last one hangs.

        Args:
            row: of the dataset.
            seconds: how long it may take.

        Returns:
            What the environment has to say to the student.

        Raises:
            ValueError: it failed, did not come back, or returned something that is no text.
        """
        if self._factory is None:
            return None
        try:
            said = self._do(lambda: self._begun(row)).result(seconds)
        except FutureTimeoutError:
            self._abandon()
            raise ValueError(
                f"the environment's reset did not come back within {seconds:g} s for the row {_shown(row)}."
            ) from None
        except Exception as error:  # the user's own code
            raise ValueError(
                f"the environment's reset failed for the row {_shown(row)}: {type(error).__name__}: {error}."
            ) from error
        if said is not None and not isinstance(said, str):
            raise ValueError(
                f"the environment's reset returned a {type(said).__name__}; a text or None is read by the student."
            )
        return said

    def _begun(self, row: Mapping[str, Any]) -> Any:
        if self._environment is None:
            assert self._factory is not None
            self._environment = self._factory()
            own = {tool.__name__: tool for tool in tools_of(self._environment)}
            self._tools = {tool.__name__: tool for tool in self._shared} | own
        return _awaited(self._environment.reset(**row))

    def call(self, name: str, arguments: Any) -> Future:
        """Begin a call.

        Args:
            name: of the tool.
            arguments: by name, as the student wrote them.

        Returns:
            The result to come, see `answer`.

        Raises:
            LookupError: there is no such tool (the nearest is named).
            TypeError: it does not take these arguments.
        """
        if name not in self._tools:
            raise LookupError(f"there is no tool {name!r}, but {', '.join(self._tools)}.{nearest(name, self._tools)}")
        tool = self._tools[name]
        if not isinstance(arguments, Mapping):
            raise TypeError(f"{name} takes named arguments, as a JSON object; got {json.dumps(arguments)[:80]}.")
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            takes = ", ".join(inspect.signature(tool).parameters) or "nothing"
            raise TypeError(f"{name}: {error}; it takes {takes}.") from error
        return self._do(lambda: _awaited(tool(**arguments)))

    def answer(self, call: Future, seconds: float) -> str:
        """The text of a result that was begun.

        Args:
            call: from `call`.
            seconds: how long to wait for it.

        Raises:
            ToolTimeoutError: it took longer; what else the rollout calls fails at once.
            Exception: what the tool raised.
        """
        try:
            return as_text(call.result(seconds))
        except FutureTimeoutError:
            if call.done():  # the tool's own
                raise
            self._abandon()
            raise ToolTimeoutError("there was no result in time") from None

    def verdict(self, response: str, seconds: float) -> Verdict | None:
        """What the environment says of the rollout; None where it says nothing.

        Args:
            response: text of the student's last turn.
            seconds: how long it may take.

        Raises:
            ValueError: it failed, did not come back, or said something that is no verdict.
        """
        if self._environment is None:
            return None
        judge = getattr(self._environment, "_verdict", None)
        reward = getattr(self._environment, "get_reward", None)
        ask = reward if judge is None else partial(judge, response)
        if ask is None:
            return None
        try:
            said = self._do(lambda: _awaited(ask())).result(seconds)
        except FutureTimeoutError:
            self._abandon()
            raise ValueError(f"the environment's verdict did not come within {seconds:g} s.") from None
        except ToolTimeoutError:
            return Verdict(False)  # it hangs in a tool: what was done there is not known
        except Exception as error:  # the user's own code
            raise ValueError(f"the environment's verdict failed: {type(error).__name__}: {error}.") from error
        if isinstance(said, Verdict):
            return said
        if isinstance(said, (bool, int, float)):
            return Verdict(said >= 1, figures={"reward": float(said)})
        raise ValueError(
            f"the environment's verdict is a {type(said).__name__}; a tipdistill.types.Verdict or, of get_reward, a "
            "number is expected."
        )

    def _do(self, task: Callable[[], Any]) -> Future:
        future: Future = Future()
        if self._work is _ABANDONED:
            future.set_exception(ToolTimeoutError(_DEAD))
            return future
        if self._work is None:
            self._work = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._work,), daemon=True, name="tipdistill-tools").start()
        self._work.put((task, future))
        return future

    def _abandon(self) -> None:
        """Leave the thread that hangs, with the object in it."""
        assert self._work is not None
        self._work.put(None)
        self._work = _ABANDONED

    def renewed(self) -> World:
        """This one, or a fresh one where its thread was left behind."""
        return World(self._shared, self._factory) if self._work is _ABANDONED else self

    def close(self) -> None:
        """End the thread, once it has come back."""
        if self._work is not None and self._work is not _ABANDONED:
            self._work.put(None)
            self._work = None


_ABANDONED: queue.SimpleQueue = queue.SimpleQueue()


class Worlds:
    """Worlds for the rollouts of a batch; the objects in them are made once and reset often, as in TRL.

    Args:
        tools: functions that all rollouts share.
        factory: makes a rollout's own object; None: there is none.
        seconds: how long a reset may take.
    """

    def __init__(
        self, tools: Sequence[Callable[..., Any]] = (), factory: Callable[[], Any] | None = None, seconds: float = 60.0
    ) -> None:
        self.tools, self.factory, self.seconds = list(tools), factory, seconds
        self._pool: list[World] = []
        self._schemas: list[Callable[..., Any]] | None = None

    def schemas(self) -> list[Callable[..., Any]]:
        """The tools, as a chat template takes them; an object is made for them once."""
        if self._schemas is None:
            self._schemas = [*self.tools, *([] if self.factory is None else tools_of(self.factory()))]
        return self._schemas

    def apart(self) -> Worlds:
        """Others of the same tools, for a thread that plays beside this one."""
        others = Worlds(self.tools, self.factory, self.seconds)
        others._schemas = self.schemas()
        return others

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[World], list[str | None]]:
        """A world for each row, reset, and what each has to say.

        Args:
            rows: of the dataset.

        Raises:
            ValueError: a reset failed.
        """
        while len(self._pool) < len(rows):
            self._pool.append(World(self.tools, self.factory))
        self._pool = [world.renewed() for world in self._pool]
        worlds = self._pool[: len(rows)]
        return worlds, [world.reset(row, self.seconds) for world, row in zip(worlds, rows, strict=True)]

    def close(self) -> None:
        """End all threads."""
        for world in self._pool:
            world.close()
        self._pool = []


def observed(prompt: Any, observation: str | None) -> Any:
    """A conversation with what the environment says at its end, as TRL appends it; the given one stays as it is.

    Args:
        prompt: messages.
        observation: from `World.reset`.

    Example:
        >>> observed([{"role": "user", "content": "Go. "}], "You see a door.")
        [{'role': 'user', 'content': 'Go. You see a door.'}]
    """
    if observation is None:
        return prompt
    *before, last = prompt
    content = last["content"]
    if isinstance(content, list):
        return [*before, {**last, "content": [*content, {"type": "text", "text": observation}]}]
    return [*before, {**last, "content": (content or "") + observation}]


def as_text(result: Any) -> str:
    """A tool's result as the student reads it: texts as they are, other things as JSON, or as Python shows them.

    Example:
        >>> as_text({"city": "Köln", "stops": [1, 2]}), as_text(None)
        ('{"city": "Köln", "stops": [1, 2]}', 'null')
    """
    if not isinstance(result, str):
        try:
            result = json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            result = str(result)
    return result.encode("utf-8", "replace").decode()  # lone surrogates are no text for a tokenizer


def _serve(work: queue.SimpleQueue) -> None:
    while (item := work.get()) is not None:
        task, future = item
        try:
            future.set_result(task())
        except BaseException as error:  # SystemExit of a tool is its failure, and must not end the thread unanswered
            future.set_exception(error if isinstance(error, Exception) else RuntimeError(f"it raised {error!r}"))


_loops = threading.local()


def _awaited(result: Any) -> Any:
    """The result of a tool that is a coroutine, in one event loop for each thread."""
    if not inspect.isawaitable(result):
        return result
    if not hasattr(_loops, "loop"):
        _loops.loop = asyncio.new_event_loop()

    async def wait() -> Any:
        return await result

    return _loops.loop.run_until_complete(wait())


def _shown(row: Mapping[str, Any]) -> str:
    return f"{dict(row)!r:.80}"
