"""Private names of others are touched in ``hf_attn_patch/compat/`` alone: read from the source of everything else.

What counts as private: names with one leading underscore that are not ours, as attributes, in imports and in strings
(``getattr``, ``__dict__``); what makes up functions (closures, code objects); and modules and attributes without an
underscore that their packages keep for themselves. Ours are the names that our own source defines; where torch or
transformers define the same name, it is ours on ``self`` and ``cls`` alone.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Set
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
FOLDERS = ("hf_attn_patch", "modeling", "conversion", "examples", "benchmarks")
COMPAT = ROOT / "hf_attn_patch" / "compat"

#: documented, in spite of the underscore: collections.namedtuple
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make"}
#: what a model class of one's own defines by transformers' documentation, and may call on super()
SUBCLASSES_DEFINE = {
    "_init_weights",
    "_no_split_modules",
    "_tied_weights_keys",
    "_keys_to_ignore_on_load_unexpected",
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_can_compile_fullgraph",
}
#: what functions are made of: reading it reads somebody's code
OF_FUNCTIONS = {"__closure__", "__code__", "__globals__", "__wrapped__", "cell_contents", "co_freevars", "co_consts"}
#: without an underscore, and yet no public interface
MODULES = {
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.utils.output_capturing",
    "transformers.models.auto.auto_factory",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.continuous_batching",
    "triton.compiler",
    "triton.knobs",
    "triton.runtime",
}
ATTRIBUTES = {"layer_index_to_group_indices", "launch_pdl", "packed_metadata", "launch_enter_hook", "launch_exit_hook"}

#: what a class that is mixed into transformers' own would take over by defining it
STOCK = {
    name
    for stock in (transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.GenerationMixin)
    for name in dir(stock)
    if not hasattr(torch.nn.Module, name)
} - SUBCLASSES_DEFINE
STOCK |= {"_attn_implementation"}  # which instances have


#: definitions that stand for others' on purpose: file -> names
STAND_IN = {"modeling/grouped.py": {"_attn_implementation"}}  # ConfigView is read where a config is


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not path.is_relative_to(COMPAT)]


def defined(tree: ast.AST) -> set[str]:
    """The private names that a file defines: functions, classes, fields, attributes of ``self``, ``__slots__``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    """One leading underscore; our own marks on objects of others say whose they are."""
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and not name.startswith("_hf_attn_")


def _is_own(base: ast.expr) -> bool:
    return isinstance(base, ast.Name) and base.id in ("self", "cls")


def of_others() -> set[str]:
    """The private names of what our objects are mixed with: modules, models, configs, caches, tensors, parsers."""
    module, parser = torch.nn.Linear(1, 1), argparse.ArgumentParser()
    classes = (
        torch.Tensor,
        torch.nn.Module,
        transformers.PreTrainedModel,
        transformers.PreTrainedConfig,
        transformers.GenerationMixin,
        transformers.DynamicCache,
        transformers.PreTrainedTokenizerFast,
    )
    names = {name for thing in (*classes, module, parser, torch, transformers) for name in dir(thing)}
    return {name for name in (*names, *vars(module), *vars(parser)) if is_private(name)}


def touched(
    tree: ast.AST, ours: set[str], others: set[str], defined_here: Set[str] = frozenset()
) -> Iterator[tuple[int, str]]:
    """(line, name) of every private name of others in a file."""
    foreign = ours & others
    # prose, and what follows something else in an f-string, are no names
    no_names = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    no_names |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, base = node.attr, node.value
            if name in OF_FUNCTIONS or name in ATTRIBUTES:
                yield node.lineno, name
            elif is_private(name) and name not in DOCUMENTED:
                on_super = isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id == "super"
                own = _is_own(base) and name in ours
                if not own and not (on_super and name in SUBCLASSES_DEFINE) and (name not in ours or name in foreign):
                    yield node.lineno, name
        elif isinstance(node, ast.ClassDef):
            yield from ((node.lineno, name) for name in _overridden(node) & STOCK - defined_here)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node.lineno, name) for name in _imported(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in no_names:
            private = is_private(node.value) and node.value not in ours - foreign
            yield from [(node.lineno, node.value)] * (private or node.value in OF_FUNCTIONS)


def _overridden(node: ast.ClassDef) -> set[str]:
    """The private names that a class defines for its instances, and may take over from a class of others so."""
    names = {part.name for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for part in node.body:
        targets = (
            part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if is_private(name)}


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        modules, names = [alias.name for alias in node.names], []
    elif node.level or (node.module or "").split(".")[0] in ("hf_attn_patch", "__future__"):
        return  # ours
    else:
        whole = node.module
        modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        names = [alias.name for alias in node.names]
    for module in modules:
        if any(is_private(part) for part in module.split(".")) or module in MODULES:
            yield module
    yield from (name for name in names if is_private(name) and f"{whole}.{name}" not in modules)


def all_ours() -> set[str]:
    return {name for path in sources() for name in defined(ast.parse(path.read_text()))} - SUBCLASSES_DEFINE


def test_private_names_of_others_are_touched_in_compat_alone() -> None:
    ours, others = all_ours(), of_others()
    found = {
        f"{name}:{line} {touch}"
        for path in sources()
        for name in [str(path.relative_to(ROOT))]
        for line, touch in touched(ast.parse(path.read_text()), ours, others, STAND_IN.get(name, set()))
    }
    assert not found, "move these to hf_attn_patch/compat:\n" + "\n".join(sorted(found))


SEEN = {
    "import torch\ntorch._C._x()": {"_C", "_x"},
    "import torch._dynamo": {"torch._dynamo"},
    "from torch._C import y": {"torch._C", "torch._C.y"},
    "from transformers import _ours": {"transformers._ours"},
    "from transformers.utils import output_capturing": {"transformers.utils.output_capturing"},
    "from triton.compiler import CompiledKernel": {"triton.compiler"},
    "config._attn_implementation": {"_attn_implementation"},
    "self._attn_implementation": {"_attn_implementation"},
    "getattr(config, '_attn_implementation', None)": {"_attn_implementation"},
    "'_hf_hook' in vars(module)": {"_hf_hook"},
    "_HOOK = '_hf_hook'\nmodule.__dict__[_HOOK]": {"_hf_hook"},
    "module._modules": {"_modules"},
    "self._modules": set(),  # where we define it ourselves
    "function.__closure__[0].cell_contents": {"__closure__", "cell_contents"},
    "getattr(function, '__code__')": {"__code__"},
    "cache.layer_index_to_group_indices": {"layer_index_to_group_indices"},
    "other._ours": set(),
    "request._replace(x=1)": set(),
    "super()._init_weights(module)": set(),
    "class C:\n    def _attn_implementation(self): pass": {"_attn_implementation"},
    "class C(Stock):\n    _no_split_modules = ['Block']\n    _modules = 1": set(),
    "class C:\n    _auto_class: str = 'AutoModel'": {"_auto_class"},
    "from .layout import _kept": set(),
    "from hf_attn_patch import __version__": set(),
    "setattr(mask, '_hf_attn_layout', 1)": set(),
    "getattr(config, f'_attn_{name}')": {"_attn_"},
    "getattr(module, f'{name}_attn')": set(),
    "x.__dict__, type(x).__name__": set(),
}


@pytest.mark.parametrize("code", SEEN)
def test_what_counts_as_a_touch(code: str) -> None:
    found = touched(ast.parse(code), {"_ours", "_kept", "_modules", "_HOOK"}, {"_modules", "_attn_implementation"})
    assert {name for _, name in found} == SEEN[code]
