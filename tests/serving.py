"""A stand-in for a vLLM server that holds a teacher, on 127.0.0.1; its log-probabilities are a real model's."""

import json
import math
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Served:
    """How the server behaves, and what it was asked.

    `faults` are taken one per completions request, before it is answered: "refuse" (HTTP 500), "hang", "garbage" (no
    JSON), "empty" (JSON without prompt_logprobs), "cut" (the connection breaks in the middle), "nan"; None answers.
    """

    def __init__(self, model, tokenizer, max_logprobs=20):
        self.model, self.tokenizer, self.max_logprobs = model.eval(), tokenizer, max_logprobs
        self.lock = threading.Lock()
        self.faults, self.bodies, self.headers = [], [], []
        self.dead = False
        self.dies_after = None  # completions
        self.name, self.key, self.hang = "teacher", None, 0.3
        self.change = lambda body, reply: reply  # what a completions request is answered with instead

    def completions(self, body):
        k = body["prompt_logprobs"]
        size = self.model.config.vocab_size
        wanted = size if k == -1 else k
        if self.max_logprobs != -1 and wanted > self.max_logprobs:
            return 400, {"error": f"Requested prompt logprobs of {wanted}, which is greater than max allowed"}
        ids = body["prompt"]
        with torch.no_grad():
            log_p = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], -1)
        rows = [None]
        for place in range(1, len(ids)):
            values, order = log_p[place - 1].sort(descending=True)
            ranked = dict(zip(order.tolist(), values.tolist(), strict=True))
            row = {token: ranked[token] for token in [*order[:wanted].tolist(), ids[place]]}
            ranks = {token: rank + 1 for rank, token in enumerate(order.tolist())}
            rows.append({str(t): {"logprob": v, "rank": ranks[t], "decoded_token": "x"} for t, v in row.items()})
        return 200, {"choices": [{"text": "", "prompt_logprobs": rows}]}


@contextmanager
def serving(model, tokenizer, **settings):
    served = Served(model, tokenizer, **settings)

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status, reply, raw=None):
            payload = json.dumps(reply).encode() if raw is None else raw
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def do_GET(self):
            self._send(200, {"data": [{"id": name} for name in served.name.split(",")]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if served.dead:
                self._send(503, {"error": "gone"})
                return
            if self.path == "/tokenize":
                self._send(200, {"tokens": served.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]})
                return
            with served.lock:
                served.bodies.append(body)
                served.headers.append(dict(self.headers))
                fault = served.faults.pop(0) if served.faults else None
                if served.dies_after is not None and len(served.bodies) > served.dies_after:
                    served.dead = True
            if served.dead:
                self._send(503, {"error": "gone"})
            elif served.key is not None and self.headers.get("Authorization") != f"Bearer {served.key}":
                self._send(401, {"error": "wrong key"})
            elif fault == "refuse":
                self._send(500, {"error": "out of memory"})
            elif fault == "garbage":
                self._send(200, None, b"<html>502 Bad Gateway</html>")
            elif fault == "empty":
                self._send(200, {"choices": [{"text": ""}]})
            elif fault == "cut":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 500\r\n\r\n{")
            else:
                if fault == "hang":
                    time.sleep(served.hang)
                with served.lock:
                    status, reply = served.completions(body)
                    reply = served.change(body, reply)
                if fault == "nan":
                    row = reply["choices"][0]["prompt_logprobs"][-1]
                    row[next(iter(row))]["logprob"] = math.nan
                if fault == "logits":
                    for row in reply["choices"][0]["prompt_logprobs"][1:]:
                        for value in row.values():
                            value["logprob"] += 5.0
                with suppress(BrokenPipeError, ConnectionResetError):  # nobody waited for it
                    self._send(status, reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
