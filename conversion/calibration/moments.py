"""What a layer's attention reads on calibration text, as second moments summed over the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.conversion.families.layer import LayerAttention
from hf_attn_patch.conversion.processes import Processes, current


class Sum:
    """Sums of x x^T over the rows that a module reads, x extended by a constant 1, in fp64, where x is."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.rows = self.broken = 0
        self.kept: Tensor | None = None  # which rows of what is read next count, [B, S]; None: all

    def add(self, _module: nn.Module | None, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        x = x if self.kept is None else x[self.kept.flatten().to(x.device)]
        fine = x.isfinite().all(-1)
        self.rows, self.broken = self.rows + len(x), self.broken + int((~fine).sum())
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)[fine]
        with torch.autocast(x.device.type, enabled=False):
            part = (x.T @ x).double()
        self.sum = part if self.sum is None else self.sum + part

    def of_all(self, processes: Processes) -> None:
        """From here on the sums over what the module read in all processes."""
        size = max(processes.everybody(0 if self.sum is None else len(self.sum)))
        if size:
            mine = torch.zeros(size, size, dtype=torch.float64) if self.sum is None else self.sum
            (self.sum,) = processes.summed([mine])
        self.rows, self.broken = map(round, processes.total(self.rows, self.broken))

    def result(self) -> tuple[Tensor | None, str | None]:
        """E[x x^T] [E + 1, E + 1] (None: use the weights alone), and what had to be done to it."""
        count = self.rows - self.broken
        if self.sum is None or count == 0 or not self.sum.isfinite().all():
            return None, "its inputs are not finite: merged by the weights alone"
        moment = self.sum / count
        notes = [f"{self.broken} of {self.rows} inputs are not finite and were left out"] if self.broken else []
        E = len(moment) - 1
        values = torch.linalg.eigvalsh(moment)
        rank = int((values > values[-1] * 1e-9).sum())
        if rank < E:  # LayerNorm alone takes one away
            # directions that the text does not have still count a little
            share = max(1e-3, E / (E + count))
            mean = moment.diagonal()[:-1].mean()
            plain = torch.cat([mean.expand(E), mean.new_ones(1)])
            moment = (1 - share) * moment + share * plain.diag()
            notes.append(f"second moment of rank {rank} of {E + 1}: mixed with {share:.1%} of the identity")
        return moment, "; ".join(notes) or None


class Moments:
    """Sums over what the attention of a layer reads, in all processes together, once the context is left; in
    cross-attention also over what K and V are made from.

    Args:
        called: the names of tensors inside the attention by the checkpoint's, where they differ.
    """

    def __init__(self, attention: nn.Module, layer: LayerAttention, called: Mapping[str, str] | None = None) -> None:
        own = [(called or {}).get(layer.name(name), f"{name}.weight").rpartition(".")[0] for name in layer.readers]
        self.read = [(attention.get_submodule(name), Sum()) for name in own]

    def __enter__(self) -> Moments:
        self.hooks = [module.register_forward_pre_hook(found.add) for module, found in self.read]
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exc: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for _, found in self.read if kind is None else ():
            found.of_all(current())

    def count_only(self, kept: Tensor | None) -> None:
        """Of what is read next, the positions that count, [B, S]: in cross-attention, of the layer's own inputs."""
        self.read[0][1].kept = kept

    def results(self) -> list[tuple[Tensor | None, str | None]]:
        """:meth:`Sum.result` of the layer's inputs, and in cross-attention of the encoder's output."""
        return [found.result() for _, found in self.read]
