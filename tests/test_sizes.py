"""Functions that can be read in one go: at most 60 lines beside the docstring, and 10 parameters; files of 350 lines.

Public signatures and kernels may have more parameters; what else is larger is listed, with why.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_attn_patch", "modeling", "conversion")
LINES, PARAMETERS = 60, 10
FILE_LINES = 350
#: Triton functions, and what takes their operands one by one, since a call costs microseconds
KERNELS = ("hf_attn_patch/attn/kernels/",)
#: file: function -> why it is larger
LARGER: dict[str, str] = {}
#: signatures that are public, or given by others
SIGNATURES = {
    "hf_attn_patch/attn/backends/_flash3_ops.py: _apply": "flash_attn_interface's",
    "hf_attn_patch/attn/backends/_flash3_ops.py: flash_attn_with_kvcache": "flash_attn_interface's",
    "hf_attn_patch/attn/backends/_flash3_ops.py: forward": "flash_attn_interface's",
    "hf_attn_patch/attn/dispatch.py: attend": "the operands of attention",
    "hf_attn_patch/attn/functional.py: attention": "public",
    "hf_attn_patch/attn/request.py: kind_of": "the operands of attention",
    "hf_attn_patch/attn/request.py: plain_kind": "the operands of attention",
    "hf_attn_patch/attn/functional.py: attention_and_weights": "as attention",
    "hf_attn_patch/attn/functional.py: attention_varlen": "public",
    "hf_attn_patch/cli/convert.py: convert": "the command's options",
    "hf_attn_patch/cli/evaluate.py: evaluate": "the command's options",
    "hf_attn_patch/explaining/explanation.py: explain": "public",
    "hf_attn_patch/hf/attention_function.py: attention_forward": "transformers'",
    "hf_attn_patch/hf/kernel_entry.py: flash_attn_forward": "transformers'",
    "conversion/reports/evaluation.py: evaluate": "public",
    "modeling/attention.py: __init__": "public",
    "modeling/attention.py: forward": "public",
}


def functions(*more: str) -> Iterator[tuple[str, int, int]]:
    """(file: function, lines beside the docstring, parameters beside self) of all."""
    for path in (p for folder in (*FOLDERS, *more) for p in sorted((ROOT / folder).rglob("*.py"))):
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not where.startswith(KERNELS):
                first = node.body[0]
                told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                docstring = (first.end_lineno or 0) - first.lineno + 1 if told else 0
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                parameters = len([a for a in given if a.arg not in ("self", "cls")])
                yield f"{where}: {node.name}", (node.end_lineno or 0) - node.lineno + 1 - docstring, parameters


def test_functions_can_be_read_in_one_go() -> None:
    long = {name: lines for name, lines, _ in functions("examples", "benchmarks") if lines > LINES}
    assert set(long) == set(LARGER), long


def test_signatures_can_be_remembered() -> None:
    wide = {name: number for name, _, number in functions() if number > PARAMETERS}
    assert set(wide) == set(SIGNATURES), wide


def test_files_can_be_read_in_one_go() -> None:
    paths = [p for folder in (*FOLDERS, "examples") for p in sorted((ROOT / folder).rglob("*.py"))]
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}
    assert not {name: number for name, number in lines.items() if number > FILE_LINES}
