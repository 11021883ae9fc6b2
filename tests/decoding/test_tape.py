"""What a step is written down as where other processes or tensor subclasses take part in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_attn_patch.decoding.program import Program
from hf_attn_patch.decoding.tape import Tape

aten = torch.ops.aten


def program(tape: Tape, result: Tensor) -> Program:
    slot = tape.slot_of(result)
    assert slot is not None
    return Program(tape.ops, tape, [slot])


class Behind(Tensor):
    """A tensor around another, as DTensor is: its operators are those of the tensor inside."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Behind:
        made: Behind = Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)  # type: ignore[attr-defined]
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), more: Any = None) -> Any:  # type: ignore[override]
        plain = [a.inside if isinstance(a, Behind) else a for a in args]
        return Behind(func(*plain, **(more or {})))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_subclass_is_written_down_as_the_operators_it_makes(context: Any) -> None:
    x, w = torch.ones(2, 3), Behind(torch.full((2, 3), 2.0))
    with context():
        with Tape() as tape:
            outside: Any = Behind(x) * w + 1
            result = outside.inside
        assert tape.why_not([result]) is None
        assert [op.run for op in tape.ops] == [aten.mul.Tensor, aten.add.Tensor]
        again = program(tape, result)
        x.fill_(5)
        assert torch.equal(again.run()[0], torch.full((2, 3), 11.0))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def summed(x: Tensor, w: Tensor) -> Tensor:
    """What a row-wise linear layer does: its product becomes the sum of everybody's, in place."""
    product = (x @ w).view(-1)
    dist.all_reduce(product)
    return product + 1


@pytest.mark.usefixtures("group")
def test_a_sum_over_processes_is_a_function_that_keeps_what_it_was_given() -> None:
    x, w = torch.ones(1, 4), torch.full((4, 4), 2.0)
    with torch.no_grad(), Tape() as tape:
        result = summed(x, w)
    tape.run_again()
    assert tape.why_not([result]) is None
    made, view, meeting, added = tape.ops
    assert meeting.nature.meets
    assert not meeting.nature.computes
    assert meeting.inputs == view.outputs != meeting.outputs == added.inputs
    before, after = tape.values[view.outputs[0]], tape.values[meeting.outputs[0]]
    assert torch.equal(before, after)
    assert tape.memory(view.outputs[0]) == tape.memory(made.outputs[0]) != tape.memory(meeting.outputs[0])
    assert not tape.written  # so that kernels may take the place of what is before and after it
    again = program(tape, result)
    x.fill_(3)
    assert torch.equal(again.run()[0], torch.full((4,), 25.0))
    assert torch.equal(again.run()[0], torch.full((4,), 25.0))


@pytest.mark.usefixtures("group")
def test_a_gathering_is_over_when_it_returns() -> None:
    from torch.distributed._functional_collectives import all_gather_tensor

    x = torch.ones(4)
    with torch.no_grad(), Tape() as tape:
        result = all_gather_tensor(x * 2, 0, dist.group.WORLD) + 1  # type: ignore[arg-type]
    tape.run_again()
    assert tape.why_not([result]) is None
    assert [op.nature.meets for op in tape.ops] == [False, True, False]
    again = program(tape, result)
    x.fill_(3)
    assert torch.equal(again.run()[0], torch.full((4,), 7.0))


@pytest.mark.usefixtures("group")
def test_all_processes_meet_though_nobody_reads_the_result() -> None:
    x = torch.ones(4)
    with torch.no_grad(), Tape() as tape:
        dist.all_reduce(x * 2)
        result = x + 1
    assert [op.nature.meets for op in program(tape, result).ops] == [False, True, False]


def by_another_name(x: Tensor) -> Tensor:
    product = x * 2
    dist.all_reduce(product.view(-1))
    return product + 1


def not_made_here(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x + 1


def another_collective(x: Tensor) -> Tensor:
    y = x * 2
    dist.broadcast(y, 0)
    return y + 1


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("step", "why"),
    [
        (by_another_name, "it reads by another name what a collective wrote"),
        (not_made_here, "a collective writes to memory that the step did not make"),
        (another_collective, "its processes meet in c10d.broadcast_.default"),
    ],
)
def test_what_is_not_written_down(step: Any, why: str) -> None:
    x = torch.ones(4)
    with torch.no_grad(), Tape() as tape:
        result = step(x)
    assert tape.why_not([result]) == why
