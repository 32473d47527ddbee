"""What the compiler makes of the Triton kernels: registers, instructions and barriers, counted without a GPU.

An element is a pair of logits, the student's and the teacher's. Barriers are those that a program meets in one block of
columns: all of its warps wait for each other there.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from tipdistill.provenance import environment

from . import measure

CAPABILITIES = {80: "Ampere", 90: "Hopper"}
POINTERS = {
    **dict.fromkeys(("s_tile", "t_tile", "s_bias", "t_bias", "sums", "references", "of_rows"), "*fp32"),
    **dict.fromkeys(("larger_held", "difference_held"), "*fp16"),
    "values": "*bf16",
    "factor": "fp32",
    **dict.fromkeys(("token_ids", "kept"), "*i64"),
}
ALIGNED = (
    "start",
    "width",
    "tile_stride",
    "held_stride",
    "stride",
    "gradient_stride",
    "size",
)  # what a full tile's are
INTEGERS = (*ALIGNED, "sums_stride", "blocks", "rows")
STATISTICS = ("ENTROPY", "TEACHER_ENTROPY", "REVERSE", "FORWARD", "TOKENS")
OF_HEADS = ("S_BIAS", "T_BIAS", "S_CAPPED", "T_CAPPED", "S_SCALED", "T_SCALED")
ONLINE = (*STATISTICS, *OF_HEADS, "TEACHER", "SQUARES", "HOLD", "HOLD_HALF", "FULL")
# What the online kernel sums for a rule: what is True
ROLES = {
    "entropy": ("ENTROPY", "FULL"),
    "Soft-OR": ("ENTROPY", "TEACHER", "REVERSE", "FULL"),
    "gradient_norm": ("TEACHER", "REVERSE", "SQUARES", "FULL"),
    "fused reverse KL": ("ENTROPY", "TEACHER", "REVERSE", "HOLD", "HOLD_HALF", "FULL"),
    "everything, with bias and softcap": ONLINE[:-1],
}


def forms() -> Iterator[tuple[str, str, dict[str, str], dict[str, Any]]]:
    """(kernel, its role, types of what POINTERS leaves open, constants) of every form that matters.

    Example:
        >>> [role for kernel, role, _, _ in forms() if kernel == "_online_kernel"][:2]
        ['entropy', 'Soft-OR']
    """
    for role, flags in ROLES.items():
        yield "_online_kernel", role, {}, {name: name in flags for name in ONLINE}
    yield "_second_kernel", "jsd, hellinger, curvature", {}, {"MIXTURE": True, "HELLINGER": True, "CURVATURE": True}
    for kind, held in product(("reverse_kl", "forward_kl", "jsd"), (True, False)):
        logits = "*fp16" if held else "*fp32"
        types = {"s_logits": logits, "t_logits": logits, "gradient": "*bf16"}
        constants = dict.fromkeys(OF_HEADS, not held) | {"KIND": kind, "HELD": held}
        for chosen in (False, True) if held else (False,):
            role = f"{kind}, {'chosen' if chosen else 'held' if held else 'projected again'}"
            yield "_gradient_kernel", role, types, constants | {"KEPT": chosen}
    yield "_scale_kernel", "incoming scale", {"factor": "*fp32"}, {}
    # one token and one column: Triton makes a constant of an argument that is 1
    ones = dict.fromkeys(("width", "rows", "blocks"), 1)
    constants = dict.fromkeys(OF_HEADS, True) | {"KIND": "jsd", "HELD": False, "KEPT": False} | ones
    yield "_gradient_kernel", "one column", {"s_logits": "*fp32", "t_logits": "*fp32", "gradient": "*bf16"}, constants
    yield "_second_kernel", "one column", {}, {"MIXTURE": True, "HELLINGER": True, "CURVATURE": True} | ones
    ones = dict.fromkeys(("width", "sums_stride", "blocks"), 1)
    yield "_online_kernel", "one column", {}, {name: name != "FULL" for name in ONLINE} | ones


def shapes(kernel: str, engine: Any) -> list[tuple[int, int]]:
    """(columns, warps) that a program of the kernel is launched with.

    Args:
        kernel: its name.
        engine: the module `tipdistill.score.triton`.
    """
    if kernel == "_online_kernel":
        return [(engine.TILE.block, engine.TILE.warps), (engine.FEW.block, engine.FEW.warps)]
    if kernel == "_scale_kernel":
        return [(4096, 4)]
    return [(engine.WIDE, engine.WIDE_WARPS)]


def compiled(
    kernel: str, types: dict[str, str], constants: dict[str, Any], shape: tuple[int, int], capability: int
) -> dict[str, Any]:
    """Counts of one kernel's machine code.

    Args:
        kernel: its name in `tipdistill.score.triton`.
        types: of arguments that POINTERS leaves open.
        constants: the compile-time arguments, but for the block's size.
        shape: columns and warps of a program.
        capability: 80 or 90.

    Returns:
        registers of a thread, bytes spilled, instructions and barriers in all and of a block's loop, whether loads are
        vectors.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tipdistill.score import triton as engine

    function = getattr(engine, kernel)
    block, warps = shape
    names = function.arg_names
    constants = constants | {"BLOCK": block} | ({"HELD_BLOCK": engine.TILE.block} if "HELD_BLOCK" in names else {})
    types = POINTERS | dict.fromkeys(INTEGERS, "i32") | types
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ALIGNED]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    ptx, architecture = made.asm["ptx"], re.search(r"\.target (\w+)", made.asm["ptx"])
    assert architecture is not None
    tools = Path(triton.knobs.nvidia.ptxas.path)
    with tempfile.TemporaryDirectory() as folder:
        written, machine = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        written.write_text(ptx)
        command = [str(tools), "-v", f"--gpu-name={architecture[1]}", str(written), "-o", str(machine)]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [str(tools.with_name("nvdisasm")), "-c", str(machine)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spilled, registers = re.search(r"(\d+) bytes spill stores", words), re.search(r"Used (\d+) registers", words)
    assert spilled is not None
    assert registers is not None
    return {
        "registers": int(registers[1]),
        "spilled_bytes": int(spilled[1]),
        "vector_loads": bool(re.search(r"ld\.global\.v[48]", ptx)),
        **_counts(sass, block / (32 * warps)),
    }


def _counts(sass: str, of_thread: float) -> dict[str, float]:
    """Instructions and barriers, in all and in the longest loop; `of_thread`: elements of a thread in a block."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        if label:
            labels[label[1]] = len(code)
        elif re.match(r"\s+(/\*[0-9a-f]+\*/)?\s+[@A-Z]", line):
            code.append(line)
    loop: list[str] = []
    for place, line in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], place) < place and place - labels[target[1]] > len(loop):
            loop = code[labels[target[1]] : place + 1]
    block = loop or code
    return {
        "instructions": len(code),
        "instructions_of_an_element": len(block) / of_thread,
        "barriers": sum("BAR.SYNC" in line for line in code),
        "barriers_of_a_block": sum("BAR.SYNC" in line for line in block),
    }


def run_kernels(say: Callable[[str], None] = print) -> dict[str, Any]:
    """Compile every form of every kernel.

    Args:
        say: takes one line of progress.

    Raises:
        ValueError: Triton is told to interpret, so that nothing would be compiled.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set, and nothing is compiled then: unset it.")
    from tipdistill.score import triton as engine

    entries = []
    for kernel, role, types, constants in forms():
        for shape, capability in product(shapes(kernel, engine), CAPABILITIES):
            counts = compiled(kernel, types, constants, shape, capability)
            described = {"kernel": kernel, "role": role, "columns": shape[0], "warps": shape[1]}
            entries.append({**described, "capability": capability, **counts})
        say(f"{kernel}, {role}: {entries[-1]['registers']} registers")
    return {"benchmark": "kernels", "preset": "compiled", **environment("cpu", 1), "kernels": entries}


def main(argv: list[str] | None = None) -> int:
    """Compile the kernels and write the JSON.

    Raises:
        ValueError: as `run_kernels`.
    """
    return measure.run("kernels", run_kernels, measure.parser("kernels", __doc__), argv)


if __name__ == "__main__":
    measure.end(main)
