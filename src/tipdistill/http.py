"""JSON over HTTP, asked again while asking again can help; the standard library alone.

What passes by itself is asked again: no connection, a time-out, an answer that is cut off or makes no sense (a proxy's
error page), an error of the server's own (5xx), and 408, 425 and 429, by which a server says that it is busy. Any other
4xx is final. How long to wait, and when to give up, is the caller's to say.
"""

from __future__ import annotations

import gzip
import json
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, NamedTuple

# request timeout, too early, too many requests
BUSY = (408, 425, 429)
_SAID = 500  # bytes of an error's body that are told


class RefusedError(ValueError):
    """The server answered, and asking again would not change the answer."""


class NoAnswerError(OSError):
    """The server gave no usable answer, and is not asked again."""


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
) -> Answer:
    """Send a request until it is answered.

    Args:
        url: with its scheme.
        body: sent as JSON (POST); None: a GET.
        again: called with how many attempts have failed and what went wrong last; waits, and says whether to ask again.
            `doubling` makes one.
        read: JSON answer → value. A ValueError, KeyError, IndexError or TypeError says that it is no answer.
        api_key: sent as a bearer token.
        timeout: of one attempt, in seconds.

    Raises:
        RefusedError: a 4xx that is final, with what the server said.
        NoAnswerError: `again` gave up; with what went wrong last.

    Example:
        >>> ask("http://127.0.0.1:9", again=doubling(attempts=2, pause=0.01))
        Traceback (most recent call last):
        tipdistill.http.NoAnswerError: http://127.0.0.1:9 gave no answer: ConnectionRefusedError: ...
    """
    payload = None if body is None else json.dumps(body, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    failed = 0
    while True:
        try:
            request = urllib.request.Request(url, payload, headers)
            with urllib.request.urlopen(request, timeout=timeout) as response:
                raw = response.read()
                text = gzip.decompress(raw) if response.headers.get("Content-Encoding") == "gzip" else raw
            return Answer(read(json.loads(text)), len(payload or b""), len(raw))
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code}: {error.read(_SAID).decode(errors='replace')}"
            if error.code < 500 and error.code not in BUSY:
                raise RefusedError(f"{url} refused the request: {said}") from error
        except (OSError, EOFError, zlib.error, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            reason = getattr(error, "reason", error)  # urllib wraps what happened to the connection
            said = f"{type(reason if isinstance(reason, Exception) else error).__name__}: {reason}"
        failed += 1
        if not again(failed, said):
            raise NoAnswerError(f"{url} gave no answer: {said}")


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
