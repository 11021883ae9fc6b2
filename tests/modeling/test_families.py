"""Every grouped family against the stock one (``make families-tested`` writes docs/families-tested.md)."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from zoo_cases import CASES, DIM, HEADS, output

ATTENTIONS = ["eager", "sdpa", "hf_attn_patch"]
cases = pytest.mark.parametrize("case", CASES, ids=[c.stock for c in CASES])


def auto_of(case):
    return getattr(transformers, case.auto)


def expanded(case, grouped, kv_heads, attn):
    """The stock model whose every query head has its KV head written out."""
    stock = case.make(None, attn)
    group = HEADS // kv_heads
    state = {name: case.expand(name, x, group) for name, x in grouped.state_dict().items()}
    missing, unexpected = stock.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    return stock


def attn_of_stock(case, attn):
    """The same implementation where the stock family can run it, else the one that it has."""
    if not case.outside or attn == "eager":
        return attn
    return "sdpa" if case.stock == "falcon" else "eager"


@cases
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_full_heads_are_the_stock_model_bit_for_bit(case, attn, tmp_path):
    stock = case.make(None, attn_of_stock(case, attn))
    stock.save_pretrained(tmp_path)
    config = case.make_config(HEADS)
    ours, info = type(case.make(HEADS)).from_pretrained(
        tmp_path, config=config, attn_implementation=attn, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for padding in (None, "left", "right"):
        feed = case.inputs(padding=padding)
        want, got = output(stock, feed), output(ours.eval(), feed)
        if case.outside:  # what these say of padding itself is noise
            want, got = want[feed["attention_mask"].bool()], got[feed["attention_mask"].bool()]
        if attn_of_stock(case, attn) == attn:
            assert torch.equal(want, got)
        else:  # the stock family has eager attention only
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@cases
@pytest.mark.parametrize(("kv_heads", "attn"), [(2, "eager"), (1, "sdpa"), (2, "hf_attn_patch"), (1, "hf_attn_patch")])
def test_grouped_heads_are_the_stock_model_with_heads_written_out(case, kv_heads, attn):
    ours = case.make(kv_heads, attn)
    stock = expanded(case, ours, kv_heads, attn_of_stock(case, attn))
    for padding in (None, "left", "right"):
        feed = case.inputs(padding=padding)
        want, got = output(stock, feed), output(ours, feed)
        real = feed["attention_mask"].bool() if case.kind in ("causal", "encoder") else slice(None)
        torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=2e-5)


@cases
def test_save_and_reload_through_auto_classes(case, tmp_path):
    ours = case.make(2)
    ours.save_pretrained(tmp_path)
    again, info = auto_of(case).from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(ours)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    feed = case.inputs()
    assert torch.equal(output(again.eval(), feed), output(ours, feed))
    base = transformers.AutoModel.from_pretrained(tmp_path)  # the headless model of the same checkpoint
    assert type(base).__name__.startswith("Grouped")


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.kind in ("causal", "encoder", "seq2seq")], ids=lambda c: c.stock
)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attn", ["sdpa", "hf_attn_patch"])
def test_padding_changes_nothing(case, padding, attn):
    model = case.make(2, attn)
    feed = case.inputs(padding=padding)
    real = feed["attention_mask"][-1].bool()
    if case.kind == "causal":  # absolute positions count from the first real token, as generate() has it
        feed["position_ids"] = (feed["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        if case.stock in ("bloom", "mpt"):  # ALiBi needs none
            del feed["position_ids"]
    elif case.stock in ("bert", "electra", "distilbert") and padding == "left":
        pytest.skip("absolute positions that the model counts from the padding")
    elif case.kind == "seq2seq" and case.stock not in ("t5", "mt5") and padding == "left":
        pytest.skip("absolute positions that the encoder counts from the padding")
    alone = {k: v[-1:] for k, v in feed.items()}
    alone |= {k: v[-1:, real] for k, v in feed.items() if k in ("input_ids", "attention_mask", "position_ids")}
    got, want = output(model, feed)[-1:], output(model, alone)
    if case.kind != "seq2seq":
        got = got[:, real]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


generating = pytest.mark.parametrize("case", [c for c in CASES if c.generates], ids=lambda c: c.stock)


def prompt(case):
    feed = case.inputs(batch=2, length=6, padding="left" if case.kind == "causal" else None)
    feed.pop("decoder_input_ids", None)
    return feed


def self_attention_cache(case, cache):
    return cache.self_attention_cache if case.seq2seq else cache


@generating
def test_generate_and_what_it_caches(case):
    model = case.make(2)
    feed = prompt(case)
    new = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.6, "return_dict_in_generate": True}
    without = model.generate(**feed, **new, use_cache=False).sequences
    dynamic = model.generate(**feed, **new)
    static = model.generate(**feed, **new, cache_implementation="static", disable_compile=True)
    for out in (dynamic, static):
        assert torch.equal(out.sequences, without)
        layers = self_attention_cache(case, out.past_key_values).layers
        if case.seq2seq:
            layers = layers + out.past_key_values.cross_attention_cache.layers
        for layer in layers:
            assert layer.keys.shape[1] == layer.values.shape[1] == 2
            assert layer.keys.shape[-1] == DIM
    assert dynamic.sequences.unique().numel() > 2, "the model says one thing only: the test would prove little"


@pytest.mark.parametrize("case", [c for c in CASES if c.seq2seq], ids=lambda c: c.stock)
def test_beam_search_is_that_of_the_heads_written_out(case):
    ours = case.make(1)
    stock = expanded(case, ours, 1, "sdpa")
    beams = {"num_beams": 3, "suppress_tokens": [1], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**prompt(case), **beams), stock.generate(**prompt(case), **beams))


def loss_of(case, model):
    feed = case.inputs(padding="right" if case.kind in ("causal", "encoder") else None)
    out = output(model, feed)
    if case.kind in ("causal", "encoder"):
        out = out[feed["attention_mask"].bool()]
    return out.double().pow(2).mean()


@cases
def test_gradients_are_the_sums_over_each_group(case):
    ours = case.make(2).train()
    stock = expanded(case, ours, 2, attn_of_stock(case, "sdpa")).train()
    loss_of(case, ours).backward()
    loss_of(case, stock).backward()
    theirs = dict(stock.named_parameters())
    for name, p in ours.named_parameters():
        if not p.requires_grad:
            continue
        if theirs[name].grad is None:
            assert p.grad is None
            continue
        # the sum over a group is the transpose of writing it out: <grad, expand(x)> = <want, x> for any x
        for seed in range(2):
            x = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            want = (theirs[name].grad * case.expand(name, x, HEADS // 2)).sum()
            torch.testing.assert_close((p.grad * x).sum(), want, atol=1e-4, rtol=1e-3)


@cases
def test_gradient_checkpointing_gives_the_same_gradients(case):
    grads = []
    for checkpointing in (False, True):
        model = case.make(2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(case, model).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


# one family of each kind; the others, by the same code, when asked for slow tests
COMPILED = ("gpt2", "gpt_neox", "bert", "bloom", "gpt_neo", "vit")


def traced(model, feed):
    """What ``model`` gives traced as one graph: the tracing is what can fail, not the code that is made of it."""
    torch._dynamo.reset()
    return output(torch.compile(model, fullgraph=True, backend="eager"), feed)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.stock, marks=() if c.stock in COMPILED else pytest.mark.slow) for c in CASES],
)
def test_compiles_as_one_graph(case):
    model = case.make(2, "hf_attn_patch")
    feed = case.inputs(padding="right" if case.kind in ("causal", "encoder") else None)
    want = output(model, feed)
    try:
        got = traced(model, feed)
    except torch._dynamo.exc.Unsupported:
        try:
            traced(case.make(None, attn_of_stock(case, "sdpa")), feed)
        except torch._dynamo.exc.Unsupported:  # torch 2.11: the deepcopy of an encoder-decoder's config
            pytest.skip("this torch traces the stock model no better")
        raise
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@cases
def test_compiles_by_inductor(case):
    """The code that torch.compile makes by default (C++ here), forward and gradients."""
    torch._dynamo.reset()
    model, feed = case.make(2, "hf_attn_patch").train(), case.inputs(padding=None)
    compiled = torch.compile(model, fullgraph=True)
    found = []
    for m in (model, compiled):
        model.zero_grad()
        out = output(m, feed)
        out.double().pow(2).mean().backward()
        found.append((out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (want, wanted), (got, grads) = found
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, atol=2e-5, rtol=1e-3)


@cases
def test_weights_are_returned_for_every_query_head(case):
    model = case.make(2, "eager")
    out = model(**case.inputs(), output_attentions=True)
    if case.kind == "clip":
        weights = (*out.text_model_output.attentions, *out.vision_model_output.attentions)
    elif case.seq2seq:
        weights = (*out.encoder_attentions, *out.decoder_attentions, *out.cross_attentions)
    else:
        weights = out.attentions
    assert len(weights) in (2, 4, 6)
    for w in weights:
        assert w.shape[1] == HEADS
        torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))


@cases
def test_copies_and_attention_switches(case):
    model = case.make(2, "eager")
    twin = copy.deepcopy(model)
    feed = case.inputs()
    want = output(model, feed)
    assert torch.equal(output(twin, feed), want)
    twin.set_attn_implementation("sdpa")
    torch.testing.assert_close(output(twin, feed), want, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "eager"


def test_the_page_of_families_has_every_family():
    root = Path(__file__).parents[2]
    page = (root / "docs/families-tested.md").read_text(encoding="utf-8")
    assert page[page.index("| family |") :].strip() in (root / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows == [case.stock for case in CASES], "make families-tested"
    assert "NO" not in page
