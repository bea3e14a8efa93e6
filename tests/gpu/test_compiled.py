"""Triton compiles the kernels for a GPU that is not here: no fused multiply-adds, and wide loads and stores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compiled

from zo_core.noise.triton_backend import MAX_UNROLLED, OPTIONS
from zo_core.noise.triton_kernels import ADD, BLOCK, MOMENTUM, RELATIVE, SIGN, WEIGHTS, table_kernel

DTYPES = {"float32": (tl.float32, 0), "bfloat16": (tl.int16, 16), "float16": (tl.float16, 13)}


def assembly(dtype: str, terms: int, kind: int, scales: int, masked: bool, gaussian: bool) -> str:
    """PTX of the kernel for the passes of a table, for an H100."""
    in_memory, dropped = DTYPES[dtype]
    constants: dict[str, Any] = {
        "TERMS": terms if terms <= MAX_UNROLLED else 0,
        "KIND": kind,
        "SCALES": scales,
        "MASKED": masked,
        "DTYPE": in_memory,
        "BFLOAT16": dtype == "bfloat16",
        "DROPPED": dropped,
        "EVEN": True,
        "BLOCK": BLOCK,
    }
    types = {"table": "*i64", "rows": "i32", "steps": "i32", "terms": "i32", "levels": "*fp32"}
    if not gaussian:
        constants["levels"] = None
    names = list(table_kernel.arg_names)
    source = ASTSource(
        table_kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    made = compiled(source, target=GPUTarget("cuda", 90, 32), options=dict(OPTIONS))
    assert not made.metadata.enable_fp_fusion
    return str(made.asm["ptx"])


@pytest.mark.parametrize(
    ("dtype", "terms", "kind", "scales", "masked", "gaussian"),
    [
        ("float16", 1, MOMENTUM, WEIGHTS, False, False),
        ("bfloat16", 3, ADD, WEIGHTS, False, True),
        ("bfloat16", MAX_UNROLLED + 1, MOMENTUM, WEIGHTS, True, False),
        ("float32", 1, SIGN, WEIGHTS, True, False),
        ("float32", 2, MOMENTUM, RELATIVE, False, False),
    ],
)
def test_kernels_compile(
    dtype: str,
    terms: int,
    kind: int,
    scales: int,
    masked: bool,
    gaussian: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = assembly(dtype, terms, kind, scales, masked, gaussian)
    assert "fma." not in code
    wide = [line for line in re.findall(r"(?:ld|st)\.global\S*", code) if line.endswith(".v4.b32")]
    assert len(wide) >= 2 if kind != MOMENTUM else len(wide) >= 4
