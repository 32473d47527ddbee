"""Triton's interpreter, made to round as a GPU does and to start its functions faster.

By itself it cuts float32 off where a GPU rounds it to bfloat16, and replaces the builtins of triton.language anew at
every call of a function.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import torch


def round_to_bfloat16() -> None:
    """Let the interpreter round float32 to the nearest bfloat16, as the compiled kernels do, for this process.

    It drops the lower half of the bits instead, which is off by up to twice as much, and always towards 0.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut = InterpreterBuilder.cast_impl

    def rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cut(self, src, dst_type)
        values = torch.tensor(src.data).to(torch.bfloat16)
        return TensorHandle(values.view(torch.uint16).numpy(), dst_type.scalar)

    InterpreterBuilder.cast_impl = rounded


def patch_once() -> None:
    """Let the functions that a kernel calls use what the kernel's start has patched, for this process.

    The interpreter replaces the builtins of triton.language when a kernel starts, until it ends; and again, to the same
    effect, whenever the kernel calls a function.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    start, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[frozenset[int]] = set()  # in the kernel that runs

    @cache
    def languages(function: FunctionType) -> frozenset[int]:
        return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)

    def started(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        start(self, *arguments, **options)

    def patched_once(function: FunctionType) -> Any:
        if languages(function) in patched:
            return interpreter._LangPatchScope()
        patched.add(languages(function))
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = started, patched_once
