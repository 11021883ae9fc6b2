"""Importing: any name first, before transformers or after it, at next to no cost and without a kernel package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_attn_patch
import hf_attn_patch.conversion
import hf_attn_patch.modeling

ROOT = Path(__file__).parents[1]
#: what runs kernels; Triton comes with torch, the others only when a request could use them
KERNEL_PACKAGES = {"triton", "flash_attn", "flash_attn_interface", "flash_attn_3", "xformers", "cutlass"}
FOLDERS = {
    "hf_attn_patch": ROOT / "hf_attn_patch",
    "hf_attn_patch.modeling": ROOT / "modeling",
    "hf_attn_patch.conversion": ROOT / "conversion",
}

# Each statement runs in a process of its own, which has what the first argument imports. Then: what does transformers
# know of us?
PROBE = """
import gc, os, sys, traceback
exec(sys.argv[1])
gc.disable()  # a third of what an import takes

def known():
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    names = [AttentionInterface()[n].__module__ for n in ("hf_attn_patch", "paged|hf_attn_patch")]
    names.append(AttentionMaskInterface()["hf_attn_patch"].__module__)
    names.append(CONFIG_MAPPING["gqa_gpt2"].__module__)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation="hf_attn_patch")
    names.append(model.config._attn_implementation)
    return " ".join(names)

for statement in sys.argv[2:]:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            assert "hf_attn_patch" not in sys.modules
            exec(statement)
            print(known(), flush=True)
        except BaseException:
            traceback.print_exc()
            print("FAILED", statement, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
#: what transformers itself imports, so that each process need not
ITS_REQUIREMENTS = """
import accelerate, huggingface_hub, jinja2, tokenizers, torch, torch._dynamo, torch.distributed.tensor
try:
    import torchao.prototype.safetensors.safetensors_support
except ImportError:
    pass
"""
EXPECTED = (
    "hf_attn_patch.hf.attention_function hf_attn_patch.hf.attention_function hf_attn_patch.hf.mask_function "
    "hf_attn_patch.modeling.gpt2 "
    "hf_attn_patch"
)


def run(code: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr if "FAILED" in done.stdout else done.stdout


def first_of_each_module(*packages: Any) -> list[str]:
    """One public name of each module that defines some: names of one module are imported alike."""
    found: dict[tuple[str, str], str] = {}
    for package in packages:
        lazy = getattr(package, "_LAZY", {})
        for name in package.__all__:
            found.setdefault((package.__name__, lazy.get(name, "")), f"from {package.__name__} import {name}")
    return list(found.values())


def modules() -> list[str]:
    return [
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        for package, folder in FOLDERS.items()
        for path in sorted(folder.rglob("*.py"))
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_any_public_name_can_come_first() -> None:
    names = first_of_each_module(hf_attn_patch)
    others = ["from hf_attn_patch.conversion import convert", "from hf_attn_patch.training import load_run"]
    orders = ["import hf_attn_patch, transformers", "import transformers.masking_utils, hf_attn_patch"]
    assert len(names) == 1 + len(set(hf_attn_patch._LAZY.values()))
    statements = [*names, *others, *orders]
    out = run(PROBE, ITS_REQUIREMENTS, *statements)
    assert out.splitlines() == [EXPECTED] * len(statements), out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_any_module_can_come_first() -> None:
    names = first_of_each_module(hf_attn_patch.conversion, hf_attn_patch.modeling)
    statements = [*names, *(f"import {name}" for name in modules())]
    assert len(statements) > 100
    out = run(PROBE, "import transformers.modeling_utils", *statements)
    assert out.splitlines() == [EXPECTED] * len(statements), out


def test_no_module_has_a_public_name() -> None:
    """Importing a module sets it on its package: it would stand where people look for the function."""
    public = {
        f"{p.__name__}.{name}"
        for p in (hf_attn_patch, hf_attn_patch.modeling, hf_attn_patch.conversion)
        for name in p.__all__
    }
    assert not public & set(modules())


def test_every_public_name_is_there() -> None:
    for package in (hf_attn_patch, hf_attn_patch.modeling, hf_attn_patch.conversion):
        tree = ast.parse(Path(str(package.__file__)).read_text())
        assert set(getattr(package, "_LAZY", {})) <= set(package.__all__)
        for name in package.__all__:
            assert getattr(package, name) is not None
        # what type checkers are told is what __getattr__ gives
        told = {
            (alias.name, node.module)
            for block in tree.body
            if isinstance(block, ast.If)
            for node in block.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert told == set(getattr(package, "_LAZY", {}).items())


IMPORTED = """
import sys, time
start = time.process_time()
import transformers.modeling_utils
theirs = time.process_time() - start
before = set(sys.modules)
start = time.process_time()
import hf_attn_patch
print((time.process_time() - start) / theirs)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_the_import_is_cheap_and_brings_no_kernels() -> None:
    share, packages = run(IMPORTED).split("\n", 1)
    new = set(packages.split())
    assert "hf_attn_patch" in new
    assert not new & KERNEL_PACKAGES
    assert float(share) < 0.12  # of what transformers and torch take to import, on whatever machine
    alone = run("import sys, hf_attn_patch; print(*{n.split('.')[0] for n in sys.modules})").split()
    assert not {"torch", "transformers", *KERNEL_PACKAGES} & set(alone)  # `hf-attn --help` goes through it
