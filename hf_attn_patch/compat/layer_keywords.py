"""By which keywords a layer of transformers hands things to its attention function, read off the layer's source.

What a layer passes on from its caller (``**kwargs``) is anybody's; what it names itself, it wants to be heeded.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap


@functools.cache
def named_by(layer: type) -> frozenset[str]:
    """The keywords that a layer class of transformers writes out where it calls a function with itself and q, k, v;
    empty for a class of anybody else, and where there is no source.

    >>> from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
    >>> sorted(named_by(Gemma2Attention))
    ['dropout', 'scaling', 'sliding_window', 'softcap']
    """
    if layer.__module__.partition(".")[0] != "transformers":
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(layer)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) >= 4]
    own = [call for call in calls if isinstance(call.args[0], ast.Name) and call.args[0].id == "self"]
    return frozenset(keyword.arg for call in own for keyword in call.keywords if keyword.arg)
