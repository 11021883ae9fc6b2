"""A model's layers in a row are the model: for every family whose body does no more than that."""

from __future__ import annotations

import pytest
import torch
from tiny_families import tiny_model
from torch import nn

from hf_attn_patch.conversion.calibration import polish
from hf_attn_patch.conversion.calibration.chain import chain_of, norms_in_one


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi", "mistral", "falcon", "olmo2", "mixtral"])
def test_a_chain_is_the_body(family: str) -> None:
    torch.manual_seed(0)
    speaker = polish.Speaker(tiny_model(family).eval())
    layers = next(m for m in speaker.body.modules() if isinstance(m, nn.ModuleList))
    size = speaker.model.get_input_embeddings().num_embeddings
    sample, ids = (torch.randint(0, size, (rows, 16)) for rows in (2, 3))
    chain = speaker.chain(list(layers), sample)
    assert chain is not None
    torch.testing.assert_close(chain(chain.first(ids)), speaker.hidden(ids), atol=1e-5, rtol=1e-4)


def test_a_body_that_does_more_has_no_chain() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.norm = nn.LayerNorm(4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            first = self.layers[0](self.embed(ids))
            return self.norm(self.layers[1](first) + self.embed(ids))

    body = Body()
    assert chain_of(body, body, list(body.layers), torch.arange(8)[None]) is None


@pytest.mark.parametrize(
    ("family", "taken"), [("llama", True), ("qwen3", True), ("mistral", True), ("gemma2", False), ("phi", False)]
)
def test_norms_as_one_operator_are_the_same(family: str, taken: bool) -> None:
    """Where a family's norm is an RMS norm as torch has it; Gemma's adds one to its weights, Phi's is another norm."""
    torch.manual_seed(0)
    model = tiny_model(family).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    ids = torch.arange(24).view(2, 12)
    want = model(ids).logits
    with norms_in_one([model]):
        changed = [m for m in model.modules() if "forward" in vars(m)]
        got = model(ids).logits
        got.square().sum().backward()
    assert bool(changed) == taken and len(changed) in (0, sum("Norm" in type(m).__name__ for m in model.modules()))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert not any("forward" in vars(m) for m in model.modules())
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    torch.testing.assert_close(found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
                               atol=1e-4, rtol=1e-3)  # fmt: skip


def test_a_norm_that_someone_has_changed_is_left_alone() -> None:
    model = tiny_model("llama").eval()
    norm = next(m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm")
    norm.forward = lambda x: 2 * x
    with norms_in_one([model]):
        assert norm(torch.ones(1)).item() == 2
    assert norm(torch.ones(1)).item() == 2


def test_polishing_on_what_the_original_said_before_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes over the text; the original is asked once for all of it, or in every step where there is no room."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(1))
    results: list[list[torch.Tensor]] = []
    asked: list[int] = []
    for room in (1 << 28, 0):
        monkeypatch.setattr(polish, "KEPT_BYTES", room)
        original, converted = tiny_model("llama").eval(), tiny_model("llama").eval()
        converted.load_state_dict(original.state_dict())
        trained = [p for n, p in converted.named_parameters() if "k_proj" in n]
        with torch.no_grad():
            for p in trained:
                p.mul_(0.5)
        speaker = polish.Speaker(original)
        calls: list[int] = []
        handle = original.model.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        before = [p.detach().clone() for p in trained]
        polish.polish(speaker, polish.Speaker(converted), trained, ids, polish.PolishRecipe(64 * 12, batch_tokens=24))
        handle.remove()
        assert not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
        results.append([p.detach().clone() for p in trained])
        asked.append(len(calls))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)
    assert asked == [1 + 16, 1 + 64]  # one call tells how much room it takes
