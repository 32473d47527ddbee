"""What a GPU can do: the rates that a plan's seconds rest on."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from ..documents import read_yaml
from ..text import check_known, nearest


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU. The utilizations and `kernel_launch` are assumptions, not measurements.

    Attributes:
        flops: dense bfloat16 flops per second, peak.
        bandwidth: bytes per second of its memory.
        link: bytes per second to the GPUs of its node, one direction.
        network: bytes per second to other nodes.
        memory_gib: what it has.
        utilization: share of the peak that models reach.
        head_utilization: share of the peak that the lm_heads reach.
        bandwidth_utilization: share of `bandwidth` and of the links that is reached.
        kernel_launch: seconds per decoder layer and token that transformers' `generate` takes at least.
        node: GPUs that share `link`.

    Raises:
        ValueError: a rate that is not a positive number, or a share above 1.
    """

    flops: float
    bandwidth: float
    link: float
    network: float
    memory_gib: float
    utilization: float = 0.4
    head_utilization: float = 0.6
    bandwidth_utilization: float = 0.7
    kernel_launch: float = 5e-4
    node: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{field.name} of a machine must be a positive number, got {value!r}.")
            if field.name.endswith("utilization") and value > 1:
                raise ValueError(f"{field.name} of a machine is a share of the peak, at most 1, got {value}.")


# Peaks as in the vendor's data sheets (dense bf16, SXM); one 400 Gbit/s network port per GPU, 200 for the A100.
MACHINES = {
    "h100": Machine(flops=989e12, bandwidth=3.35e12, link=450e9, network=50e9, memory_gib=80),
    "h200": Machine(flops=989e12, bandwidth=4.8e12, link=450e9, network=50e9, memory_gib=141),
    "a100": Machine(flops=312e12, bandwidth=2.04e12, link=300e9, network=25e9, memory_gib=80),
}


def read_machine(name: str) -> Machine:
    """A machine by its name in `MACHINES`, or of a YAML file with the fields of `Machine`.

    Args:
        name: a key of `MACHINES`, or a path that ends in .yaml or .yml. The file's `base` names a machine of `MACHINES`
            that it changes; without one it gives flops, bandwidth, link, network and memory_gib itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name or field (the nearest is given), a field that is missing, or a rate that cannot be.

    Example:
        >>> read_machine("a100").memory_gib
        80
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if name not in MACHINES:
            known = ", ".join(MACHINES)
            raise ValueError(
                f"there is no machine {name!r}; there are {known}, and FILE.yaml.{nearest(name, MACHINES)}"
            )
        return MACHINES[name]
    if not path.is_file():
        raise FileNotFoundError(f"there is no machine file {path}.")
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a mapping of a machine's fields to numbers, got {type(given).__name__}.")
    base = given.pop("base", None)
    try:
        if base is not None:
            check_known("base", base, MACHINES)
        for key in given:
            check_known("a field of a machine", key, [field.name for field in fields(Machine)])
        rates = {**(vars(MACHINES[base]) if base is not None else {}), **{key: _number(given[key]) for key in given}}
        missing = [field.name for field in fields(Machine) if field.default is MISSING and field.name not in rates]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} must be given, or a `base` of {', '.join(MACHINES)} to take them from."
            )
        return Machine(**rates)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _number(value: object) -> object:
    """YAML reads 1e12 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
