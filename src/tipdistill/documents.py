"""Files that people write, read in one way: UTF-8, YAML and JSON, each fault in one line with the file's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

MOST_NODES = 100_000
"""Values of a YAML file, those that its aliases repeat counted each time."""
_INTEGER_BITS = 64
_DEEPEST = 200  # brackets inside of each other


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes minutes for thousands of brackets inside of each other."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > _DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(token)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a directory, a file that may not be read, or one in another encoding.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_bytes(b"\\xef\\xbb\\xbfa")
        >>> read_text(path)
        'a'
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16: save it as UTF-8.")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds: plain values, lists and mappings; no tag of it makes an object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not YAML, nested too deeply, a key twice in a mapping, aliases that repeat each other
            without end, an integer of more than 64 bits, a lone surrogate; with the file and, where known, the line.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.yaml"
        >>> _ = path.write_text("seeds: [0, 1]")
        >>> read_yaml(path)
        {'seeds': [0, 1]}
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """As `read_yaml`, of a text.

    Args:
        text: YAML.
        where: what errors call it.

    Example:
        >>> parse_yaml("{dtype: bfloat16}", "model_init_kwargs")
        {'dtype': 'bfloat16'}
    """
    with _told_by(where, "YAML"):
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
        check_values(value)
    return value


def read_json(path: str | Path, **options: Any) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        options: of `json.loads`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not JSON, nested too deeply, or a number of thousands of digits; with the file.
    """
    return parse_json(read_text(path), str(path), **options)


def parse_json(text: str | bytes, where: str, **options: Any) -> Any:
    """As `read_json`, of a text.

    Args:
        text: JSON.
        where: what errors call it.
        options: of `json.loads`.

    Example:
        >>> parse_json('{"a": 1}', "line 1")
        {'a': 1}
    """
    with _told_by(where, "JSON"):
        return json.loads(text, **options)


def parse_mapping(value: Any, where: str) -> dict[str, Any] | None:
    """A mapping with texts as keys, given as it stands or as JSON text; None stays.

    Args:
        value: the mapping, a text, or None.
        where: what errors call it.

    Raises:
        ValueError: it is none, no JSON, or nested too deeply.

    Example:
        >>> parse_mapping('{"dtype": "auto"}', "model_init_kwargs")
        {'dtype': 'auto'}
    """
    read = parse_json(value, where) if isinstance(value, str) else value
    if read is None:
        return None
    if not isinstance(read, dict) or not all(isinstance(key, str) for key in read):
        raise ValueError(f"{where} must be a mapping of names to values, or JSON text of one, got {read!r:.60}.")
    layer: list[Any] = [read]
    depth = 0
    while layer := [
        inner
        for outer in layer
        for inner in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(inner, dict | list)
    ]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"{where} is nested too deeply: at most {_DEEPEST} levels are read.")
    return read


def check_values(value: Any) -> None:
    """Refuse what would fail only later, and elsewhere: lone surrogates, and integers that nothing holds.

    Args:
        value: nested lists and mappings.

    Raises:
        ValueError: there is one; it is named.

    Example:
        >>> check_values({"a": ["\\ud800"]})
        Traceback (most recent call last):
        ValueError: the text '\\ud800' holds half of a character (a lone surrogate).
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            if not inner.isascii() and any("\ud800" <= character <= "\udfff" for character in inner):
                raise ValueError(f"the text {inner!r:.60} holds half of a character (a lone surrogate).")
        elif isinstance(inner, int) and inner.bit_length() > _INTEGER_BITS:
            raise ValueError(f"an integer of {inner.bit_length():,} bits, and at most {_INTEGER_BITS} are read.")
        elif isinstance(inner, dict | list | tuple | set) and id(inner) not in seen:
            seen.add(id(inner))
            waiting += [*inner.keys(), *inner.values()] if isinstance(inner, dict) else list(inner)


@contextmanager
def _told_by(where: str | Path, kind: str) -> Iterator[None]:
    """Every way in which a parser fails, as one error."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{where} is no {kind} that can be read: it is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{where}{line} is not valid YAML: {error.problem or error.context or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    # of numbers, dates and tags, whose constructors raise what they like
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where} is no {kind} that can be read: {_short(error)}") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _check_nodes(root: yaml.Node) -> None:
    """Refuse keys that stand twice in a mapping, and aliases that would unfold to no end."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias stands inside of what it names.")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                inner = [part for pair in node.value for part in pair]
            else:
                inner = node.value if isinstance(node, yaml.SequenceNode) else []
            sizes[id(node)] = 1 + sum(map(size, inner))
            open_nodes.remove(id(node))
            if sizes[id(node)] > MOST_NODES:
                raise ValueError(f"line {node.start_mark.line + 1}: more than {MOST_NODES:,} values.")
        return sizes[id(node)]

    size(root)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r:.60} stands there twice.")
            seen.add((key.tag, key.value))
