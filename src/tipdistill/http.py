"""JSON over HTTP, and bytes for answers: what is sent where, how long and large they may be, and what is asked again.

What passes by itself is asked again: no connection, a time-out, an answer that is cut off, an error of the server's own
(5xx), and 408, 425 and 429, by which a server says that it is busy. Any other 4xx, a redirect, an answer that is too
large, one that is no JSON (a web page) and one whose values cannot be right are final. How long to wait, and when to
give up, is the caller's to say.

A key goes to the server that it was named for and nowhere else: redirects are not followed, a server of this machine is
never asked through a proxy, and neither ~/.netrc nor a name in the URL is turned into a password.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import ssl
import time
import zlib
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx2

from .text import printable

logger = logging.getLogger(__name__)

# request timeout, too early, too many requests
BUSY = (408, 425, 429)
LARGEST = 64 * 2**20
"""Bytes of an answer, unpacked, where the caller knows no closer limit."""
DEFAULT_KEY = "OPENAI_API_KEY"
_ITS_ORIGIN = ("https", "api.openai.com", 443)
_SAID = 500  # bytes of an error's body that are told
_SHOWN = 80  # characters of what is no JSON
_PACKAGING = 64 * 2**10  # bytes that gzip may add to what cannot be packed
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_PORTS = {"http": 80, "https": 443}

_Value = TypeVar("_Value")


class RefusedError(ValueError):
    """The server answered, and asking again would not change the answer."""


class NoAnswerError(OSError):
    """The server gave no usable answer, and is not asked again."""


class WrongAnswerError(ValueError):
    """Said by `read` of an answer that cannot be right: a part is missing, or a token is in no vocabulary."""


class Bytes(NamedTuple):
    """An answer that is no JSON.

    Attributes:
        body: as it came.
        headers: name in lower case → value.
    """

    body: bytes
    headers: dict[str, str]


class Answer(NamedTuple):
    """What came of a request.

    Attributes:
        value: the JSON that was answered, or what `read` made of it.
        sent, received: bytes of the two bodies, as transferred.
    """

    value: Any
    sent: int
    received: int


def ask(
    url: str,
    body: dict[str, Any] | None = None,
    *,
    again: Callable[[int, str], bool],
    read: Callable[[Any], Any] = lambda reply: reply,
    api_key: str | None = None,
    timeout: float = 600.0,
    largest: int = LARGEST,
    as_bytes: bool = False,
) -> Answer:
    """Send a request until it is answered.

    Args:
        url: with its scheme.
        body: sent as JSON (POST); None: a GET.
        again: called with how many attempts have failed and what went wrong last; waits, and says whether to ask again.
            `doubling` makes one.
        read: JSON answer (`Bytes` where `as_bytes`) → value. A WrongAnswerError says that the answer cannot be right,
            another ValueError that it is none and another may come.
        api_key: sent as a bearer token.
        timeout: of one attempt from its first byte to its last, in seconds.
        largest: bytes of an answer, unpacked.
        as_bytes: the answer is no JSON.

    Raises:
        RefusedError: a 4xx that is final (with what the server said), a redirect, an answer that is larger, no JSON,
            nested too deeply, or refused by `read`.
        NoAnswerError: `again` gave up; with what went wrong last.

    Example:
        >>> ask("http://127.0.0.1:9", again=doubling(attempts=2, pause=0.01))
        Traceback (most recent call last):
        tipdistill.http.NoAnswerError: http://127.0.0.1:9 gave no answer: ConnectionRefusedError: ...
    """
    payload = None if body is None else json.dumps(body, separators=(",", ":")).encode()
    accept = "application/octet-stream" if as_bytes else "application/json"
    headers = {"Accept": accept, "Accept-Encoding": "gzip"}
    if payload is not None:
        headers["Content-Type"] = "application/json"
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    failed = 0
    while True:
        try:
            told = _SAID + len(api_key or "")  # a key that begins in what is told ends in it
            status, answered, raw, received = _wait_for(_exchange(url, payload, headers, timeout, largest, told))
            if 300 <= status < 400:
                to = _origin_text(answered.get("location", ""))
                raise RefusedError(
                    f"{url} sends requests on to {to} (HTTP {status}), and redirects are not "
                    "followed, so that no key and no prompt goes where it was not sent: give that address, if it is "
                    "the right one."
                )
            if as_bytes and 200 <= status < 300:
                return Answer(read(Bytes(raw, answered)), len(payload or b""), received)
            # a server may repeat the key; as many stars, since what is told ends at a byte
            raw = raw.replace(api_key.encode(), b"*" * len(api_key)) if api_key else raw
            if 200 <= status < 300:
                return Answer(read(_parsed(raw)), len(payload or b""), received)
            said = f"HTTP {status}: {printable(raw[:_SAID].decode(errors='replace'))}"
            if status < 500 and status not in BUSY:
                raise RefusedError(f"{url} refused the request: {said}")
        except RefusedError as error:
            raise RefusedError(_without_key(str(error), api_key)) from None
        except WrongAnswerError as error:
            raise RefusedError(_without_key(f"{url} gives a wrong answer: {printable(str(error))}", api_key)) from None
        except (OSError, httpx2.HTTPError, zlib.error, ValueError) as error:
            said = _without_key(_reason(error), api_key)
        failed += 1
        if not again(failed, said):
            raise NoAnswerError(f"{url} gave no answer: {said}")


def _without_key(text: str, api_key: str | None) -> str:
    return text.replace(api_key, "***") if api_key else text


def doubling(attempts: int, pause: float) -> Callable[[int, str], bool]:
    """For `ask`: so many attempts, with a pause between them that doubles.

    Args:
        attempts: in all.
        pause: before the second attempt, in seconds.

    Example:
        >>> again = doubling(attempts=3, pause=0.01)
        >>> [again(failed, "HTTP 503") for failed in (1, 2, 3)]
        [True, True, False]
    """

    def again(failed: int, said: str) -> bool:
        if failed >= attempts:
            return False
        time.sleep(pause * 2 ** (failed - 1))
        return True

    return again


def server_url(field: str, url: Any) -> str:
    """The address of a server without its last slash, once nothing in it is a secret.

    It is printed, logged and written into configurations, so it may hold no password and no key.

    Args:
        field: what gave it, as errors call it.
        url: up to and with the version, such as http://localhost:8000/v1.

    Raises:
        ValueError: it is no http or https address, or it holds a user name, a password, a query or a fragment, which
            the message does not repeat.

    Example:
        >>> server_url("teacher_url", "http://localhost:8000/v1/")
        'http://localhost:8000/v1'
        >>> server_url("teacher_url", "http://me:secret@localhost:8000/v1")
        Traceback (most recent call last):
        ValueError: teacher_url holds a user name or a password, which logs and records would show: leave it out, and \
