"""The settings of a training that is short, runs on a CPU and leaves nothing but its log."""

from __future__ import annotations

from typing import Any

ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}
