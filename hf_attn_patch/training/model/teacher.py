"""The teacher: the same vocabulary or none, frozen, sharded where the student is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_attn_patch.errors import TrainingError

from .zero import autocast

SAMPLE = "def main(args):\n    return 3.14  # Ünïcode, 你好, 1,000,000 tokens\n"


def require_same_vocabulary(student: Any, teacher: Any, student_config: Any, teacher_config: Any) -> None:
    """Refuse a teacher whose words are not the student's: KL would compare different things.

    Args:
        student, teacher: tokenizers.
        student_config, teacher_config: the models' configs.

    Raises:
        TrainingError: the vocabularies, the special tokens, the way text is cut, or the models' sizes differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = {word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word)}
        example = min(differing)
        raise TrainingError(
            f"the teacher's tokenizer is another one: {len(differing)} of {len(ours | theirs)} words differ (such as "
            f"{example!r}); distil from the model that was converted, or train without --teacher"
        )
    cut, their_cut = student(SAMPLE)["input_ids"], teacher(SAMPLE)["input_ids"]
    if cut != their_cut:
        raise TrainingError(
            f"the teacher's tokenizer has the same words but cuts text otherwise ({cut[:8]}... against "
            f"{their_cut[:8]}...); take its tokenizer files from the model that was converted"
        )
    sizes = [c.get_text_config(decoder=True).vocab_size for c in (student_config, teacher_config)]
    if sizes[0] != sizes[1]:
        raise TrainingError(
            f"the teacher predicts {sizes[1]} words and the student {sizes[0]}: resize the embeddings of one of them"
        )


def freeze(module: nn.Module) -> nn.Module:
    """In eval mode and without gradients."""
    return module.eval().requires_grad_(False)


def place_teacher(accelerator: Any, teacher: Any) -> Any:
    """On this process's device, or sharded like the student under FSDP2.

    accelerate prepares one sharded model; a second one without an optimiser is sharded here over the same mesh.
    """
    if not accelerator.is_fsdp2:
        return teacher.to(accelerator.device)
    from torch.distributed.fsdp import fully_shard

    mesh = getattr(accelerator, "torch_device_mesh", None)
    names = accelerator.parallelism_config.fsdp_dim_names if mesh is not None else ()
    options = {"mesh": mesh[tuple(names)]} if mesh is not None else {}
    for module in teacher.modules():
        if type(module).__name__ in teacher._no_split_modules:
            fully_shard(module, **options)
    # the root's own weights (embeddings, head) stay whole after its forward: the loss reads the head from there
    fully_shard(teacher, **options)
    return teacher.to(accelerator.device)


class TeacherCall:
    """A teacher's objective as a function of a batch, and of how the student is about to use it."""

    def __init__(self, objective: Any, accelerator: Any) -> None:
        self.objective, self.accelerator = objective, accelerator

    @torch.no_grad()
    def __call__(self, batch: Any, mode: str = "loss") -> Any:
        """Hidden states and head for ``loss``; a Trace for ``fit``."""
        with autocast(self.accelerator):
            if mode == "fit":
                return self.objective(batch, mode="trace")
            hidden = self.objective(batch, mode="hidden")
        return hidden, self.objective.head()
