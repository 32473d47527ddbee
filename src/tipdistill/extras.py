"""Packages that are wanted only when they are asked for, and the command that installs each."""

from __future__ import annotations

import importlib.util

# field that asks for a package: (module, pip command)
EXTRAS = {
    "use_peft": ("peft", 'pip install "tipdistill[peft]"'),
    "use_vllm": ("vllm", 'pip install "tipdistill[vllm]"'),
    "deepspeed": ("deepspeed", 'pip install "tipdistill[deepspeed]"'),
    "load_in_4bit": ("bitsandbytes", "pip install bitsandbytes"),
    "load_in_8bit": ("bitsandbytes", "pip install bitsandbytes"),
}


def require(module: str, asked_by: str, command: str) -> None:
    """Raise an ImportError that names the pip command where `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{asked_by} needs the package {module}, which is not installed: {command}")
