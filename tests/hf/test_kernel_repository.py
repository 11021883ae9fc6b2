"""The decode kernel as a repository for ``kernels``: right by itself, whole, and loaded without this package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference
from hf_attn_patch.cli import main
from hf_attn_patch.errors import AttentionError
from hf_attn_patch.hf import kernel_entry
from hf_attn_patch.hf.kernel_repository import BACKENDS, kernel_files, push_kernel, write_kernel

#: where `make` lays the package kernels, which transformers would use in every other test if it were on the path
KERNELS = Path(sys.prefix) / "kernels-package"


class Layer(torch.nn.Module):
    is_causal = True


def drawn(Sq: int, Sk: int, HQ: int = 4, HKV: int = 2, D: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    sizes = ((HQ, Sq), (HKV, Sk), (HKV, Sk))
    return [torch.randn(2, heads, length, D, generator=generator).to(dtype) for heads, length in sizes]


@pytest.mark.parametrize("taken", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("Sq", [1, 3])
@pytest.mark.parametrize("kind", ["causal", "whole", "bool", "float", "bias", "bool and bias", "softcap", "sinks"])
def test_entry_is_plain_attention(kind: str, Sq: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way in which transformers calls it, by the kernel and without it."""
    calls: list[int] = []
    real = kernel_entry.grouped_decode

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(kernel_entry, "grouped_decode", counted)
    if not taken:
        monkeypatch.setattr(kernel_entry, "MAX_QUERIES", 0)
    q, k, v = drawn(Sq, 9)
    seen = torch.rand(2, 1, Sq, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    seen[..., 0] = True
    added = torch.randn(2, 1, Sq, 9, generator=torch.Generator().manual_seed(2))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    of_kinds: dict[str, dict[str, Any]] = {
        "causal": {}, "whole": {"is_causal": False}, "bool": {"attention_mask": seen}, "softcap": {"softcap": 2.0},
        "float": {"attention_mask": torch.zeros(2, 1, Sq, 9).masked_fill(~seen, torch.finfo(torch.float32).min)},
        "bias": {"position_bias": added}, "bool and bias": {"attention_mask": seen, "position_bias": added},
        "sinks": {"s_aux": sinks},
    }  # fmt: skip
    given = of_kinds[kind]
    wanted: dict[str, Any] = {"causal": not ({"attention_mask", "is_causal"} & given.keys())}
    if "attention_mask" in given:
        wanted["mask"] = seen
    if "position_bias" in given:
        wanted["bias"] = added
    want = grouped_decode_reference(
        *(x.double() for x in (q, k, v)), scale=0.3, softcap=given.get("softcap"),
        sinks=None if kind != "sinks" else sinks.double(), **wanted,
    )[0]  # fmt: skip
    out, weights = kernel_entry.flash_attn_forward(
        Layer(), q, k, v, given.pop("attention_mask", None), scaling=0.3, **given
    )
    assert weights is None and bool(calls) is taken
    torch.testing.assert_close(out, want.transpose(1, 2).float(), atol=2e-6, rtol=1e-5)


def test_entry_trains() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(3, 3))
    out, _ = kernel_entry.flash_attn_forward(Layer(), q, k, v, None)
    out.square().sum().backward()
    mine = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    grouped_decode_reference(q, k, v, scale=0.25)[0].square().sum().backward()
    for x, grad in zip((q, k, v), mine, strict=True):
        torch.testing.assert_close(grad, x.grad, atol=1e-5, rtol=1e-4)


