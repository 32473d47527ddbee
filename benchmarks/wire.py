"""Bytes per token from a teacher on a real vLLM: likeliest tokens, the whole vocabulary, hidden states.

Starts vLLM twice over SmolLM2 (once for log-probabilities, once for hidden states) and asks each about the same tokens.
It needs an environment with vLLM (`make test-vllm` builds one) and the models of `python -m tipdistill.tasks smollm2`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoTokenizer

from tipdistill.provenance import environment
from tipdistill.tasks.smollm2 import NAME
from tipdistill.teachers.client import Question, TeacherClient, Traffic
from tipdistill.teachers.hidden import HiddenServer
from tipdistill.teachers.lm_head import read_lm_head
from tipdistill.teachers.served import TeacherServer

from . import measure

TEXT = (
    "Distillation trains a small model on what it writes itself. A large one says, for every token, how likely it "
    "would have been. The small one moves towards that. Most tokens are settled, and only a few teach something."
)
# tokens of the text that are sent, and of these the prompt's: a whole vocabulary takes megabytes for each
TOKENS, PROMPT = 16, 4
LONGEST_START = 600  # seconds
STATES = ("--runner", "pooling", "--pooler-config", '{"task": "token_embed"}')


@contextmanager
def serving(python: str, model: str, *options: str) -> Iterator[str]:
    """vLLM's server over a model; its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "teacher"]
    command += ["--max-model-len", "256", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), *options]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **quiet})
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    begun = time.monotonic()
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
        if process.poll() is not None or time.monotonic() - begun > LONGEST_START:
            log.seek(0)
            raise RuntimeError(f"vLLM does not answer: {log.read()[-2000:].decode(errors='replace')}")


def asked(server: TeacherClient, tokenizer: Any, question: Question) -> dict[str, float]:
    """What one answer takes, after the server has answered the questions of a start."""
    server.connect(tokenizer)
    server.traffic = Traffic()
    begun = time.perf_counter()
    server.ask([question])
    seconds = time.perf_counter() - begun
    traffic = server.traffic
    return {"bytes_per_token": traffic.received / traffic.answered, "seconds": seconds, "tokens": traffic.answered}


def run_wire(model: str, python: str) -> dict[str, Any]:
    """Bytes per token of each kind of answer.

    Args:
        model: the directory of SmolLM2.
        python: of an environment with vLLM.
    """
    tokenizer, lm_head = AutoTokenizer.from_pretrained(model), read_lm_head(model)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:TOKENS]
    question = Question(ids[:PROMPT], ids[PROMPT:], range(len(ids) - PROMPT))

    def states(url: str) -> TeacherClient:
        return HiddenServer(url, lm_head)

    forms: dict[str, tuple[tuple[str, ...], Callable[[str], TeacherClient]]] = {
        "top_20": (("--max-logprobs", "-1", "--dtype", "float32"), lambda url: TeacherServer(url, top_k=20)),
        "whole_vocabulary": (("--max-logprobs", "-1", "--dtype", "float32"), lambda url: TeacherServer(url, top_k=0)),
        "hidden_states_float32": ((*STATES, "--dtype", "float32"), states),
        "hidden_states_bfloat16": ((*STATES, "--dtype", "bfloat16"), states),
    }
    answers: dict[str, dict[str, float]] = {}
    for options in dict.fromkeys(options for options, _ in forms.values()):
        with serving(python, model, *options) as url:
            for form, (needed, make) in forms.items():
                if needed == options:
                    answers[form] = asked(make(url), tokenizer, question)
    vllm = subprocess.run(
        [python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
    )
    return {
        "benchmark": "wire",
        "preset": "smollm2",
        **environment("cpu", 1),
        "vllm": vllm.stdout.split()[-1],
        "model": {"name": NAME, "width": lm_head.width, "vocabulary": lm_head.rows},
        "answers": answers,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure what travels, and write the JSON."""
    parser = measure.parser("wire", __doc__)
    parser.add_argument("--model", default="runs/smollm2/models/teacher", help="SmolLM2's directory")
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="of an environment with vLLM")
    return measure.run("wire", run_wire, parser, argv)


if __name__ == "__main__":
    measure.end(main)
