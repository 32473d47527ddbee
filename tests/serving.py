"""A stand-in for a vLLM server that holds a teacher, on 127.0.0.1; what it answers is a real model's.

It gives log-probabilities (/v1/completions) and hidden states (/pooling), which one vLLM does one of at a time.
"""

import json
import math
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Served:
    """How the server behaves, and what it was asked.

    `faults` are taken one per question, before it is answered: "refuse" (HTTP 500), "hang", "garbage" (a web page),
    "empty" (JSON without prompt_logprobs), "cut" (the connection breaks in the middle), "short" (it ends before its
    bytes do), "nan"; None answers.
    """

    def __init__(self, model, tokenizer, max_logprobs=20):
        self.model, self.tokenizer, self.max_logprobs = model.eval(), tokenizer, max_logprobs
        self.lock = threading.Lock()
        self.faults, self.bodies, self.headers = [], [], []
        self.dead = False
        self.dies_after = None  # questions
        self.name, self.key, self.hang = "teacher", None, 0.3
        self.change = lambda body, reply: reply  # what a question is answered with instead
        self.states = lambda hidden: hidden  # what becomes of hidden states [L, H]

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

    def pooling(self, body):
        """(metadata, bytes) of the last hidden states, as vLLM 0.32 answers."""
        assert (body["task"], body["encoding_format"], body["endianness"]) == ("token_embed", "bytes", "little")
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[body["embed_dtype"]]
        with torch.no_grad():
            hidden = self.model.get_decoder()(torch.tensor([body["input"]])).last_hidden_state[0]
        if body["use_activation"]:
            hidden = torch.nn.functional.normalize(hidden, dim=-1)
        hidden = self.states(hidden.float())
        raw = bytes(hidden.to(dtype).contiguous().view(torch.uint8).flatten().tolist())
        entry = {"index": 0, "embed_dtype": body["embed_dtype"], "endianness": "little", "start": 0, "end": len(raw)}
        return {"data": [entry | {"shape": list(hidden.shape)}]}, raw


@contextmanager
def serving(model, tokenizer, **settings):
    served = Served(model, tokenizer, **settings)

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status, reply, raw=None, metadata=None):
            payload = json.dumps(reply).encode() if raw is None else raw
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            if metadata is not None:
                self.send_header("metadata", metadata if isinstance(metadata, str) else json.dumps(metadata))
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
            elif fault == "short" and self.path != "/pooling":
                self._send(200, None, b'{"choices": [{"te')
            else:
                if fault == "hang":
                    time.sleep(served.hang)
                if self.path == "/pooling":
                    self._pool(body, fault)
                    return
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

        def _pool(self, body, fault):
            if served.pooling is None:  # a server of log-probabilities alone
                self._send(404, {"detail": "Not Found"})
                return
            with served.lock:
                metadata, raw = served.change(body, served.pooling(body))
            with suppress(BrokenPipeError, ConnectionResetError):  # nobody waited for it
                self._send(200, None, raw[:-7] if fault == "short" else raw, metadata)

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
