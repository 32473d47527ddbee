"""The examples run as a stranger would run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_plain_pytorch_lowers_the_divergence_on_half_of_the_tokens():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "plain_pytorch.py"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"divergence (\d+\.\d+) nats per token, trained on (\d+) of (\d+)", done.stdout)
    divergences = [float(divergence) for divergence, _, _ in lines]
    assert len(divergences) == 9
    assert min(divergences[-3:]) < 0.8 * divergences[0]
    assert {int(kept) / int(tokens) for _, kept, tokens in lines} == {0.5}


def test_plain_pytorch_uses_public_names_only_and_stays_short():
    source = (EXAMPLES / "plain_pytorch.py").read_text(encoding="utf-8")
    import tipdistill

    used = set(re.findall(r"\btip\.(\w+)", source))
    assert {"Head", "token_scores", "select", "selected_loss"} <= used <= set(tipdistill.__all__)
    assert "Trainer" not in source
    assert len(source.splitlines()) <= 70
