"""A tiny OpenAI-compatible server on 127.0.0.1 that answers sums."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Stub:
    """What was asked (a body each), and how the server behaves."""

    def __init__(self):
        self.lock = threading.Lock()
        self.bodies = []
        self.headers = []
        self.seconds = 0.0
        self.dies_after = None
        self.status = 500
        self.unknown = None
        self.answer = lambda body: None


def summed(body, chat):
    """An answer with the sum that the prompt asks for."""
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    a, b = re.search(r"(\d+) \+ (\d+)", prompt).groups()
    total = int(a) + int(b) + (body["seed"] % 2 if "odd" in prompt else 0)
    text = rf"So \boxed{{{total}}}."
    choice = {"finish_reason": "stop", **({"message": {"content": text}} if chat else {"text": text})}
    return {"choices": [choice], "usage": {"completion_tokens": min(len(text), body["max_tokens"])}}


@pytest.fixture
def stub_server():
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.bodies.append(body)
                stub.headers.append(dict(self.headers))
                number = len(stub.bodies)
            time.sleep(stub.seconds)
            if stub.dies_after is not None and number > stub.dies_after:
                if stub.status is None:  # the connection breaks in the middle
                    self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 500\r\n\r\n{")
                    return
                self.send_error(stub.status)
                return
            if stub.unknown in body:
                self.send_error(400, f"Unrecognized request argument supplied: {stub.unknown}")
                return
            reply = stub.answer(body) or summed(body, chat=self.path.endswith("/chat/completions"))
            payload = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
