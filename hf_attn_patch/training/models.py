"""Loading what a run needs: tokenizer, student, teacher, each with its objective."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch

from hf_attn_patch.documents.positions import positions_of
from hf_attn_patch.documents.stranger_models import check_model, config_of
from hf_attn_patch.documents.tokenizers import first_line, load_tokenizer, require_same_vocabulary
from hf_attn_patch.errors import TrainingError

from .model.objectives import CausalObjective, LossWeights, Objective
from .model.other_objectives import EncoderObjective, Seq2SeqObjective
from .model.teacher import freeze
from .options import UptrainOptions

Kind = Literal["causal", "seq2seq", "encoder"]


def load_config(name: str) -> Any:
    """The model's config.

    Raises:
        TrainingError: there is no such model.
    """

    import hf_attn_patch  # noqa: F401  (registers the attention and the grouped model families)

    try:
        config = config_of(name)
    except Exception as error:  # a config class refuses what it does not like with whatever it runs into
        raise TrainingError(f"{name} is no model that can be loaded: {first_line(error)}") from error
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise TrainingError(f"{name} is no model that can be loaded: its architectures are {names!r}")
    return config


def objective_kind(config: Any, wanted: str = "auto") -> Kind:
    """Which loss suits the architecture that the checkpoint was saved as."""
    if wanted != "auto":
        return cast(Kind, wanted)
    if config.is_encoder_decoder:
        return "seq2seq"
    names = config.architectures or []
    return "causal" if any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names) else "encoder"


def load_model(name: str, config: Any, kind: Kind, *, attention: str, dtype: torch.dtype) -> Any:
    """The model with the head that its objective needs.

    Raises:
        TrainingError: transformers has no such head for the architecture, or refuses the attention.
    """
    import transformers

    masked = kind == "encoder" and any(n.endswith("ForMaskedLM") for n in config.architectures or [])
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "encoder": transformers.AutoModelForMaskedLM if masked else transformers.AutoModel,
    }[kind]
    try:
        check_model(name, auto, config)
        return auto.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    except Exception as error:  # of the model's constructor, torch or safetensors, from whatever the files hold
        raise TrainingError(f"{name} can't be loaded for the {kind} objective: {first_line(error)}") from error


def make_objective(model: Any, kind: Kind, options: UptrainOptions) -> Objective:
    """The model wrapped in the loss of its family."""
    ce, kl = options.loss_weights
    weights = LossWeights(ce, kl, options.temperature)
    if kind == "causal":
        return CausalObjective(model, weights, packed=options.packed)
    if kind == "seq2seq":
        return Seq2SeqObjective(model, weights)
    if options.teacher is None:
        raise TrainingError("encoders are uptrained by distilling embeddings: give the --teacher")
    if (options.ce, options.kl) != (None, None):
        raise TrainingError("--ce and --kl weigh the losses of language models; an encoder's has no weights")
    return EncoderObjective(model, weights)


def load_student(options: UptrainOptions, config: Any, kind: Kind) -> Any:
    """The model that will be trained, in the dtype of its optimiser."""
    require_positions(options.model, config, options.sequence_length)
    dtype = getattr(torch, options.dtype)
    model = load_model(options.model, config, kind, attention=options.attn_implementation, dtype=dtype)
    model.train()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_teacher(options: UptrainOptions, tokenizer: Any, config: Any, kind: Kind, dtype: torch.dtype) -> Objective:
    """The teacher's objective, frozen, after making sure that it speaks the student's language.

    Raises:
        TrainingError: it does not, or it is shorter-sighted than the sequences.
    """
    assert options.teacher is not None
    teacher_config = load_config(options.teacher)
    require_same_vocabulary(tokenizer, load_tokenizer(options.teacher), config, teacher_config)
    require_positions(options.teacher, teacher_config, options.sequence_length)
    model = load_model(options.teacher, teacher_config, kind, attention=options.attn_implementation, dtype=dtype)
    return make_objective(freeze(model), kind, options).eval()


def require_positions(name: str, config: Any, S: int) -> None:
    """Refuse sequences longer than the model was built for.

    Raises:
        TrainingError: they are.
    """
    longest = positions_of(config)
    if longest is not None and longest < S:
        raise TrainingError(f"--sequence-length {S} is more than the {longest} positions of {name}")