def test_what_the_kernel_has_not_is_refused_or_left() -> None:
    q, k, v = drawn(1, 5)
    assert kernel_entry.fits(q, k, v) and not kernel_entry.fits(q, k, v, dropout=0.1)
    assert not kernel_entry.fits(*drawn(17, 17)) and not kernel_entry.fits(*drawn(1, 5, D=4))
    assert not kernel_entry.fits(*drawn(1, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="dropout"):
        kernel_entry.flash_attn_forward(Layer(), q, k, v, None, dropout=0.1, softcap=2.0)


def test_the_files_need_only_torch_and_triton() -> None:
    files = kernel_files("owner/name")
    sources = {name: text for name, text in files.items() if name.endswith(".py")}
    for folder in ("torch-ext/hf_attn_patch_decode", "build/torch-cpu", "build/torch-cuda"):
        assert {f"{folder}/{name}.py" for name in ("__init__", "decode", "decode_kernel", "devices")} <= sources.keys()
    for name, text in sources.items():
        folder = name.rpartition("/")[0]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{folder}/{node.module}.py" in files, f"{name}: {node.module}"
                continue
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            roots = {n.partition(".")[0] for n in names}
            assert roots <= {"torch", "triton", *sys.stdlib_module_names}, f"{name}: {roots}"
    own = [name for name, text in sources.items() if name.startswith("build/") and "hf_attn_patch::" in text]
    assert own == [], "an operator would be registered twice beside this package"


def test_it_is_written_over_its_own_kind_alone(tmp_path: Path) -> None:
    files = write_kernel(tmp_path / "kernel", "owner/name")
    stale = tmp_path / "kernel/build/torch-cuda/old.py"
    stale.write_text("")
    assert write_kernel(tmp_path / "kernel", "owner/name") == files and not stale.exists()
    assert all(path.is_file() for path in files)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(AttentionError, match="holds no kernel"):
        write_kernel(tmp_path / "other", "owner/name")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["mine.txt"]
    for wrong in ("name", "owner/", "a/b/c"):
        with pytest.raises(AttentionError, match="called owner/name"):
            write_kernel(tmp_path / "third", wrong)


class Hub:
    """Records what is asked of it."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(**given: Any) -> str:
            if self.fails is not None:
                raise self.fails
            assert given["repo_id"] == "owner/name" and given["repo_type"] == "kernel"
            self.calls.append((name, given.get("revision") or given.get("branch")))
            return "where/it/is"

        return call


def test_push(tmp_path: Path) -> None:
    write_kernel(tmp_path, "owner/name")
    hub = Hub()
    assert push_kernel(tmp_path, "owner/name", api=hub) == "where/it/is"
    assert [call for call in hub.calls if call[0] == "upload_folder"] == [
        ("upload_folder", "main"), ("upload_folder", "v1"),
    ]  # fmt: skip
    with pytest.raises(AttentionError, match=r"owner/name could not be pushed: no route.*hf auth login"):
        push_kernel(tmp_path, "owner/name", api=Hub(OSError("no route\nto it")))


def test_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["push-kernel", str(tmp_path / "kernel")])
    assert result.exit_code == 0 and (tmp_path / "kernel/build/torch-cuda/__init__.py").is_file()
    assert CliRunner().invoke(main, ["push-kernel", str(tmp_path / "kernel"), "--private"]).exit_code == 2
    (tmp_path / "taken").write_text("")
    assert CliRunner().invoke(main, ["push-kernel", str(tmp_path / "taken")]).exit_code == 2
    within = CliRunner().invoke(main, ["push-kernel", str(tmp_path / "taken" / "kernel")])
    assert within.exit_code == 2 and within.stderr.endswith(" cannot be used: Not a directory\n"), within.stderr


LOADED = """
import sys
import torch
from pathlib import Path
from kernels import get_local_kernel

try:
    from kernels._rust import Build, Metadata
except ImportError:
    from kernels_data import Metadata  # 0.16, which does not read build.toml

    Build = None

folder = Path(sys.argv[1])
kernel = get_local_kernel(folder)
assert "hf_attn_patch" not in sys.modules
assert Build is None or Build.open(folder)  # build.toml as kernel-builder reads it
assert Metadata.read_from_file(folder / "build/torch-cuda/metadata.json").license == "Apache-2.0"
q, k, v = (torch.randn(1, heads, length, 16) for heads, length in ((4, 1), (2, 7), (2, 7)))
want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
torch.testing.assert_close(kernel.grouped_decode(q, k, v, scale=0.25), want, atol=2e-6, rtol=1e-5)

import hf_attn_patch.attn.kernels.decode as ours  # its operator beside the folder's, each asked as torch.compile does
for module in (kernel, ours):
    out = torch.compile(module.grouped_decode, backend="eager", fullgraph=True)(q, k, v, scale=0.25)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
print("loaded", kernel.__name__)
"""

ASKED = """
import sys
import torch
from kernels import get_local_kernel
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import is_kernels_available

if not is_kernels_available():
    sys.exit(77)
folder = Path(sys.argv[1])
config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=64, num_attention_heads=4,
                     num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint")
model = AutoModelForCausalLM.from_pretrained(
    folder / "checkpoint", attn_implementation="owner/name", allow_all_kernels=True
).eval()
assert model.config._attn_implementation == "owner/name"
(kernel,) = [m for name, m in sys.modules.items() if name.startswith("_hf_attn_patch_decode_") and "." not in name]
calls, real = [], kernel.grouped_decode
kernel.grouped_decode = lambda *a, **o: calls.append(1) or real(*a, **o)
ids = torch.arange(1, 19).view(2, 9)
mask = torch.ones_like(ids)
mask[0, :4] = 0
found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
assert calls, "the kernel was not asked"
assert "hf_attn_patch" not in sys.modules
model.set_attn_implementation("eager")
assert found.tolist() == model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()
"""


def by_kernels(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process that has the package ``kernels``, and a folder of ours as ``owner/name``."""
    write_kernel(folder, "owner/name")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(KERNELS)]), "TRITON_INTERPRET": "1",
        "LOCAL_KERNELS": f"owner/name={folder}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)


needs_kernels = pytest.mark.skipif(not KERNELS.is_dir(), reason="the package kernels is not there: make lays it apart")


@needs_kernels
def test_kernels_loads_it_without_us(tmp_path: Path) -> None:
    done = by_kernels(LOADED, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"loaded _hf_attn_patch_decode_{BACKENDS[0]}_" in done.stdout


@needs_kernels
def test_transformers_takes_it_by_name(tmp_path: Path) -> None:
    """``attn_implementation="owner/name"``: greedy tokens of a padded batch are eager's, and the kernel was asked."""
    done = by_kernels(ASKED, tmp_path)
    if done.returncode == 77:
        pytest.skip("this transformers wants another version of kernels")
    assert done.returncode == 0, done.stderr[-3000:]
