"""Causal language models as evaluation takes them: loaded whole, run once, and looking at no later word."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from hf_attn_patch.conversion.loadcheck import quiet
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.documents.stranger_models import check_model, config_of
from hf_attn_patch.documents.tokenizers import first_line
from hf_attn_patch.errors import ConversionError


def load_causal(name: str, device: torch.device, dtype: str, attention: str | None = None) -> Any:
    """A causal language model, ready to be evaluated.

    Args:
        attention: an implementation's name; by default ``hf_attn_patch`` wherever the family can take it, else eager.

    Raises:
        ConversionError: it cannot be loaded whole without running code of its own, or is none.
    """
    import transformers

    import hf_attn_patch  # also registers the attention and the grouped model families

    with quiet(), progress_bar(desc=f"loading {name}", leave=False):
        try:
            config = config_of(name)
            check_model(name, transformers.AutoModelForCausalLM, config)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                attn_implementation=attention or "eager",
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with what is missing
            )
        except ConversionError:
            raise
        except Exception as error:  # of the model's constructor, torch or safetensors, from whatever the files hold
            text = first_line(error)
            raise ConversionError(f"{name} is no causal language model that can be loaded: {text}") from None
    refuse_incomplete(name, model, info)
    if attention is None:
        with contextlib.suppress(hf_attn_patch.AttentionError):  # eager, which the report names
            hf_attn_patch.enable(model)
    model = model.to(device).eval()
    try:
        refuse_bidirectional(name, model)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=True)
    except ConversionError:
        raise
    except Exception as error:  # its first forward: of the model's own code, on what its config says
        raise ConversionError(f"{name} ({type(model).__name__}) cannot be run: {first_line(error)}") from error
    return model


def refuse_incomplete(name: str, model: Any, info: Mapping[str, Any]) -> None:
    """Nothing that transformers made up at random is scored.

    Args:
        info: what ``from_pretrained(output_loading_info=True)`` told.

    Raises:
        ConversionError: the checkpoint lacks weights of the model, or has them in another shape.
    """
    lacking = [*sorted(info["missing_keys"]), *(str(key[0]) for key in sorted(info["mismatched_keys"], key=str))]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ConversionError(
            f"{name} is not a whole {type(model).__name__}: it lacks {', '.join(lacking[:3])}{more} "
            "(or has them in another shape), which would be filled at random; "
            "evaluate a checkpoint that was saved with that head"
        )


@torch.no_grad()
def refuse_bidirectional(name: str, model: Any) -> None:
    """A model that sees the words it is to predict has no perplexity.

    Raises:
        ConversionError: what a token predicts depends on a token after it.
    """
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    other = ids.clone()
    other[0, -1] = 0
    one, two = (model(input_ids=x, use_cache=False).logits[0].float() for x in (ids, other))
    moved = (one - two).abs().amax(-1)
    rounding = 1e-4 if model.dtype is torch.float32 else 1e-2  # experts sum in another order
    if float(moved[:-1].max()) > rounding * float(moved[-1]):
        raise ConversionError(
            f"{name} ({type(model).__name__}) sees the words after a token, so it has no perplexity: it is an encoder, "
            "or a decoder whose config.json does not say is_decoder"
        )
