"""One client for every server: what is asked again, what is final, and what was sent and received."""

import asyncio
import gzip
import json
import logging
import socket
import threading
import time
import tracemalloc
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tipdistill import http
from tipdistill.http import Answer, NoAnswerError, RefusedError, WrongAnswerError, ask, doubling, key_of, server_url


class Server:
    """Answers from a list of (status, body, headers); the last one again and again. `asked` keeps what came."""

    def __init__(self):
        self.answers, self.asked = [(200, b"{}", {})], []


@pytest.fixture
def server():
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.reply(self.rfile.read(int(self.headers["Content-Length"])))

        def do_GET(self):
            self.reply(None)

        def reply(self, body):
            state.asked.append((self.command, body, dict(self.headers)))
            status, payload, headers = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            self.send_response(status)
            length = {"Content-Length": str(len(payload))} if isinstance(payload, bytes) else {}
            for name, value in {**length, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for piece in [payload] if isinstance(payload, bytes) else payload:
                with suppress(OSError):  # nobody waited for it
                    self.wfile.write(piece)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{listening.server_port}/v1"
    yield state
    listening.shutdown()
    listening.server_close()


AGAIN = doubling(attempts=4, pause=0.001)
GOOD = (200, b'{"tokens": [1, 2]}', {})
PACKED = gzip.compress(b'{"tokens": [1, 2]}', mtime=0)


def test_a_body_is_posted_as_json_and_none_is_a_get(server):
    ask(server.url, {"prompt": "½"}, again=AGAIN, api_key="secret")
    ask(server.url, again=AGAIN)
    (posted, body, headers), (got, none, bare) = server.asked
    assert (posted, json.loads(body), got, none) == ("POST", {"prompt": "½"}, "GET", None)
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in bare


def test_bytes_are_counted_as_they_went_over_the_wire(server):
    server.answers = [GOOD]
    assert ask(server.url, {"a": 1}, again=AGAIN) == Answer({"tokens": [1, 2]}, len('{"a":1}'), len(GOOD[1]))
    server.answers = [(200, PACKED, {"Content-Encoding": "gzip"})]
    assert ask(server.url, again=AGAIN) == Answer({"tokens": [1, 2]}, 0, len(PACKED))


@pytest.mark.parametrize(
    "fault",
    [
        (500, b"oops", {}),
        (503, b"", {}),
        (408, b"", {}),
        (425, b"", {}),
        (429, b"slow down", {}),
        (200, b"", {}),
        (200, b'{"tokens": [1', {}),
        (200, b'{"tokens": nul', {}),
        (200, b'{"tok', {"Content-Length": "99"}),
        (200, PACKED[:-9], {"Content-Encoding": "gzip"}),
        (200, b"\x1f\x8bnonsense", {"Content-Encoding": "gzip"}),
    ],
    ids=lambda fault: f"{fault[0]} {fault[1][:12]!r}",
)
def test_what_passes_by_itself_is_asked_again(server, fault):
    server.answers = [fault, fault, GOOD]
    assert ask(server.url, again=AGAIN, read=lambda reply: sum(reply["tokens"])).value == 3
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_final_and_says_why(server, status):
    server.answers = [(status, b"no such model", {})]
    with pytest.raises(RefusedError, match=rf"{server.url} refused the request: HTTP {status}: no such model"):
        ask(server.url, again=AGAIN)
    assert len(server.asked) == 1


def test_the_caller_says_when_to_give_up(server):
    server.answers = [(503, b"busy", {})]
    heard = []

    def again(failed, said):
        heard.append((failed, said))
        return failed < 3

    with pytest.raises(NoAnswerError, match="gave no answer: HTTP 503: busy"):
        ask(server.url, again=again)
    assert heard == [(failed, "HTTP 503: busy") for failed in (1, 2, 3)]
    assert len(server.asked) == 3


def test_an_error_of_the_caller_passes_through(server):
    server.answers = [(503, b"", {})]

    def again(failed, said):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(server.url, again=again)


# Where a key goes.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("body", [None, {"prompt": "a"}], ids=["GET", "POST"])
def test_a_redirect_is_not_followed_and_its_target_named(server, status, body):
    server.answers = [(status, b"", {"Location": "http://me:pass@other.example:81/v1?key=abc"})]
    with pytest.raises(
        RefusedError, match=rf"sends requests on to http://other\.example:81 \(HTTP {status}\)"
    ) as raised:
        ask(server.url, body, again=AGAIN, api_key="secret")
    assert not {"pass", "abc", "secret"} & set(str(raised.value).replace(":", " ").replace("=", " ").split())
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "location", ["/elsewhere", "", "http://[::bad", "\x1b[31m"], ids=["path", "none", "bad", "escape"]
)
def test_a_redirect_to_anywhere_is_one_line(server, location):
    server.answers = [(302, b"", {"Location": location})]
    with pytest.raises(RefusedError, match="redirects are not followed") as raised:
        ask(server.url, again=AGAIN)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://api.openai.com/v1", "abc"),
        ("https://api.openai.com:443/v1", "abc"),
        ("http://api.openai.com/v1", None),
        ("https://api.openai.com:8443/v1", None),
        ("https://api.openai.com.evil.example/v1", None),
        ("https://evil.example/api.openai.com", None),
        ("http://localhost:8000/v1", None),
    ],
)
def test_the_default_key_goes_to_its_own_host_alone(monkeypatch, url, key):
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    assert key_of("teacher_api_key_env", None, url) == key


