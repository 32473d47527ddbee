"""The Triton kernels through the whole compiler, down to machine code for real GPUs: this needs the wheel and no GPU.

What the interpreter lets pass and a GPU does not (types, layouts, shapes), and what costs time without being wrong
(registers that spill to memory, loads that are not vectors), shows here.
"""

import json
import os
import re
import subprocess
import sys
from itertools import product

import pytest

pytest.importorskip("triton", reason="triton is built for Linux")

POINTERS = {
    **dict.fromkeys(("s_tile", "t_tile", "s_bias", "t_bias", "sums", "references", "of_rows"), "*fp32"),
    **dict.fromkeys(("larger_held", "difference_held"), "*fp16"),
    "token_ids": "*i64",
}
ALIGNED = ("start", "width", "tile_stride", "held_stride", "stride", "gradient_stride")  # what a full tile's are
INTEGERS = (*ALIGNED, "sums_stride", "blocks", "rows")
STATISTICS = ("ENTROPY", "TEACHER_ENTROPY", "REVERSE", "FORWARD", "TOKENS")
OF_HEADS = ("S_BIAS", "T_BIAS", "S_CAPPED", "T_CAPPED")


def kernels():
    """(kernel, types of what the table above leaves open, constants) in the forms that matter."""
    for squares, hold, heads in ((False, False, False), (True, True, False), (True, False, True)):
        constants = dict.fromkeys(STATISTICS, True) | dict.fromkeys(OF_HEADS, heads)
        yield "_online_kernel", {}, constants | {"TEACHER": True, "SQUARES": squares, "HOLD": hold, "HOLD_HALF": hold}
    constants = dict.fromkeys((*STATISTICS, *OF_HEADS, "TEACHER", "SQUARES", "HOLD", "HOLD_HALF"), False)
    yield "_online_kernel", {}, constants | {"ENTROPY": True}
    yield "_second_kernel", {}, {"MIXTURE": True, "HELLINGER": True, "CURVATURE": True}
    for kind, held in product(("reverse_kl", "forward_kl", "jsd"), (True, False)):
        logits = "*fp16" if held else "*fp32"
        types = {"s_logits": logits, "t_logits": logits, "gradient": "*bf16"}
        yield "_gradient_kernel", types, dict.fromkeys(OF_HEADS, not held) | {"KIND": kind, "HELD": held}
    # one token and one column: Triton makes a constant of an argument that is 1
    ones = dict.fromkeys(("width", "rows", "blocks"), 1)
    yield "_gradient_kernel", types, dict.fromkeys(OF_HEADS, True) | {"KIND": "jsd", "HELD": False} | ones
    yield "_second_kernel", {}, {"MIXTURE": True, "HELLINGER": True, "CURVATURE": True} | ones
    flags = dict.fromkeys((*STATISTICS, *OF_HEADS, "TEACHER", "SQUARES", "HOLD", "HOLD_HALF"), True)
    yield "_online_kernel", {}, flags | dict.fromkeys(("width", "sums_stride", "blocks"), 1)


def compile_all():
    """Machine code of every form for the default tile, as the last process of this file: [name, ptx, ptxas's words]."""
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tipdistill.score import triton as engine

    found = []
    for name, types, constants in kernels():
        kernel = getattr(engine, name)
        names = kernel.arg_names
        constants = constants | {"BLOCK": engine.TILE.block}
        types = POINTERS | dict.fromkeys(INTEGERS, "i32") | types
        signature = {arg: "constexpr" if arg in constants else types.get(arg, "fp32") for arg in names}
        aligned = [i for i, arg in enumerate(names) if signature[arg][0] == "*" or arg in ALIGNED]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(arg),): value for arg, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        for capability in (80, 90):
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options={"num_warps": engine.TILE.warps})
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(compiled.asm["ptx"])
                file.flush()
                architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
                ptxas = subprocess.run(
                    [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={architecture}", file.name, "-o", os.devnull],
                    capture_output=True,
                    text=True,
                    check=True,
                )
            found.append([f"{name} {constants} sm_{capability}", compiled.asm["ptx"], ptxas.stderr])
    return found


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper_without_spills():
    # of its own, since this process has imported triton as an interpreter
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) == 2 * len(list(kernels()))
    for name, ptx, words in results:
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", words), f"{name}: {words}"
        # 256 threads: two blocks of them on a multiprocessor of 64 k registers
        assert int(re.search(r"Used (\d+) registers", words)[1]) <= 128, f"{name}: {words}"
        if "'width': 1" not in name:
            assert re.search(r"ld\.global\.v[48]", ptx), f"{name}: loads are not vectors"


if __name__ == "__main__":
    print(json.dumps(compile_all()))
