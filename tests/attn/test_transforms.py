"""torch.func around attention: each lane of vmap, and each derivative, is that of attention written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_families import tiny_model
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jvp, stack_module_state, vmap

import hf_attn_patch
from hf_attn_patch import AttentionError, attention

N, B, HQ, HKV, S, D = 3, 2, 4, 2, 5, 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


q, k, v = randn(N, B, HQ, S, D), randn(N, B, HKV, S, D, seed=1), randn(N, B, HKV, S, D, seed=2)
shown = randn(N, B, 1, 1, S, seed=3) > -0.5
shown[..., 0] = True
triangle = torch.ones(S, S).tril().bool()


def plain(q: Tensor, k: Tensor, v: Tensor, see: Tensor | None = None, softcap: float | None = None) -> Tensor:
    scores = q @ k.repeat_interleave(HQ // HKV, 1).mT * D**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if see is None else scores.masked_fill(~see, -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(HQ // HKV, 1)


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "causal": (lambda q, k, v, m: attention(q, k, v, causal=True), lambda q, k, v, m: plain(q, k, v, triangle)),
    "mask": (lambda q, k, v, m: attention(q, k, v, mask=m), plain),
    "mask of one for all": (
        lambda q, k, v, m: attention(q, k, v, mask=shown[0]),
        lambda q, k, v, m: plain(q, k, v, shown[0]),
    ),
    "scores": (lambda q, k, v, m: attention(q, k, v, mask=torch.where(m, 0.0, -torch.inf)), plain),
    "softcap": (lambda q, k, v, m: attention(q, k, v, mask=m, softcap=2.0), lambda q, k, v, m: plain(q, k, v, m, 2.0)),
    "one query": (
        lambda q, k, v, m: attention(q[:, :, :1], k, v, mask=m),
        lambda q, k, v, m: plain(q[:, :, :1], k, v, m),
    ),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_each_lane_of_vmap(call: str) -> None:
    ours, written_out = CALLS[call]
    expected = torch.stack([written_out(*lane) for lane in zip(q, k, v, shown, strict=True)])
    torch.testing.assert_close(vmap(ours)(q, k, v, shown), expected)
    loss = [grad(lambda *a, f=f: f(*a).pow(2).sum(), argnums=(0, 1, 2)) for f in (ours, written_out)]
    expected_grads = [torch.stack(g) for g in zip(*map(loss[1], q, k, v, shown), strict=True)]
    torch.testing.assert_close(vmap(loss[0])(q, k, v, shown), tuple(expected_grads))


def test_derivatives_forwards_and_of_derivatives() -> None:
    """torch's fused kernels have no formula for them."""

    def pair(f: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: f(x, k[0], v[0], shown[0]).pow(2).sum()

    ours, written_out = (pair(f) for f in CALLS["mask"])
    along = randn(B, HQ, S, D, seed=4)
    for derivative in (
        lambda f: jvp(f, (q[0],), (along,))[1],
        lambda f: jacfwd(f)(q[0]),
        lambda f: grad(lambda x: (grad(f)(x) * along).sum())(q[0]),
    ):
        torch.testing.assert_close(derivative(ours), derivative(written_out))


def test_an_ensemble_reads_a_padded_batch() -> None:
    models = [hf_attn_patch.enable(tiny_model("llama", num_key_value_heads=2, seed=seed)) for seed in range(2)]
    ids = torch.arange(3, 13).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        states = stack_module_state(models)  # type: ignore[arg-type]
        found = vmap(lambda *state: functional_call(models[0], state, (), inputs).logits)(*states)
        for model, logits in zip(models, found, strict=True):
            model.set_attn_implementation("eager")
            torch.testing.assert_close(logits[mask.bool()], model(**inputs).logits[mask.bool()])


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_is_refused() -> None:
    """Its lengths are tensors, and its masks the constants of one call."""
    with pytest.raises(AttentionError, match=r"torch\.jit\.trace .* use torch\.export"):
        torch.jit.trace(lambda q, k, v: attention(q, k, v, causal=True), (q[0], k[0], v[0]))
