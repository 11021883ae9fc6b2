"""After the layers of an encoder-decoder are fitted: what its decoder says as a whole, measured and taught.

The encoder's outputs stay as they are, so only the decoder learns. What is lost is told on samples that were held out:
cross-entropy of the words that were to be said, and KL(original || converted).

Shapes: N samples, T tokens of a decoder, S' positions of an encoder's output, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.processes import current
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.errors import ConversionError
from hf_attn_patch.losses.chunked import Head, linear_loss
from hf_attn_patch.losses.output_head import head_matches, head_of

from .calibrated import Calibrated
from .joined import joined, polished
from .layers import as_read
from .polish import KEPT_BYTES, KEPT_SHARE, PolishRecipe
from .refit import schedule
from .samples import IGNORE, Samples

#: samples held out, on which what was lost is measured (of many, more), and samples that are measured at a time
UNSEEN, MANY_UNSEEN, ROWS = 16, 256, 8
#: peak learning rates of the last pass where there are few words to say (a few hundred recordings), and where there are
#: so many (Whisper tiny.en on 128: at 1e-3 the KL on other recordings went from 0.059 to 0.200, at 3e-4 to 0.066)
LR, MANY_LR, MANY = 3e-4, 1e-3, 20_000
#: positions of encoders' outputs that a step of the last pass reads, at most
POSITIONS = 1 << 15


class Heard:
    """An encoder's output for some of the samples, worked out when it is asked for, and once for who asks after."""

    def __init__(self, model: Any, samples: Samples) -> None:
        self.encoder, self.read, self.device = model.get_encoder(), samples.inputs[0], model.device
        self.last: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """[B, S', E] of the samples ``rows``."""
        if self.last is None or self.last[0] is not rows:
            read = as_read(self.read[rows].to(self.device), self.encoder)
            self.last = (rows, self.encoder(read)[0])
        return self.last[1]


