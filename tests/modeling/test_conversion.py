"""``hf-attn convert`` on every grouped family, against arithmetic written out in the helpers and here."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from zoo_cases import CASES, DIM, HEADS, output

from hf_attn_patch.conversion import convert, inspect_source, plan, verify
from hf_attn_patch.conversion import from_pretrained as convert_while_loading
from hf_attn_patch.conversion.checkpoints.reader import open_source

cases = pytest.mark.parametrize("case", CASES, ids=[c.stock for c in CASES])


def pool_heads(x, kv_heads):
    """Rows of written-out heads [HEADS * DIM, ...] -> each group's heads are their mean, written out again."""
    heads = x.reshape(kv_heads, HEADS // kv_heads, DIM, *x.shape[1:])
    return heads.mean(1, keepdim=True).expand_as(heads).reshape_as(x)


@cases
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_mean_is_the_mean_of_each_groups_heads(case, kv_heads, tmp_path):
    """The converted model is the stock model in which each group's K and V heads have become their mean."""
    stock = case.make(None)
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "new", case.all_attentions(kv_heads), method="mean")
    auto = getattr(transformers, case.auto)
    ours, info = auto.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    pooled = case.make(None)
    state = {
        name: case.map_kv(name, x, lambda rows: pool_heads(rows, kv_heads)) for name, x in stock.state_dict().items()
    }
    pooled.load_state_dict(state)
    feed = case.inputs()
    torch.testing.assert_close(output(ours.eval(), feed), output(pooled, feed), atol=2e-5, rtol=2e-5)


@cases
def test_a_grouped_checkpoint_is_merged_further(case, tmp_path):
    """4 -> 2 -> 1 is 4 -> 1, bit for bit but for the rounding between."""
    case.make(None).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "two", case.all_attentions(2), method="mean")
    convert(tmp_path / "two", tmp_path / "one", case.all_attentions(1), method="mean")
    convert(tmp_path / "stock", tmp_path / "straight", case.all_attentions(1), method="mean")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "straight"))
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("stock", ["gpt2", "bert", "t5", "whisper", "vit"])
def test_conversion_while_loading_is_conversion_then_loading(stock, tmp_path):
    case = next(c for c in CASES if c.stock == stock)
    case.make(None).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "new", 2, method="mean")
    auto = getattr(transformers, case.auto)
    loaded = convert_while_loading(auto, tmp_path / "stock", num_key_value_heads=2, method="mean").eval()
    feed = case.inputs()
    assert torch.equal(output(loaded, feed), output(auto.from_pretrained(tmp_path / "new").eval(), feed))


@pytest.mark.parametrize("stock", ["t5", "bart", "marian", "whisper"])
def test_one_number_leaves_an_encoder_as_it_is(stock, tmp_path):
    """Its keys and values are not kept, so the same tensors come out as from naming the others; and it is said."""
    case = next(c for c in CASES if c.stock == stock)
    case.make(None).save_pretrained(tmp_path / "stock")
    made = plan(tmp_path / "stock", 2, method="mean")
    assert [w for w in made.warnings if "encoder" in w and "save no cache" in w and "--kv-heads encoder=N" in w]
    record = convert(made, tmp_path / "new")
    convert(tmp_path / "stock", tmp_path / "named", {"decoder": 2, "cross": 2}, method="mean")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("new", "named"))
    assert one == other
    old = load_file(tmp_path / "stock" / "model.safetensors")
    new = load_file(tmp_path / "new" / "model.safetensors")
    inside = [name for name in old if "encoder." in name and "decoder" not in name]
    assert inside and all(torch.equal(old[name], new[name]) for name in inside)
    assert verify(tmp_path / "stock", tmp_path / "new").ok
    # what older versions recorded as one number meant the encoder too
    convert(tmp_path / "stock", tmp_path / "all", case.all_attentions(2), method="mean")
    path = tmp_path / "all" / "conversion.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kv_heads": 2}))
    assert verify(tmp_path / "stock", tmp_path / "all").ok
    assert record["kv_heads"] == {"decoder": 2, "cross": 2}
    # where there is nothing but an encoder, it is what the number is for
    assert not plan(tmp_path / "stock", {"encoder": 2}, method="mean").warnings


def test_an_encoder_alone_is_what_the_number_is_for(tmp_path):
    config = next(c for c in CASES if c.stock == "t5").make_config(None)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "new", 2, method="mean")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "new").encoder_kv_heads == 2


@pytest.mark.parametrize("stock", ["t5", "bart", "whisper"])
def test_the_decoder_alone_is_converted_as_in_the_paper(stock, tmp_path):
    case = next(c for c in CASES if c.stock == stock)
    case.make(None).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "new", {"decoder": 1, "cross": 2}, method="mean")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "new")
    assert (config.encoder_kv_heads, config.decoder_kv_heads, config.cross_kv_heads) == (HEADS, 1, 2)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "new"))
    changed = {name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith(("decoder.", "model.decoder.")) for name in changed)
    auto = getattr(transformers, case.auto)
    assert output(auto.from_pretrained(tmp_path / "new").eval(), case.inputs()).isfinite().all()


@pytest.mark.parametrize("stock", ["whisper", "clip", "bert", "codegen"])
def test_inspect_and_verify(stock, tmp_path):
    case = next(c for c in CASES if c.stock == stock)
    case.make(None).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "new", case.all_attentions(2), method="aligned")
    assert verify(tmp_path / "stock", tmp_path / "new").ok
    facts = inspect_source(open_source(tmp_path / "new"))
    # 2 layers, K and V, 2 heads of DIM in fp32; an encoder caches nothing, Whisper's decoder of 40 words also what it
    # reads of the encoder's 12 positions
    attentions = {"whisper": 1 + 12 / 40, "clip": 1, "bert": 0, "codegen": 1}[stock]
    assert facts["kv_bytes_per_token"] == int(attentions * 2 * 2 * 2 * DIM * 4)
    assert {row["kv_heads"] for row in facts["attention"]} == {2}


@pytest.mark.parametrize("stock", ["t5", "bart", "gpt2"])
def test_random_heads_are_drawn_as_the_architecture_draws_them(stock, tmp_path):
    """An untrained stock model of the same config says how large K and V begin (T5's: 1 / sqrt(E), not 0.02)."""
    case = next(c for c in CASES if c.stock == stock)
    model = case.make(None)
    model.save_pretrained(tmp_path / "stock")
    made = plan(tmp_path / "stock", 2, method="random")
    convert(made, tmp_path / "new")
    fresh = getattr(transformers, case.auto).from_config(model.config).state_dict()
    drawn = load_file(tmp_path / "new" / "model.safetensors")
    rows = slice(HEADS * DIM, None) if stock == "gpt2" else slice(None)  # there Q stands before K and V
    changed = [n for n in drawn if n in fresh and fresh[n].ndim == 2 and drawn[n].shape != fresh[n].shape]
    assert changed
    for name in changed:
        old, new = (x[name].T if stock == "gpt2" else x[name] for x in (fresh, drawn))
        assert 0.75 < float(new[rows].std() / old[rows].std()) < 1.33