def test_a_key_that_was_named_is_sent_and_over_plain_http_not_without_a_word(monkeypatch, caplog):
    monkeypatch.setenv("MINE", " abc\n")
    http._warn_of_plain_http.cache_clear()
    with caplog.at_level(logging.WARNING):
        for url in ("https://host.example/v1", "http://localhost:1/v1", "http://127.0.0.1/v1", "http://[::1]:2/v1"):
            assert key_of("api_key_env", "MINE", url) == "abc"
        assert caplog.text == ""
        assert key_of("api_key_env", "MINE", "http://host.example:8000/v1") == "abc"
    assert "The key in MINE (api_key_env) goes to http://host.example:8000 over plain http" in caplog.text
    assert "abc" not in caplog.text
    for value in ("", "a b", "a\x7fb", "schlüssel"):
        monkeypatch.setenv("MINE", value)
        with pytest.raises(ValueError, match="MINE") as raised:
            key_of("api_key_env", "MINE", "https://host.example/v1")
        assert not value or value not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://me:hunter2@host/v1", "https://hunter2@host/v1", "http://me:hunter2@[::1]:8/v1", "me:hunter2@host"),
        *("http://host/v1?key=hunter2", "http://host/v1#hunter2", "ftp://me:hunter2@host", "http://me:hunt@er2@host/"),
        *("http://me:hun/ter2@host/v1", "http://me:hunter2@host:999999/v1"),
    ],
    ids=str,
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="teacher_url") as raised:
        server_url("teacher_url", url)
    assert not any(part in str(raised.value) for part in ("hunter2", "hunt", "er2@", "ter2"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "http://",
        "http:///v1",
        "http://a:b/v1",
        "http://a:0",
        "http://a b/",
        "http://a\x1b/",
        5,
        None,
    ],
)
def test_what_is_no_address_is_refused_in_a_printable_line(url):
    with pytest.raises(ValueError, match="base_url") as raised:
        server_url("base_url", url)
    assert str(raised.value).isprintable()


