"""Old module paths, answered for one release.

The modules moved into rooms (docs/internals.md). An import of an old path gives the module of the new one, the same
object, and a DeprecationWarning that names it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import Any

PACKAGE = "hf_attn_patch"

#: old path -> new path, both below hf_attn_patch
MOVED = {
    "backends": "attn.backends",
    "backends._blocks": "attn.backends._blocks",
    "backends._common": "attn.backends._common",
    "backends._flash3_ops": "attn.backends._flash3_ops",
    "backends._scores": "attn.backends._scores",
    "backends._unseen": "attn.backends._unseen",
    "backends._varlen": "attn.backends._varlen",
    "backends.flash2": "attn.backends.flash2",
    "backends.flash3": "attn.backends.flash3",
    "backends.flash4": "attn.backends.flash4",
    "backends.flex": "attn.backends.flex",
    "backends.reference": "attn.backends.reference",
    "backends.torch_sdpa": "attn.backends.torch_sdpa",
    "backends.torch_varlen": "attn.backends.torch_varlen",
    "backends.triton_decode": "attn.backends.triton_decode",
    "bench": "cli.bench",
    "cache_layers": "cache.layers",
    "cache_room": "cache.buffers",
    "call_layout": "hf.call_visibility",
    "conversion.align": "conversion.methods.align",
    "conversion.aligned": "conversion.methods.aligned",
    "conversion.calibrated": "conversion.calibration.calibrated",
    "conversion.calibration_text": "conversion.calibration.text",
    "conversion.card": "conversion.reports.card",
    "conversion.commands": "cli.convert",
    "conversion.config": "conversion.families.config",
    "conversion.dtypes": "conversion.checkpoints.dtypes",
    "conversion.engine": "conversion.methods.apply",
    "conversion.errors": "errors",
    "conversion.evaluate_command": "cli.evaluate",
    "conversion.evaluation": "conversion.reports.evaluation",
    "conversion.family": "conversion.families.family",
    "conversion.group": "conversion.methods.similar_heads",
    "conversion.harness": "conversion.reports.harness",
    "conversion.heads": "conversion.families.layer",
    "conversion.hub": "conversion.checkpoints.hub",
    "conversion.inspection": "conversion.reports.inspection",
    "conversion.kvfield": "conversion.families.kv_field",
    "conversion.layerwise": "conversion.calibration.layers",
    "conversion.layouts": "conversion.families.head_layouts",
    "conversion.memory": "conversion.calibration.memory",
    "conversion.moments": "conversion.calibration.moments",
    "conversion.pairs": "conversion.calibration.pairs",
    "conversion.plots": "conversion.reports.plots",
    "conversion.pool": "conversion.methods.mean",
    "conversion.reader": "conversion.checkpoints.reader",
    "conversion.refit": "conversion.calibration.refit",
    "conversion.report": "conversion.reports.report",
    "conversion.safetensors_header": "conversion.checkpoints.safetensors_header",
    "conversion.shards": "conversion.checkpoints.shards",
    "conversion.verification": "conversion.reports.verification",
    "conversion.writer": "conversion.checkpoints.writer",
    "conversion.zoo_families": "conversion.families.grouped_rows",
    "crossovers": "attn.crossovers",
    "dispatch": "attn.dispatch",
    "env": "cli.env",
    "explanation": "explaining.explanation",
    "functional": "attn.functional",
    "graphs": "decoding.cuda_graphs",
    "integration": "hf.attention_function",
    "kernels": "attn.kernels",
    "kernels.combine_kernel": "attn.kernels.combine_kernel",
    "kernels.decode": "attn.kernels.decode",
    "kernels.decode_kernel": "attn.kernels.decode_kernel",
    "kernels.decode_launch": "attn.kernels.decode_launch",
    "kernels.decode_line": "attn.kernels.decode_line",
    "kernels.decode_plan": "attn.kernels.decode_plan",
    "kernels.decode_reference": "attn.kernels.decode_reference",
    "kernels.launcher": "attn.kernels.launcher",
    "kernels.loss": "attn.kernels.loss",
    "kernels.mask_bounds": "attn.kernels.mask_bounds",
    "ladder": "attn.ladder",
    "layout": "attn.visibility",
    "masking": "hf.mask_function",
    "packing": "hf.padded_rows",
    "paged": "hf.continuous_batching",
    "paged_decode": "hf.paged_decode",
    "pattern": "hf.mask_pattern",
    "recorded_step": "decoding.step",
    "recording": "decoding.capture",
    "registration": "hf.registration",
    "request": "attn.request",
    "step_layers": "decoding.step_layers",
    "switch": "enabling",
    "training.card": "training.loop.run_card",
    "training.checkpoints": "training.loop.checkpoints",
    "training.chunks": "training.data.chunks",
    "training.compiling": "training.model.compiling",
    "training.errors": "errors",
    "training.evaluation": "training.loop.held_out",
    "training.heads": "losses.output_head",
    "training.interrupts": "training.loop.interrupts",
    "training.layerwise": "training.model.layerwise",
    "training.log": "training.loop.log",
    "training.losses": "losses.chunked",
    "training.meters": "training.loop.meters",
    "training.objectives": "training.model.objectives",
    "training.other_objectives": "training.model.other_objectives",
    "training.output": "training.loop.output",
    "training.packing": "training.data.packing",
    "training.precision": "training.model.precision",
    "training.schedule": "training.loop.schedule",
    "training.sources": "documents.sources",
    "training.steps": "training.data.steps",
    "training.stream": "training.data.stream",
    "training.teacher": "training.model.teacher",
    "training.trainable": "training.model.trainable",
    "training.zero": "training.model.zero",
    "tuning": "attn.tuning",
    "unpadding": "hf.unpadding",
    "zoo": "hf.auto_classes",
}


def is_old(path: str) -> bool:
    """Is this the full path of a module that moved?"""
    return path.removeprefix(f"{PACKAGE}.") in MOVED


def install() -> None:
    """Let imports of old paths find the new modules. Twice is once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # first: the old packages are the new ones, and the finder of files would load their modules a second time
        sys.meta_path.insert(0, _Finder())


def names_from(module: str, names: Collection[str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` for these names of a module that had the package's path and is inside it now."""
    package = module.rpartition(".")[0]

    def answer(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(f"{package}.{name} is now {module}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(module), name)

    return answer


def module_of(old: str, *, stacklevel: int = 1) -> ModuleType:
    """The module that had this full path, under its new one; says so to whoever called ``stacklevel`` calls above."""
    new = f"{PACKAGE}.{MOVED[old.removeprefix(f'{PACKAGE}.')]}"
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=stacklevel + 1)
    return importlib.import_module(new)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{PACKAGE}.") or not is_old(fullname):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # the import system goes by what stands here
        sys.modules[module.__name__] = module_of(module.__name__, stacklevel=2)