class Answerer:
    """A sequence-to-sequence model's decoder up to its last hidden states, and the head that makes words of them.

    Args:
        memory: what it reads of the encoder, for all samples [N, S', E]; or a function that gives it for some.
        samples: whose last input is the decoder's, with labels.
    """

    def __init__(self, model: Any, memory: Tensor | Callable[[Tensor], Tensor], samples: Samples) -> None:
        self.model, self.ids, self.labels = model, samples.inputs[-1], samples.labels
        self.memory = memory if callable(memory) else lambda rows: memory[rows.to(memory.device)]
        self.decoder, self.head = model.get_decoder(), head_of(model)
        with torch.no_grad():
            rows = torch.arange(1)
            logits = self._whole(rows)[0]
            if not head_matches(self.hidden(rows)[0], self.head, logits):
                self.head = Head(None)

    def hidden(self, rows: Tensor) -> Tensor:
        """[B, T, E] of the samples ``rows``, or logits [B, T, V] where the head cannot be taken apart."""
        if self.head.weight is None:
            return self._whole(rows)
        ids, memory = self._placed(rows)
        out: Tensor = self.decoder(input_ids=ids, encoder_hidden_states=memory, use_cache=False)[0]
        return out

    def _placed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder reads [B, T], up to the last word that any of them is to say, and its encoder's output."""
        ids = self.ids[rows]
        if self.labels is not None:
            said = (self.labels[rows] != IGNORE).any(0).nonzero()
            ids = ids[:, : int(said.max()) + 1 if len(said) else 1]
        return ids.to(self.model.device), self.memory(rows).to(self.model.device, self.model.dtype)

    def _whole(self, rows: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        ids, memory = self._placed(rows)
        heard = BaseModelOutput(last_hidden_state=memory)
        logits: Tensor = self.model(encoder_outputs=heard, decoder_input_ids=ids, use_cache=False).logits
        return logits


class Answered:
    """Layers of an encoder-decoder fitted one after the other; then the decoder is measured as a whole, and taught.

    Args:
        steps: what fits the layers.
        polish_tokens: of a decoder's words, that are read to train its attentions together; 0: none.
        samples: what is measured and taught on, if not what the layers were fitted on: of the first ``held`` of these
            they have seen none.
    """

    def __init__(self, steps: Calibrated, polish_tokens: int, samples: Samples | None = None) -> None:
        self.plan, self.steps, self.tokens, self.samples = steps.plan, steps, polish_tokens, samples
        self.record: dict[str, Any] = steps.record
        self.done: dict[str, AttentionWeights] | None = None

    def __call__(self, weights: AttentionWeights) -> AttentionWeights:
        """The merged layer; all layers are made when the first is asked for."""
        if self.done is None:
            self.done = self._make()
        return self.done.pop(weights.layer.prefix)

    def _make(self) -> dict[str, AttentionWeights]:
        steps, device = self.steps, self.steps.device
        merged = steps.all()
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        known = None if self.samples is not None else steps.heard()
        samples = self.samples or steps.samples
        original = steps.original.to(device, dtype)
        student, own = joined(self.plan, original, merged)
        theirs, ours = known or self._heard(original, student, samples)
        answerers = Answerer(original, theirs, samples), Answerer(student, ours, samples)
        unseen = held_out(len(samples))
        held = torch.arange(unseen or len(samples))
        before = losses(*answerers, samples, held)
        self.record["held_out"] = {"tokens": before.pop("tokens"), "seen": not unseen} | before
        trained = own.keys() & self._decoders()
        if not (self.tokens and unseen and trained):
            return merged
        assert samples.labels is not None
        many = int((samples.labels != IGNORE).sum()) >= MANY
        recipe = PolishRecipe(self.tokens, lr=MANY_LR if many else LR, seed=self.plan.seed)
        known_rows = torch.arange(unseen, len(samples))
        return polished(
            self.plan, self.record, merged, own, tokens=self.tokens, trained=trained,
            train=lambda parameters: teach(*answerers, parameters, samples, known_rows, recipe),
            measure=lambda: losses(*answerers, samples, held),
        )  # fmt: skip

    def _heard(self, original: Any, student: Any, samples: Samples) -> tuple[Any, Any]:
        """What the decoders read of their encoders: one and the same where the encoder is the original's."""
        theirs = Heard(original, samples) if samples.memory is None else samples.memory
        own = any(not unit.layer.stack.cached for unit in self.plan.units)
        return theirs, Heard(student, samples) if own else theirs

    def _decoders(self) -> set[str]:
        """The names of what the decoder's attentions write."""
        return {name for unit in self.plan.units if unit.layer.stack.cached for name in unit.writes}


def held_out(count: int) -> int:
    """How many of ``count`` samples are not taught on.

    >>> held_out(7), held_out(160), held_out(20_000)
    (0, 16, 256)
    """
    return min(MANY_UNSEEN if count >= 16 * MANY_UNSEEN else UNSEEN, count // 8)


@torch.no_grad()
def losses(original: Answerer, converted: Answerer, samples: Samples, rows: Tensor) -> dict[str, Any]:
    """Cross-entropy of both on the labels of ``rows``, and KL(original || converted), in nats a token."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for some in rows[current().share(len(rows))].split(ROWS):
        if not len(some):
            continue
        told, said, labels = _paired(original, converted, samples, some)
        before = linear_loss(told, original.head.detach(), labels)
        after = linear_loss(
            said, converted.head.detach(), labels, teacher_hidden=told, teacher_head=original.head, kl_weight=1.0
        )
        sums += torch.stack([before.ce, after.ce, after.kl]).double().cpu()
        count += int((labels != IGNORE).sum())
    (sums,), (counted,) = current().summed([sums]), current().total(count)
    count = round(counted)
    if not count:
        raise ConversionError("the calibration samples hold no words that a decoder is to say")
    loss_before, loss_after, kl = (sums / count).tolist()
    return {"tokens": count, "loss_before": loss_before, "loss_after": loss_after, "kl": kl}


def _paired(
    original: Answerer, converted: Answerer, samples: Samples, rows: Tensor, known: Mapping[int, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What both have to say at the tokens that have a label: hidden states [n, E] each, and labels [n].

    Args:
        known: the original's, by sample, see :func:`asked`.
    """
    assert samples.labels is not None
    said = converted.hidden(rows)
    labels = samples.labels[rows][:, : said.shape[1]].to(said.device)
    there = labels != IGNORE
    if known is None:
        with torch.no_grad():
            told = original.hidden(rows)[there]
    else:
        told = torch.cat([known[i] for i in rows.tolist()])
    return told, said[there], labels[there]


@torch.no_grad()
def asked(original: Answerer, samples: Samples, parts: Sequence[Tensor]) -> dict[int, Tensor] | None:
    """What the original has to say of the samples in ``parts``, a part at a time: by sample, hidden states [n, E] at
    the tokens that have a label. None where there is no room for them, or several processes share every part."""
    assert samples.labels is not None
    if current().count > 1:
        return None
    device, there = original.model.device, samples.labels != IGNORE
    room = KEPT_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else KEPT_BYTES
    found: dict[int, Tensor] = {}
    for rows in progress_bar(parts, desc="asking the original", unit="batch", leave=False):
        hidden = original.hidden(rows)
        if not found and int(there.sum()) * hidden[0, 0].nbytes > room:
            return None
        told = hidden[there[rows][:, : hidden.shape[1]].to(device)].split(there[rows].sum(1).tolist())
        found.update(zip(rows.tolist(), told, strict=True))
    return found


def batches(lengths: Tensor, heard: int, words: int, draw: torch.Generator) -> list[Tensor]:
    """The samples of each step of one pass, drawn, but with others that are about as long, so that little is padding.

    Args:
        lengths: words that each sample says, [N].
        heard: S', of the encoder's output.
        words: of a step, at most; fewer where encoders' outputs are long, and so that a pass has 8 steps.

    >>> parts = batches(torch.arange(64) % 4 + 1, 48, 12, torch.Generator().manual_seed(0))
    >>> sorted(int(i) for part in parts for i in part) == list(range(64)), max(map(len, parts)) <= 8
    (True, True)
    """
    most = max(1, min(POSITIONS // heard, len(lengths) // 8))
    pool = 16 * max(1, round(words / max(1.0, float(lengths.float().mean()))))
    found: list[Tensor] = []
    for some in torch.randperm(len(lengths), generator=draw).split(pool):
        some, begin, total = some[lengths[some].argsort()], 0, 0
        for i, n in enumerate(lengths[some].tolist()):
            if i > begin and (total + n > words or i - begin == most):
                found.append(some[begin:i])
                begin, total = i, 0
            total += n
        found.append(some[begin:])
    return [found[i] for i in torch.randperm(len(found), generator=draw).tolist()]


def _gradients(
    original: Answerer, converted: Answerer, parameters: Sequence[nn.Parameter], samples: Samples, rows: Tensor,
    words: float, known: Mapping[int, Tensor] | None,
) -> Sequence[Tensor | None]:  # fmt: skip
    """Of the KL over ``words``, summed over the samples ``rows``, of which each process reads its share."""
    processes = current()
    gradients: list[Tensor | None] = [None for _ in parameters]
    mine = rows[processes.share(len(rows))]
    if len(mine):
        told, said, labels = _paired(original, converted, samples, mine, known)
        found = linear_loss(
            said, converted.head.detach(), labels, teacher_hidden=told, teacher_head=original.head, ce_weight=0.0,
            kl_weight=1.0,
        )  # fmt: skip
        gradients = list(torch.autograd.grad(found.loss / words, list(parameters), allow_unused=True))
    if processes.count == 1:
        return gradients
    return processes.summed(
        [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    )


def teach(
    original: Answerer, converted: Answerer, parameters: Sequence[nn.Parameter], samples: Samples, rows: Tensor,
    recipe: PolishRecipe,
) -> None:  # fmt: skip
    """Train ``parameters`` of the converted decoder in place on the KL to the original's words.

    They are stepped in fp32 and rounded to their own dtype for each pass. ``recipe`` counts the words that are said.
    Samples that are gone through several times are sent through the original once, where there is room for that.
    """
    assert samples.labels is not None
    lengths = (samples.labels[rows] != IGNORE).sum(1)
    draw, heard = torch.Generator().manual_seed(recipe.seed), original.memory(rows[:1]).shape[1]
    left = batches(lengths, heard, recipe.batch_tokens, draw)
    words = float(lengths.sum()) / len(left)  # of a step
    steps = max(1, round(recipe.tokens / words))
    width = converted.model.config.get_text_config(decoder=True).hidden_size
    lr = recipe.lr * min(1.0, 512 / width)
    masters = [p.detach().float().clone() for p in parameters]
    optimizer = torch.optim.Adam(masters, lr=lr, betas=recipe.betas, fused=masters[0].is_cuda)
    known = asked(original, samples, [rows[part] for part in left]) if steps >= 2 * len(left) else None
    for p in parameters:
        p.requires_grad_(True)
    for step in progress_bar(range(steps), desc="polishing", unit="step"):
        if not left:
            left = batches(lengths, heard, recipe.batch_tokens, draw)
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, recipe.warmup)
        gradients = _gradients(original, converted, parameters, samples, rows[left.pop()], words, known)
        with torch.no_grad():
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.float()
            optimizer.step()
            for p, master in zip(parameters, masters, strict=True):
                p.copy_(master)
    for p in parameters:
        p.requires_grad_(False)
