"""What a family can be beside its plain form, and what must be refused."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from zoo_cases import BY_NAME, CASES, DIM, HEADS, E, gpt2_columns, output, separate

import hf_attn_patch
from hf_attn_patch import GroupingError
from hf_attn_patch.modeling.bert import GroupedBertLMHeadModel
from hf_attn_patch.modeling.falcon import GroupedFalconConfig, GroupedFalconForCausalLM
from hf_attn_patch.modeling.gpt2 import GroupedGPT2LMHeadModel

FALCONS: dict[str, tuple[dict[str, Any], int]] = {
    "multi-query": ({"multi_query": True}, 1),
    "new architecture": ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    "one norm": ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, 2),
    "alibi": ({"alibi": True, "multi_query": False}, HEADS),
    "alibi, multi-query": ({"alibi": True, "multi_query": True, "bias": True}, 1),
    "not parallel": ({"multi_query": False, "parallel_attn": False}, HEADS),
}


@pytest.mark.parametrize("name", FALCONS)
@pytest.mark.parametrize("attn", ["eager", "sdpa", "hf_attn_patch"])
def test_every_falcon_is_the_stock_one_with_its_kv_heads_alone_in_the_cache(name, attn, tmp_path):
    case, (options, kv_heads) = BY_NAME["falcon"], FALCONS[name]
    if attn == "eager" and options.get("alibi"):
        pytest.skip("the stock eager attention adds ALiBi twice")
    stock = case.make(None, "sdpa" if attn == "hf_attn_patch" else attn, **options)
    stock.save_pretrained(tmp_path)
    config = GroupedFalconConfig.from_pretrained(tmp_path)
    assert config.num_key_value_heads == kv_heads
    ours = GroupedFalconForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation=attn).eval()
    for padding in (None, "left", "right"):
        feed = case.inputs(padding=padding)
        real = feed["attention_mask"].bool()
        torch.testing.assert_close(output(ours, feed)[real], output(stock, feed)[real], atol=2e-5, rtol=2e-5)
    feed = case.inputs(padding="left")
    new = {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 1.6, "return_dict_in_generate": True}
    made = ours.generate(**feed, **new)
    assert made.past_key_values.layers[0].keys.shape[1] == kv_heads
    static = ours.generate(**feed, **new, cache_implementation="static", disable_compile=True)
    assert torch.equal(made.sequences, static.sequences)
    assert torch.equal(made.sequences, ours.generate(**feed, **new, use_cache=False).sequences)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("attn", ["eager", "sdpa", "hf_attn_patch"])
def test_falcons_packed_documents_are_those_documents_alone(attn, alibi):
    model = BY_NAME["falcon"].make(2, attn, alibi=alibi)
    first, second = (torch.arange(n)[None] * 7 % 50 + 3 for n in (5, 6))
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(input_ids=ids).logits for ids in (first, second)], 1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "hf_attn_patch"])
def test_cross_attention_of_decoders_has_its_own_kv_heads(attn):
    gpt2, bert = BY_NAME["gpt2"], BY_NAME["bert"]
    models: list[tuple[Any, Any, dict[str, Any]]] = [
        (gpt2, GroupedGPT2LMHeadModel, {"add_cross_attention": True}),
        (bert, GroupedBertLMHeadModel, {"add_cross_attention": True, "is_decoder": True}),
    ]
    for case, ours_class, options in models:
        config = case.make_config(2, cross_kv_heads=1, attn_implementation=attn, **options)
        torch.manual_seed(0)
        ours = ours_class(config).eval()
        with torch.no_grad():
            for p in ours.parameters():
                p.normal_(0, 0.2)
        stock_class = getattr(transformers, ours_class.__name__.removeprefix("Grouped"))
        stock = stock_class(case.make_config(None, attn_implementation=attn, **options)).eval()
        state = {}
        for name, x in ours.state_dict().items():
            cross = "crossattention" in name
            group = HEADS if cross else HEADS // 2
            if case is bert:
                state[name] = separate("key", "value")(name, x, group)
            elif cross and "c_attn" in name:  # k, v without q
                k, v = x.split(DIM, dim=-1)
                state[name] = torch.cat([k] * HEADS + [v] * HEADS, -1)
            else:
                state[name] = gpt2_columns(name, x, group)
        stock.load_state_dict(state)
        feed = case.inputs(padding="right")
        feed["encoder_hidden_states"] = torch.randn(2, 5, E)
        feed["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        real = feed["attention_mask"].bool()
        torch.testing.assert_close(output(ours, feed)[real], output(stock, feed)[real], atol=2e-5, rtol=2e-5)
        cache = ours(**feed, use_cache=True).past_key_values
        assert cache.self_attention_cache.layers[0].keys.shape[1] == 2
        assert cache.cross_attention_cache.layers[0].keys.shape[1] == 1


def test_gpt2_with_upcast_scores_is_the_stock_one(tmp_path):
    case = BY_NAME["gpt2"]
    options = {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}
    stock = case.make(None, "eager", **options)
    stock.save_pretrained(tmp_path)
    config = case.make_config(HEADS, **options)
    ours = GroupedGPT2LMHeadModel.from_pretrained(tmp_path, config=config, attn_implementation="eager").eval()
    assert torch.equal(output(ours, case.inputs()), output(stock, case.inputs()))


@pytest.mark.parametrize("case", CASES, ids=[c.stock for c in CASES])
def test_numbers_that_cannot_be_are_refused(case):
    with pytest.raises(GroupingError, match="choose one of 1, 2, 4"):  # by the config, or (CLIP on 5.17) by the model
        getattr(transformers, case.auto).from_config(case.make_config(3))


@pytest.mark.parametrize("case", CASES, ids=[c.stock for c in CASES])
def test_construction_on_the_meta_device(case):
    with torch.device("meta"):
        model = getattr(transformers, case.auto).from_config(case.make_config(2))
    assert all(p.is_meta for p in model.parameters())


def test_blooms_rounding_option_is_refused():
    with pytest.raises(ValueError, match="slow_but_exact"):
        AutoConfig.for_model("gqa_bloom", slow_but_exact=True, pretraining_tp=2)


def test_whispers_alias_is_left_alone():
    config = BY_NAME["whisper"].make_config(2)
    assert config.num_key_value_heads == config.encoder_attention_heads == HEADS
    assert config.decoder_kv_heads == 2


def test_untrained_models_start_as_the_stock_family_starts_them():
    """Narrowed layers are initialised by the family's own rule: T5's keys by its width, not by a default."""
    for stock, names in (("t5", ("k.weight", "v.weight")), ("gpt2", ("c_attn.weight",)), ("bert", ("key.weight",))):
        case, width = BY_NAME[stock], {"d_model": 256} if stock == "t5" else {}
        auto = getattr(transformers, case.auto)
        models = [auto.from_config(case.make_config(n, **width)) for n in (None, 2)]
        spread = [
            torch.cat([p.detach().flatten() for n, p in m.named_parameters() if n.endswith(names)]).std()
            for m in models
        ]
        torch.testing.assert_close(spread[1], spread[0], rtol=0.1, atol=0.0)


def test_importing_the_package_imports_no_family():
    code = (
        "import sys, hf_attn_patch, transformers; from transformers import AutoModelForCausalLM, AutoConfig; "
        "print([m for m in sys.modules if m.startswith('hf_attn_patch.modeling')]); "
        "AutoConfig.for_model('gqa_gpt2'); "
        "print(sorted(m for m in sys.modules if m.startswith('hf_attn_patch.modeling.g')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out == ["[]", "['hf_attn_patch.modeling.gpt2', 'hf_attn_patch.modeling.grouped']"]


def test_a_stock_falcon_stays_a_stock_falcon(tmp_path):
    BY_NAME["falcon"].make(None).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__module__.startswith("transformers.")


def test_enable_takes_a_grouped_family_from_outside_the_interface():
    from hf_attn_patch.modeling.bloom import GroupedBloomConfig, GroupedBloomForCausalLM

    config = GroupedBloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=50, num_key_value_heads=2)
    model = GroupedBloomForCausalLM(config).eval()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = model(ids).logits
        hf_attn_patch.enable(model)
        assert model.config._attn_implementation == "hf_attn_patch"
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)
