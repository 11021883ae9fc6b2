"""A family's code as files beside its weights, so that ``trust_remote_code=True`` loads it without this package."""

from __future__ import annotations

from hf_attn_patch.compat.transformers import auto_model_classes, class_names_of, config_class_names
from hf_attn_patch.hf import auto_classes as zoo
from hf_attn_patch.standalone import standalone_files


def code_files(model_type: str) -> dict[str, str]:
    """The files that ``model_type`` needs, name -> text: the family's own and all that it imports from here.

    >>> sorted(code_files("gqa_gpt2"))
    ['errors.py', 'gpt2.py', 'grouped.py', 'grouping.py', 'model_classes.py']
    """
    return standalone_files(f"{__name__.rpartition('.')[0]}.{zoo.file_of(model_type)}")


def auto_map(model_type: str, architecture: str | None = None) -> dict[str, str]:
    """What config.json says under ``auto_map``: Auto class -> file and class.

    Args:
        architecture: the checkpoint's own class, taken where an Auto class has several for the family.
    """
    file = zoo.file_of(model_type)
    out = {"AutoConfig": f"{file}.{config_class_names()[model_type]}"}
    for name, auto_class in auto_model_classes().items():
        if names := class_names_of(auto_class, model_type):
            out[name] = f"{file}.{architecture if architecture in names else names[0]}"
    return out
