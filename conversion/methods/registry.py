"""The methods by name. A method is a function from :class:`AttentionWeights` to :class:`AttentionWeights`.

To add one: write the function (or a class with ``__call__``) in a file of its own and add a :class:`Method` to
:data:`METHODS`; options of its own are :class:`Option` entries, which the command line shows by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_attn_patch.errors import ConversionError

from .method import Merge as Merge
from .method import Method, Option

GROUP = Option("group", "which heads go together: adjacent or similar")

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("mean", "the mean of each group's heads (the GQA paper)", "methods.mean:mean"),
        Method("first", "the first head of each group", "methods.mean:first"),
        Method("random", "new heads, drawn anew with --seed (the paper's control)", "methods.mean:random"),
        Method("mean-norm", "the mean, scaled back to the heads' mean norm", "methods.mean:mean_norm"),
        Method(
            "aligned",
            "heads turned into a common basis first, by what layers read on random inputs; changes Q and O too",
            "calibration.meaningless:aligned",
            scope="layer",
            options=(GROUP,),
            runs=True,
        ),
        Method(
            "calibrated",
            "aligned by what layers read on a calibration text, then fitted to the original",
            "calibration.choice:calibrated",
            scope="layer",
            options=(
                Option(
                    "calibrate",
                    "calibration text: a file, JSONL, Parquet, a folder, a data set's id, own (what the model writes), "
                    "python (the installed one's sources and documents), or several by shares: own:1,notes.txt:3  "
                    "(default for causal language models: own, on a GPU own,python); for models that hear, recordings",
                ),
                Option(
                    "calibration_tokens",
                    "tokens of calibration text  (default 500000, on a GPU 1048576, own text without one 4096)",
                    int,
                    least=1,
                ),
                Option(
                    "calibration_length",
                    "tokens of a calibration sequence  (default 1024, encoder-decoders 512, encoders: a paragraph)",
                    int,
                    least=2,
                ),
                Option(
                    "calibration_samples",
                    "recordings or pictures, for models that read them  (default 256)",
                    int,
                    least=1,
                ),
                Option(
                    "refit",
                    "fit every layer to the original's after the merge  (default: yes, but for causal language models"
                    " on a GPU or without a text)",
                    bool,
                ),
                Option(
                    "polish",
                    "train the attentions together on so many tokens to say what the original says, at last; models "
                    "that write  (default: 4000000 on a GPU, 0 without)",
                    int,
                    least=0,
                ),
                GROUP,
                Option("device", "where layers are fitted, such as cuda or cpu  (default: a GPU if there is one)"),
            ),
            ordered=True,
            exact=False,
        ),
    )
}

#: the best that can be done with what is given: ``calibrated`` with calibration data or for a model that makes its own
#: (one that writes); ``aligned`` for everything else
AUTO = "auto"
#: where no method is named
DEFAULT = AUTO


def method_named(name: str | None, options: Mapping[str, Any], speaks: bool = False) -> Method:
    """The method of this name; what ``auto`` is depends on whether there can be a calibration text.

    None: ``auto``.

    Args:
        options: the method's.
        speaks: the model can make calibration samples itself.

    Raises:
        ConversionError: there is none.
    """
    if name is None:
        name = DEFAULT
    if name == AUTO:
        name = "calibrated" if options.get("calibrate") or speaks else "aligned"
    if name not in METHODS:
        raise ConversionError(f"there is no method {name!r}; choose one of {AUTO}, {', '.join(METHODS)}")
    if name == "calibrated" and not options.get("calibrate") and not speaks:
        raise ConversionError("method 'calibrated' needs a calibration text: --calibrate TEXT")
    return METHODS[name]


def all_options() -> dict[str, Option]:
    """Every option of any method, by name."""
    return {option.name: option for method in METHODS.values() for option in method.options}
