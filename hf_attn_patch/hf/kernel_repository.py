"""The decode kernel as a repository for the package ``kernels``: written from our sources, pushed to a hub.

The layout is that of kernel-builder's kernels without compiled code (https://huggingface.co/docs/kernels): the source
in ``torch-ext/``, described by ``build.toml``, and a variant for each kind of device under ``build/``, which is what
is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from hf_attn_patch.errors import AttentionError
from hf_attn_patch.standalone import standalone_files

NAME = "hf-attn-patch-decode"
#: of the interface: a repository has a branch of this name with a v, and `kernels` asks for it
VERSION = 1
ENTRY = "hf_attn_patch.hf.kernel_entry"
#: on a CPU it is torch's function; AMD's GPUs are left out, since nothing of this ran there
BACKENDS = ("cpu", "cuda")

CARD = """---
library_name: kernels
license: apache-2.0
---
# Grouped decode attention in Triton

1 to 16 query tokens over a KV cache of any length; K and V are read once per KV head, whatever the group size. Padding,
windows, softcap, sinks and biases are exact. Longer queries, training and CPUs take PyTorch's own function.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="{repo}", allow_all_kernels=True)
```

```python
from kernels import get_kernel

kernel = get_kernel("{repo}", version={version}, trust_remote_code=True)
out = kernel.grouped_decode(q, k, v, scale=q.shape[-1] ** -0.5)  # q [B, HQ, Sq, D], k and v [B, HKV, Sk, D]
```

Written by `hf-attn push-kernel` of hf-attn-patch {ours}; NVIDIA GPUs from Volta on, run on H100 and H200.
"""


def kernel_files(repo_id: str) -> dict[str, str]:
    """All files of the repository, path -> text.

    Args:
        repo_id: where it will be found, ``owner/name``.
    """
    from importlib.metadata import version

    sources = standalone_files(ENTRY, "__init__.py")
    python_name = NAME.replace("-", "_")
    digest = hashlib.sha256(json.dumps(sorted(sources.items())).encode()).hexdigest()[:8]
    files = {
        "build.toml": _build_toml(repo_id),
        "README.md": CARD.format(repo=repo_id, version=VERSION, ours=version("hf-attn-patch")),
    }
    files |= {f"torch-ext/{python_name}/{file}": text for file, text in sources.items()}
    for backend in BACKENDS:
        unique = f"_{python_name}_{backend}_{digest}"
        metadata = {
            "name": NAME, "id": unique, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        files[f"build/torch-{backend}/metadata.json"] = json.dumps(metadata, indent=2) + "\n"
        for file, text in sources.items():  # an operator of its own, beside other versions and this package
            own = text.replace("hf_attn_patch::", f"{unique}::").replace(
                "torch.ops.hf_attn_patch.", f"torch.ops.{unique}."
            )
            files[f"build/torch-{backend}/{file}"] = own
    return files


def _build_toml(repo_id: str) -> str:
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return (
        f'[general]\nname = "{NAME}"\nversion = {VERSION}\nedition = 5\nlicense = "Apache-2.0"\n'
        f'backends = [{backends}]\n\n[general.hub]\nrepo-id = "{repo_id}"\n\n[torch-noarch]\n'
    )


def write_kernel(folder: Path, repo_id: str) -> list[Path]:
    """Write the repository to a folder, which may hold an older one.

    Returns:
        the files, sorted.

    Raises:
        AttentionError: the folder holds something else, or ``repo_id`` is not ``owner/name``.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise AttentionError(f"a kernel's repository is called owner/name, not {repo_id!r}")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "build.toml").is_file())):
        raise AttentionError(f"{folder} is there and holds no kernel: give another folder")
    for part in ("build", "torch-ext"):
        shutil.rmtree(folder / part, ignore_errors=True)
    written = []
    for name, text in kernel_files(repo_id).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return sorted(written)


def push_kernel(folder: Path, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Upload a folder that :func:`write_kernel` wrote, to the main branch and to that of its version.

    Args:
        api: a ``huggingface_hub.HfApi``; None: the one that is logged in.

    Returns:
        the repository's address.

    Raises:
        AttentionError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi() if api is None else api
    kind = {"repo_id": repo_id, "repo_type": "kernel"}
    try:
        url = api.create_repo(**kind, private=private, exist_ok=True)
        for branch in ("main", f"v{VERSION}"):
            api.create_branch(**kind, branch=branch, exist_ok=True)
            api.upload_folder(
                **kind, folder_path=folder, revision=branch, delete_patterns=["build/**", "torch-ext/**"],
                commit_message=f"{NAME} {VERSION}",
            )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AttentionError(f"{repo_id} could not be pushed: {reason} (hf auth login logs in)") from error
    return str(url)
