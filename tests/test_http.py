"""One client for every server: what is asked again, what is final, and what was sent and received."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tipdistill.http import Answer, NoAnswerError, RefusedError, ask, doubling


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
            for name, value in {"Content-Length": str(len(payload)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
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
        (200, b"<html>", {}),
        (200, b'{"other": 1}', {}),
        (200, b'{"tokens": null}', {}),
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
