"""What the grouped families rely on in the stock classes of the installed transformers, read off their own source.

``broken(case)`` gives a sentence for each thing that the zoo names and the stock classes no longer have: attributes and
buffers that our methods read, names of the stock file, keywords that stock blocks pass or take, and what
we override.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from zoo_cases import HEADS, Case

from hf_attn_patch import zoo
from hf_attn_patch.compat.cache_keyword import NAMES
from hf_attn_patch.modeling.grouped import GroupedAttention, GroupedModel

OURS = "hf_attn_patch.modeling."
#: what blocks may hand an attention beside what it names: attention functions read them, or nobody here does
PASSED_ON = {"use_cache", "position_ids", "output_attentions", *NAMES}


def broken(case: Case) -> list[str]:
    """One sentence for each thing of the stock family that is not as our classes need it."""
    stock = case.make(None, "eager")
    file = importlib.import_module(f"{OURS}{zoo.file_of(case.ours)}")
    model_class = getattr(file, f"Grouped{type(stock).__name__}")
    replaced = {type(stock): model_class, **model_class.replaced}
    passed = _calls(stock, case)
    found: list[str] = []
    for stock_class, our_class in replaced.items():
        modules = [m for m in stock.modules() if type(m) is stock_class]
        if not modules:
            continue  # cross-attention of decoders that are not: the plain ones share its file and its names
        found += _names_of_the_file(stock_class, our_class)
        for module in modules[:1]:
            found += _attributes(module, our_class)
        if "forward" in _own(our_class):
            found += _keywords(stock_class, our_class, passed[stock_class])
        if issubclass(our_class, GroupedModel):
            found += _overridden(stock_class, our_class)
    if not found and any(issubclass(c, GroupedModel) and "forward" in _own(c) for c in replaced.values()):
        found += _blocks(stock, passed, _calls(case.make(HEADS // 2, "eager"), case))
    return found


def _own(our_class: type) -> dict[str, Any]:
    """Everything that our classes among its bases define; the most derived wins."""
    out: dict[str, Any] = {}
    for base in reversed(our_class.__mro__):
        if base.__module__.startswith(OURS):
            out |= vars(base)
    return out


def _trees(our_class: type) -> Iterator[ast.AST]:
    for base in our_class.__mro__:
        if base.__module__.startswith(OURS):
            yield ast.parse(textwrap.dedent(inspect.getsource(base)))


def _text(our_class: type) -> str:
    return f"{our_class.__module__.removeprefix('hf_attn_patch.').replace('.', '/')}.py"


def _attributes(module: nn.Module, our_class: Any) -> list[str]:
    """Attributes and buffers that our methods read (or delete) and that nothing of ours sets."""
    read, optional = set[str](), set[str]()
    written = set(_own(our_class))
    for tree in _trees(our_class):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                (written if isinstance(node.ctx, ast.Store) else read).add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
                optional.add(ast.unparse(node.args[1]).strip("'"))
    if issubclass(our_class, GroupedAttention):
        read.add(our_class.heads_attribute)
        if our_class.narrow is GroupedAttention.narrow:
            read |= set(our_class.kv_projections)
    return [
        f"{type(module).__name__} has no {name!r}, which {_text(our_class)} reads"
        for name in sorted(read - written - optional)
        if not hasattr(module, name)
    ]


def _names_of_the_file(stock_class: type, our_class: type) -> list[str]:
    """``stock.NAME`` and ``self.stock.NAME`` in our methods."""
    file = sys.modules[stock_class.__module__]
    names = set()
    for tree in _trees(our_class):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("stock", "self.stock"):
                names.add(node.attr)
    if hasattr(stock_class, "_attn"):  # its own eager attention, up to 5.23
        names.discard("eager_attention_forward")
    missing = [n for n in sorted(names) if not hasattr(file, n)]
    return [f"{file.__name__} has no {n!r}, which {_text(our_class)} calls" for n in missing]


def _keywords(stock_class: Any, our_class: Any, calls: list[tuple[int, set[str]]]) -> list[str]:
    """What the stock code passes to this module against what our forward names."""
    parameters = list(inspect.signature(our_class.forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    needed = {p.name for p in named if p.default is p.empty}
    stock_names = set(inspect.signature(stock_class.forward).parameters) - {"self"}
    out = []
    for positional, keywords in calls:
        given = {p.name for p in named[:positional]} | keywords
        out += [
            f"nothing passes {n!r} to {stock_class.__name__}, which {_text(our_class)} needs"
            for n in sorted(needed - given)
        ]
        unknown = keywords - {p.name for p in named} - PASSED_ON
        out += [
            f"{n!r} is passed to {stock_class.__name__}, and {_text(our_class)} does not know it"
            for n in sorted(unknown)
        ]
    if issubclass(our_class, GroupedModel):
        theirs, mine = stock_names - set(NAMES), {p.name for p in named} - set(NAMES)
        rest = {p.name for p in inspect.signature(stock_class.forward).parameters.values() if p.kind is p.VAR_KEYWORD}
        out += [
            f"{stock_class.__name__}.forward has {n!r}, {_text(our_class)} has not"
            for n in sorted(theirs - rest - mine)
        ]
        out += [f"{stock_class.__name__}.forward has no {n!r}, {_text(our_class)} has" for n in sorted(mine - theirs)]
    if not stock_names & set(NAMES) and hasattr(stock_class, "layer_idx"):
        out.append(f"{stock_class.__name__}.forward takes a cache under none of {NAMES}")
    return sorted(set(out))


def _overridden(stock_class: type, our_class: type) -> list[str]:
    """Private methods and flags of ours that no longer stand in for anything."""
    written: set[str] = set()  # in the source: transformers notes things down on the class itself
    for tree in _trees(our_class):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                written |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
                written |= {t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets}  # type: ignore[attr-defined]
    names = {n for n in written if (n.startswith("_") and not n.startswith("__")) or n == "post_init"}
    gone = [n for n in sorted(names) if not hasattr(stock_class, n) and n != "_alibi"]
    return [f"{stock_class.__name__} has no {n!r} for {_text(our_class)} to override" for n in gone]


def _blocks(stock: Any, passed: dict[Any, Any], taken: dict[Any, Any]) -> list[str]:
    """Blocks that our own loop runs: it passes what the stock loop passes."""
    out = []
    for block, calls in passed.items():
        if block not in taken or not block.__name__.endswith(("Block", "Layer")):
            continue
        theirs, mine = (set().union(*(keywords for _, keywords in c)) - PASSED_ON for c in (calls, taken[block]))
        out += [
            f"{type(stock).__name__} passes {n!r} to {block.__name__}, our loop does not" for n in sorted(theirs - mine)
        ]
        takes = set(inspect.signature(block.forward).parameters)
        out += [f"our loop passes {n!r}, which {block.__name__} does not take" for n in sorted(mine - takes)]
    return out


@torch.no_grad()
def _calls(model: Any, case: Case) -> dict[type, list[tuple[int, set[str]]]]:
    """class -> (number of positional arguments, names of the others) of each call in a forward with a cache."""
    calls: dict[type, list[tuple[int, set[str]]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(type(module), []).append((len(args), set(kwargs)))

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            handle = module.register_forward_pre_hook(record, with_kwargs=True)
            stack.callback(handle.remove)
        model(**case.inputs())
    return calls
