"""What golden runs gave, held against golden.json."""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parent / "golden" / "golden.json"
WRITES = os.environ.get("TIPDISTILL_GOLDEN") == "write"


def machine():
    """What bits depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = "unknown"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {"processor": f"{processor} {torch.backends.cpu.get_cpu_capability()}", **versions}


def hold(name, found):
    """Compare with what was written down under a name, or write it down."""
    found = json.loads(json.dumps(found))
    if WRITES:
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        known[name] = {"machine": machine(), "gave": found}
        FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return
    known = json.loads(FILE.read_text())[name]
    if known["machine"] == machine():
        assert found == known["gave"]
    else:
        assert close(found, known["gave"])


def close(found, known):
    """Numbers within the rounding of float32 sums in another order; text, which is hashes, is not compared."""
    if isinstance(known, dict):
        return found.keys() == known.keys() and all(close(found[name], known[name]) for name in known)
    if isinstance(known, list):
        return len(found) == len(known) and all(map(close, found, known))
    if isinstance(known, float):
        return found == pytest.approx(known, rel=2e-2, abs=1e-4)
    return isinstance(found, type(known))


def digest(*tensors):
    """A hash of the bits of tensors, None among them."""
    value = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            value.update(b"none")
        else:
            tensor = tensor.detach().cpu().contiguous().reshape(-1)
            value.update(f"{tensor.dtype} {tensor.numel()}".encode())
            value.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return value.hexdigest()[:16]


def weights(model):
    """A hash of all parameters and buffers."""
    return digest(*(value for _, value in sorted(model.state_dict().items())))