give the server's key in an environment variable.
    """
    text = str(url)
    authority = text.partition("://")[2].partition("/")[0]
    if "@" in text.partition("?")[0].partition("#")[0] or "%" in authority.rpartition("]")[2]:  # %40 is an @
        raise ValueError(
            f"{field} holds a user name or a password, which logs and records would show: leave it out, and give the "
            "server's key in an environment variable."
        )
    if "?" in text or "#" in text:
        raise ValueError(f"{field} must end with the path, such as /v1: what follows a ? or a # may be a key.")
    if not isinstance(url, str) or not text.startswith(("http://", "https://")):
        raise ValueError(f"{field} must begin with http:// or https://, such as http://localhost:8000/v1.")
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and parts.port != 0
        httpx2.URL(text)
    except (ValueError, httpx2.InvalidURL):
        named = False
    if not named or text != "".join(text.split()) or not text.isprintable():
        raise ValueError(
            f"{field} is no address of a server, such as http://localhost:8000/v1 (what was given is not shown: it may "
            "hold a password)."
        )
    return text.rstrip("/")


def key_of(field: str, variable: str | None, url: str) -> str | None:
    """The key to send to a server; None where there is none for it.

    Args:
        field: what names the variable, as errors call it.
        variable: the environment variable that holds the key; None: OPENAI_API_KEY, for https://api.openai.com alone.
        url: of the server.

    Raises:
        ValueError: what was named is no variable, or it is not set, or holds what no header can.

    Example:
        >>> key_of("teacher_api_key_env", None, "http://localhost:8000/v1") is None
        True
    """
    if variable is None:
        ours = _origin(urlsplit(url)) == _ITS_ORIGIN
        key = os.environ.get(DEFAULT_KEY, "").strip() if ours else ""
        return key or None
    named = variable_name(field, variable)
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{field} names the environment variable {named}, which is not set: export it, or leave it.")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"the key in {named} ({field}) holds characters that no key has: a space, or no ASCII.")
    if url.startswith("http://") and not is_loopback(url):
        _warn_of_plain_http(field, named, _origin_text(url))
    return key


def variable_name(field: str, variable: Any) -> str:
    """The name of a variable that holds a key, as messages show it; no key that was given in its place is shown.

    Args:
        field: what names the variable, as errors call it.
        variable: its name.

    Raises:
        ValueError: it is no name that a variable may have; it is not repeated.

    Example:
        >>> variable_name("teacher_api_key_env", "MY_KEY")
        'MY_KEY'
        >>> variable_name("teacher_api_key_env", "sk-123")
        Traceback (most recent call last):
        ValueError: teacher_api_key_env must be the name of an environment variable, such as MY_KEY, and not the key: \
