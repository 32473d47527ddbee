"""Where a figure comes from: machine, versions, commit and day, for every file that holds measured numbers."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("tipdistill", "torch", "transformers", "trl", "triton", "liger-kernel", "numpy")


def environment(device: str, threads: int) -> dict[str, Any]:
    """The machine, the versions and the commit that a result was measured on.

    Args:
        device: "cpu" or "cuda".
        threads: torch's threads.

    Example:
        >>> sorted(environment("cpu", 1))
        ['commit', 'hardware', 'measured', 'versions']
    """
    hardware: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }
    return {
        "hardware": hardware,
        "versions": versions(),
        "commit": _commit(),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of those of the packages that are installed.

    Args:
        packages: as an installer calls them.

    Example:
        >>> list(versions(["numpy", "no-such-package"]))
        ['python', 'numpy']
    """
    installed = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit of the checkout this package lies in, "+" behind it where files were changed; None when installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", "--", "."], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
