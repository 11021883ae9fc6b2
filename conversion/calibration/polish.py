"""A last pass end to end: the converted model's attentions learn to say what the original says.

Merging keeps what fits into fewer heads on average over a layer's inputs; which of it matters for what the model says
is known only at its end. So the attentions of all layers are trained together for a little while on the KL divergence
of the next token's distribution from the original's (distillation, Hinton et al. 2015, arXiv 1503.02531), on the
calibration text. All other tensors stay the original's, and are shared with it. Of several processes each has both
models, and its share of every step's sequences; gradients are summed.

Shapes: N sequences of calibration text, S tokens of each, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_attn_patch.compat.torch import copy_all
from hf_attn_patch.conversion.processes import Processes, current
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.errors import ConversionError
from hf_attn_patch.losses.chunked import Head, linear_loss
from hf_attn_patch.losses.output_head import head_matches, head_of

from .chain import Chain, chain_of, norms_in_one
from .refit import schedule

#: of what the original says of the whole text (its last hidden states), bytes that are kept at most on a CPU, and the
#: share of what a GPU has free
KEPT_BYTES, KEPT_SHARE = 1 << 28, 0.25
#: logits at a time where only a loss is wanted on a CPU, whose memory is what a conversion promises to spare
CPU_CHUNK = 1 << 20


@dataclass(frozen=True)
class PolishRecipe:
    """How the whole is trained.

    Attributes:
        tokens: how many are read, all passes over the text together.
        batch_tokens: of a step, fewer where that would make less than ``STEPS`` steps; at least a sequence for each
            process.
        lr: peak learning rate of Adam at a width of 512 or less, in inverse proportion beyond; cosine to zero.
    """

    STEPS: ClassVar[int] = 64

    tokens: int
    batch_tokens: int = 4096
    lr: float = 1e-3
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0


class Speaker:
    """A causal language model up to its last hidden states, and the head that makes words of them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.body = getattr(model, model.base_model_prefix, model)
        self.head = head_of(model)
        ids = (torch.arange(8, device=model.device)[None] * 37 + 11) % model.get_input_embeddings().num_embeddings
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            apart = self.body is not model and head_matches(self.hidden(ids).flatten(0, 1), self.head, logits[0])
        if not apart:  # a model that does more to its logits than its config says
            self.body, self.head = model, Head(None)

    def chain(self, layers: Sequence[nn.Module], ids: Tensor) -> Chain | None:
        """See :func:`~.chain.chain_of`; ``ids`` [B, S]."""
        return None if self.body is self.model else chain_of(self.hidden, self.body, layers, ids)

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, S, E], or logits [B, S, V] where the head cannot be taken apart; ids [B, S]."""
        out: Tensor = self.body(input_ids=ids, use_cache=False)[0]
        return out


def _labels(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1).flatten()


@torch.no_grad()
def losses(original: Speaker, converted: Speaker, ids: Tensor, batch: int) -> dict[str, float]:
    """Cross-entropy of both on ``ids`` [N, S], and KL(original || converted), in nats a token."""
    sums = torch.zeros(3, dtype=torch.float64)
    words = original.model.get_input_embeddings().num_embeddings
    chunk = max(1, CPU_CHUNK // words) if original.model.device.type == "cpu" else None
    mine = [rows for rows in ids[current().share(len(ids))].split(batch) if len(rows)]
    for rows in progress_bar(mine, desc="measuring the loss", unit="batch", leave=False):
        block = rows.to(original.model.device)
        told, said, labels = original.hidden(block), converted.hidden(block), _labels(block)
        before = linear_loss(told.flatten(0, 1), original.head.detach(), labels, chunk=chunk)
        after = linear_loss(
            said.flatten(0, 1), converted.head.detach(), labels, teacher_hidden=told.flatten(0, 1),
            teacher_head=original.head, kl_weight=1.0, chunk=chunk,
        )  # fmt: skip
        sums += torch.stack([before.ce, after.ce, after.kl]).double().cpu()
    (sums,) = current().summed([sums])
    before_loss, after_loss, kl = (sums / max(1, ids.shape[0] * (ids.shape[1] - 1))).tolist()
    return {"loss_before": before_loss, "loss_after": after_loss, "kl": kl}


def polish(
    original: Speaker, converted: Speaker, parameters: Sequence[nn.Parameter], ids: Tensor, recipe: PolishRecipe,
    layers: tuple[Sequence[nn.Module], Sequence[nn.Module]] | None = None,
) -> None:  # fmt: skip
    """Train ``parameters`` of ``converted`` in place.

    They are stepped in fp32 and rounded to their own dtype for each pass. On a GPU the steps are recorded as a CUDA
    graph, where that can be. A text that is gone through several times is sent through the original once, where there
    is room for what it says.

    Args:
        ids: [N, S]; rows that do not fill a batch are left out of a pass.
        layers: the original's and the converted model's, all in order; without them nothing is recorded.
    """
    device, S, processes = converted.model.device, ids.shape[1], current()
    batch = max(1, min(recipe.batch_tokens // S, len(ids), recipe.tokens // (recipe.STEPS * S)))
    batch = batch_of_all(batch, len(ids), processes.count)
    mine = processes.share(batch)
    steps = max(1, recipe.tokens // (batch * S))
    lr = recipe.lr * min(1.0, 512 / converted.model.config.get_text_config().hidden_size)
    chains = None
    if layers is not None and device.type == "cuda":
        sample = ids[mine].to(device)
        chains = original.chain(layers[0], sample), converted.chain(layers[1], sample)
    batches = _batches(len(ids), batch, recipe.seed)
    for p in parameters:
        p.requires_grad_(True)
    with norms_in_one([original.model, converted.model] if device.type == "cuda" else []):
        told = _told(original, ids, batch) if 2 * len(ids) <= steps * batch else None
        work = _Step(original, converted, parameters, (mine.stop - mine.start, S), recipe.betas, chains, told)
        for step in progress_bar(range(steps), desc="polishing", unit="step"):
            work.run(ids, next(batches)[mine], lr * schedule(step, steps, recipe.warmup))
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None


def batch_of_all(batch: int, rows: int, count: int) -> int:
    """The sequences of a step, of which ``count`` processes get as many each (steps are recorded with their shapes).

    Raises:
        ConversionError: there are fewer than processes.

    >>> batch_of_all(6, 100, 1), batch_of_all(6, 100, 4), batch_of_all(6, 7, 4), batch_of_all(1, 100, 2)
    (6, 8, 4, 2)
    """
    if rows < count:
        raise ConversionError(
            f"{rows} sequences cannot be shared out to {count} processes for --polish; give more text, fewer processes "
            "or a smaller --calibration-length"
        )
    up = -(-batch // count) * count
    return up if up <= rows else rows // count * count


def _batches(rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Rows of each step, every row once in a pass."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(rows, generator=draw).split(batch):
            if len(chosen) == batch:
                yield chosen


@torch.no_grad()
def _told(original: Speaker, ids: Tensor, batch: int) -> Tensor | None:
    """The original's last hidden states [N, S, E] for all of ``ids``; None where there is no room for them, or several
    processes share the rows."""
    if current().count > 1:
        return None
    device = original.model.device
    room = KEPT_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else KEPT_BYTES
    first = original.hidden(ids[:batch].to(device))
    if first.nbytes // len(first) * len(ids) > room:
        return None
    told = first.new_empty(len(ids), *first.shape[1:])
    blocks = list(zip(told.split(batch), ids.split(batch), strict=True))
    for out, rows in progress_bar(blocks, desc="asking the original", unit="batch", leave=False):
        out.copy_(original.hidden(rows.to(device)))
    return told


class _Step:
    """One step of training on fixed memory, so that it can be recorded and run again.

    Args:
        told: the original's last hidden states for the whole text [N, S, E], if they are known.
    """

    REHEARSALS = 3  # steps before the recording: workspaces, Triton's compiling, Adam's state

    def __init__(
        self, original: Speaker, converted: Speaker, parameters: Sequence[nn.Parameter], shape: tuple[int, int],
        betas: tuple[float, float], chains: tuple[Chain | None, Chain | None] | None = None,
        told: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.original, self.converted, self.parameters = original, converted, list(parameters)
        device = converted.model.device
        self.cuda = device.type == "cuda"
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.rate = torch.zeros((), device=device)
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(
            self.masters, lr=self.rate if self.cuda else 0.0, betas=betas, fused=self.cuda, capturable=self.cuda
        )
        self.chains, self.first = chains, torch.empty(0)
        self.known, self.told = told, None if told is None else torch.empty_like(told[: shape[0]])
        self.steps, self.processes = 0, current()
        self.replay: Callable[[], None] | None = None

    def run(self, ids: Tensor, rows: Tensor, rate: float) -> None:
        """Learn from the sequences ``rows`` of the whole text ``ids``."""
        self.ids.copy_(ids[rows])
        self.rate.fill_(rate)
        if self.known is not None and self.told is not None:
            self.told.copy_(self.known[rows.to(self.known.device)])
        if self.chains is not None and self.chains[0] is not None:  # both have the same embeddings
            first = self.chains[0].first(self.ids)
            self.first = first.clone() if self.first.shape != first.shape else self.first.copy_(first)
        if not self.cuda:
            self.optimizer.param_groups[0]["lr"] = rate
        alone = self.processes.count == 1
        if self.chains is not None and all(self.chains) and self.steps == self.REHEARSALS:
            # what waits for other processes is not recorded
            self.replay = recorded(self.work if alone else self.gradients, self.parameters)
        self.steps += 1
        if self.replay is not None:
            self.replay()
            if not alone:
                self.update()
        elif self.cuda:  # on the stream that a recording wants its memory to come from
            side = _side_stream(self.ids.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.work()
            torch.cuda.current_stream().wait_stream(side)
        else:
            self.work()

    def _hidden(self, which: int) -> Tensor:
        chain = None if self.chains is None or not all(self.chains) else self.chains[which]
        return (self.original, self.converted)[which].hidden(self.ids) if chain is None else chain(self.first)

    def work(self) -> None:
        self.gradients()
        self.update()

    def gradients(self) -> None:
        """Of the masters, from this process's sequences: their share of the mean over all."""
        ids = self.ids
        for p in self.parameters:
            p.grad = None
        with torch.no_grad():
            told = (self._hidden(0) if self.told is None else self.told).flatten(0, 1)
        said = self._hidden(1).flatten(0, 1)
        found = linear_loss(
            said, self.converted.head.detach(), _labels(ids), teacher_hidden=told, teacher_head=self.original.head,
            ce_weight=0.0, kl_weight=1.0,
        )  # fmt: skip
        count = self.processes.count * ids.shape[0] * (ids.shape[1] - 1)
        (found.loss / count).backward()
        for master, p in zip(self.masters, self.parameters, strict=True):
            master.grad = None if p.grad is None else p.grad.detach().float()

    def update(self) -> None:
        with torch.no_grad():
            if self.processes.count > 1:
                sum_gradients(self.masters, self.processes)
            self.optimizer.step()
            copy_all([p.data for p in self.parameters], self.masters)


def sum_gradients(parameters: Sequence[Tensor], processes: Processes) -> None:
    """Every parameter's gradient becomes the sum over all processes, in place; what none is trained by keeps none."""
    known = [p.grad for p in parameters if p.grad is not None]
    copy_all(known, processes.summed(known))


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    global _stream
    if _stream is None or _stream.device != device:
        _stream = torch.cuda.Stream(device)
    return _stream


_stream: torch.cuda.Stream | None = None


def recorded(work: Callable[[], None], parameters: Sequence[nn.Parameter]) -> Callable[[], None] | None:
    """``work`` as a CUDA graph; None if something in it cannot be recorded, and it then runs as it is."""
    import logging

    # beside others, threads of NCCL ask the device meanwhile whether it is done
    mode = "global" if current().count == 1 else "thread_local"
    graph = torch.cuda.CUDAGraph()
    for p in parameters:
        p.grad = None
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, capture_error_mode=mode):
            work()
    except RuntimeError as error:  # whatever waits for the device or moves host memory in a model's code
        logging.getLogger("hf_attn_patch").info("steps of polishing are not recorded: %s", str(error).split("\n")[0])
        torch.cuda.synchronize()
        return None
    return graph.replay