what was given (not shown) is no such name.
    """
    if not (isinstance(variable, str) and variable.isascii() and variable.isidentifier()):
        raise ValueError(
            f"{field} must be the name of an environment variable, such as MY_KEY, and not the key: what was given "
            "(not shown) is no such name."
        )
    return variable if variable.isupper() else f"{variable[:3]}..."  # hf_1a2b may be a key


def is_loopback(url: str) -> bool:
    """Whether a server is on this machine, so that nothing travels over a network.

    Example:
        >>> [is_loopback(f"http://{host}/v1") for host in ("localhost:8000", "127.0.0.1", "[::1]:1", "10.0.0.1")]
        [True, True, True, False]
    """
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@cache  # once per server
def _warn_of_plain_http(field: str, variable: str, origin: str) -> None:
    logger.warning(
        f"The key in {variable} ({field}) goes to {origin} over plain http: whoever carries the traffic can read it. "
        "Use https, or a tunnel to localhost."
    )


async def _exchange(
    url: str, payload: bytes | None, headers: dict[str, str], timeout: float, largest: int, told: int
) -> tuple[int, dict[str, str], bytes, int]:
    """One attempt: status, headers, the body (of an error its beginning), bytes of it as transferred."""
    try:
        async with asyncio.timeout(timeout):  # of everything together: a server that drips cannot outlive it
            async with (
                _client(url) as client,
                client.stream("GET" if payload is None else "POST", url, content=payload, headers=headers) as response,
            ):
                raw, received = await _body(url, response, largest if response.is_success else told)
                return response.status_code, dict(response.headers), raw, received
    except TimeoutError:
        raise TimeoutError(f"no whole answer within {timeout:g} seconds") from None


def _client(url: str) -> httpx2.AsyncClient:
    try:
        # a proxy named in the environment is for other machines
        return httpx2.AsyncClient(timeout=None, verify=_certificates(), trust_env=not is_loopback(url))
    except (httpx2.InvalidURL, ValueError, ImportError) as error:
        raise RefusedError(
            f"{url} cannot be asked through the proxy that the environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY): "
            f"{type(error).__name__}."
        ) from None  # its address may hold a password


async def _body(url: str, response: httpx2.Response, largest: int) -> tuple[bytes, int]:
    """The body unpacked, and its bytes as transferred; never more than `largest` of either, and packaging."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise RefusedError(f"{url} answers in the encoding {printable(encoding)!r:.40}, which was not asked for.")
    inflate = zlib.decompressobj(31) if encoding != "identity" else None
    whole, received = bytearray(), 0
    async for piece in response.aiter_raw():
        received += len(piece)
        while piece:
            if inflate is None:
                whole += piece
                piece = b""
            else:
                if inflate.eof:  # a gzip file may be several in a row
                    inflate = zlib.decompressobj(31)
                whole += inflate.decompress(piece, largest + 1 - len(whole))
                piece = inflate.unconsumed_tail or inflate.unused_data
            # gzip may send much that holds nothing
            if len(whole) > largest or received > largest + _PACKAGING:
                if not response.is_success:
                    return bytes(whole[:largest]), received
                raise RefusedError(f"{url} answers with more than {largest:,} bytes, which no answer to this needs.")
    if inflate is not None and not inflate.eof and received:
        raise ValueError("the compressed answer is cut off")
    return bytes(whole), received


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise WrongAnswerError("its JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        if _is_cut_off(error):
            raise
        begins = raw[: 4 * _SHOWN].decode("utf-8", "replace")
        raise WrongAnswerError(f"no JSON but {begins[:_SHOWN]!r}.") from error
    except ValueError as error:  # no UTF-8, or a number of thousands of digits
        raise WrongAnswerError(f"its JSON cannot be read: {str(error)[:_SAID]}") from error


def _is_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether more text could have made it JSON; an empty answer is cut off at its first byte."""
    rest = error.doc[error.pos :].strip()
    return error.msg.startswith("Unterminated") or any(literal.startswith(rest) for literal in _LITERALS)


def _wait_for(exchange: Coroutine[Any, Any, _Value]) -> _Value:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(exchange)
    with ThreadPoolExecutor(1) as own:  # a notebook has a loop in this thread
        return own.submit(asyncio.run, exchange).result()


def _reason(error: BaseException) -> str:
    """What went wrong, from the system's own error where there is one behind the client's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ConnectionError) and cause.errno:
        return f"{type(cause).__name__}: {os.strerror(cause.errno)}"
    return f"{type(error).__name__}: {printable(str(error))[:_SAID]}"


@cache
def _certificates() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


def _origin(parts: SplitResult) -> tuple[str, str, int | None]:
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme)


def _origin_text(url: str) -> str:
    """Scheme, host and port: what of an address is never a secret."""
    try:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        named = f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}"
    except ValueError:
        return "an address that is none"
    return printable(named) if parts.scheme and parts.hostname else "another path of the same server"