def test_a_proxy_is_not_asked_for_a_server_of_this_machine(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(server.url, again=AGAIN).value == {}
    with pytest.raises(NoAnswerError):
        ask("http://192.0.2.1/v1", again=doubling(1, 0), timeout=5)  # by the proxy, which is not there
    monkeypatch.setenv("HTTP_PROXY", "nonsense://x")
    monkeypatch.setenv("http_proxy", "nonsense://x")
    with pytest.raises(ValueError, match="cannot be asked"):
        ask("http://192.0.2.1/v1", again=doubling(1, 0), timeout=5)


def test_netrc_is_not_read(server, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    ask(server.url, again=AGAIN)
    assert "Authorization" not in server.asked[0][2]


# How long an answer may take, and how large it may be.


def dripping(seconds):
    for _ in range(round(seconds / 0.05)):
        time.sleep(0.05)
        yield b" "


def test_a_server_that_drips_does_not_outlive_the_limit(server):
    server.answers = [(200, dripping(3), {})]
    started = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"TimeoutError: no whole answer within 0\.3 seconds"):
        ask(server.url, again=doubling(1, 0), timeout=0.3)
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nX-Long: "], ids=["nothing", "headers"])
def test_the_limit_covers_headers_and_a_server_that_says_nothing(sent):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def serve():
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(sent)
                while not over.wait(0.05):
                    connection.sendall(b"x" if sent else b"")

        thread = threading.Thread(target=serve)
        thread.start()
        started = time.monotonic()
        with pytest.raises(NoAnswerError, match="no whole answer"):
            ask(f"http://127.0.0.1:{listening.getsockname()[1]}", again=doubling(1, 0), timeout=0.3)
        assert time.monotonic() - started < 1.5
        over.set()
        thread.join()


def test_an_answer_that_unpacks_to_too_much_is_refused_without_being_held(server):
    piece = gzip.compress(b" " * 2**20, mtime=0)
    server.answers = [(200, piece * 300, {"Content-Encoding": "gzip"})]  # 300 MB of 300 kB
    tracemalloc.start()
    with pytest.raises(RefusedError, match=rf"{server.url} answers with more than 8,388,608 bytes"):
        ask(server.url, again=AGAIN, largest=8 * 2**20)
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_plain_answer_is_limited_too(server, status):
    server.answers = [(status, b"x" * 100_000, {})]
    with pytest.raises((RefusedError, NoAnswerError)) as raised:
        ask(server.url, again=doubling(1, 0), largest=1000)
    assert len(str(raised.value)) < 800


@pytest.mark.parametrize("status", [200, 503])
def test_packaging_that_holds_nothing_is_limited_too(server, status):
    member = gzip.compress(b"", mtime=0)
    server.answers = [(status, member * 10_000, {"Content-Encoding": "gzip"})]
    with pytest.raises((RefusedError, NoAnswerError)) as raised:
        ask(server.url, again=doubling(1, 0), largest=1000)
    said = "answers with more than 1,000 bytes" if status == 200 else "HTTP 503"
    assert said in str(raised.value)


def test_gzip_in_several_members_is_whole(server):
    packed = gzip.compress(b'{"tokens"', mtime=0) + gzip.compress(b": [3]}", mtime=0)
    server.answers = [(200, packed, {"Content-Encoding": "gzip"})]
    assert ask(server.url, again=AGAIN) == Answer({"tokens": [3]}, 0, len(packed))


@pytest.mark.parametrize(
    ("payload", "headers", "message"),
    [
        (b"[" * 200_000, {}, "nested too deeply"),
        (b'{"a": "\xff"}', {}, "cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", {}, "cannot be read"),
        (b"{}", {"Content-Encoding": "br"}, "in the encoding 'br'"),
        (b"<html>\x1b[31m" + b"x" * 10**6, {}, r"no JSON but '<html>\\x1b.{1,80}$"),
        (b"\xff<html>", {}, "cannot be read"),
        (b"{'tokens': [1]}", {}, "no JSON but"),
        (b'{"tokens": [1]} {}', {}, "no JSON but"),
    ],
    ids=["deep", "latin-1", "digits", "brotli", "page", "latin-1 page", "python", "two"],
)
def test_json_that_cannot_be_used_is_final(server, payload, headers, message):
    server.answers = [(200, payload, headers)]
    with pytest.raises(RefusedError, match=rf"{server.url} .*{message}"):
        ask(server.url, again=AGAIN)
    assert len(server.asked) == 1


def test_a_reader_says_that_an_answer_is_final(server):
    def read(reply):
        raise WrongAnswerError("a token of \x1b[31m")

    with pytest.raises(RefusedError, match=r"gives a wrong answer: a token of \\x1b"):
        ask(server.url, again=AGAIN, read=read)


def test_what_a_server_says_is_shown_without_its_escapes(server):
    server.answers = [(400, b"\x1b]0;owned\x07no such model", {})]
    with pytest.raises(RefusedError, match="no such model") as raised:
        ask(server.url, again=AGAIN)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("status", [200, 401, 503])
@pytest.mark.parametrize("before", [0, 470, 495])
def test_a_key_that_a_server_repeats_is_not_told(server, status, before):
    key = "sk-" + "hunter2" * 6
    server.answers = [(status, b"." * before + f"Bearer {key}, {key}".encode() + b"." * 600, {})]
    heard = []
    with pytest.raises((RefusedError, NoAnswerError)) as raised:
        ask(server.url, again=lambda _, said: bool(heard.append(said)), api_key=key)
    assert "sk-" not in "".join([str(raised.value), *heard])
    assert "hunter" not in "".join([str(raised.value), *heard])


def test_a_reader_that_repeats_the_key_does_not_tell_it(server):
    def read(reply):
        raise WrongAnswerError("a token of sk-hunter2")

    with pytest.raises(RefusedError, match=r"a token of \*\*\*"):
        ask(server.url, again=AGAIN, read=read, api_key="sk-hunter2")


@pytest.mark.parametrize("given", ["sk-hunter2", "hunter2 x", "1hunter2", "", "hunter2é", 7])
def test_a_key_in_the_place_of_its_variable_is_not_repeated(given):
    with pytest.raises(ValueError, match="must be the name of an environment variable") as raised:
        key_of("teacher_api_key_env", given, "http://localhost/v1")
    assert "hunter" not in str(raised.value)


def test_a_key_that_could_be_a_variables_name_is_not_repeated_whole():
    with pytest.raises(ValueError, match=r"environment variable hf_\.\.\., which is not set") as raised:
        key_of("teacher_api_key_env", "hf_hunter2", "http://localhost/v1")
    assert "hunter" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://u:SECRETPW%40host/v1", "u:SECRETPW%40h", "http://h:SECRETPW/v1", "https://u%3ASECRETPW%40host/v1"),
        *("SECRETPW", "http:/u:SECRETPW/v1", "http://[SECRETPW/v1", "ftp://SECRETPW", "http://SECRETPW h/v1"),
    ],
)
def test_an_address_that_is_none_is_not_repeated(url):
    with pytest.raises(ValueError, match=r"^teacher_url ") as raised:
        server_url("teacher_url", url)
    assert "SECRETPW" not in str(raised.value)


def test_it_works_where_a_loop_runs_already(server):
    async def notebook():
        return ask(server.url, again=AGAIN).value

    assert asyncio.run(notebook()) == {}
