"""examples/uptrain.py on sequence-to-sequence models and encoders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from scripts import load_script
from tiny import python_sources, tiny_llama, trained_tokenizer

SMALL = {"vocab_size": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def t5(seed: int):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        **{**SMALL, "vocab_size": 520}, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart(seed: int):
    torch.manual_seed(seed)
    config = transformers.BartConfig(
        **{**SMALL, "vocab_size": 520}, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=128,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def bert(seed: int):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=520, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


@pytest.fixture(autouse=True)
def one_process():
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def uptrain(tmp_path, make, *more: str, sentinels: int = 0, mask: bool = False, **changes: object):
    trained_tokenizer().save_pretrained(tmp_path / "plain")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    if sentinels:
        words.add_tokens([f"<extra_id_{i}>" for i in range(sentinels)])
    if mask:
        words.add_special_tokens({"mask_token": "<mask>"})
    for name, seed in (("S", 0), ("T", 1)):
        make(seed).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    text = tmp_path / "text"
    text.mkdir(exist_ok=True)
    for path in python_sources()[:8]:
        shutil.copy(path, text)
    options = {
        "model": tmp_path / "S", "teacher": tmp_path / "T", "dataset": text, "output": tmp_path / "out",
        "tokens": 64 * 4 * 20, "sequence_length": 64, "batch_size": 4, "micro_batch_size": 2, "lr": 3e-3,
        "held_out_every": 4, "eval_tokens": 512, "overwrite": "true", **changes,
    }  # fmt: skip
    arguments = [part for k, v in options.items() if v is not None for part in (f"--{k.replace('_', '-')}", str(v))]
    load_script("examples/uptrain.py").main([*arguments, *more])
    state = json.loads(next((tmp_path / "out" / "checkpoints").glob("*/trainer_state.json")).read_text())
    return state["history"][0], state["history"][-1]


@pytest.mark.parametrize(("make", "sentinels", "mask"), [(t5, 8, False), (bart, 0, True)])
def test_span_corruption_lowers_the_loss(tmp_path, make, sentinels, mask):
    before, after = uptrain(tmp_path, make, sentinels=sentinels, mask=mask, ce=1, kl=0)
    assert after["loss"] < before["loss"] - 0.3
    again, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert type(again) is type(make(0))


def test_given_pairs(tmp_path):
    lines = [line for path in python_sources() for line in path.read_text().splitlines() if len(line) > 30][:400]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"in": line, "out": line[:10]}) + "\n" for line in lines))
    before, after = uptrain(
        tmp_path, t5, dataset=pairs, source_field="in", target_field="out", text_field="none", ce=1, eval_tokens=2000
    )
    assert after["loss"] < before["loss"] - 0.3
    assert after["kl"] != before["kl"]


def test_encoders_learn_their_teachers_embeddings(tmp_path):
    before, after = uptrain(tmp_path, bert)
    assert after["token_error"] < 0.9 * before["token_error"]
    assert after["text_distance"] < before["text_distance"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| | tokens | loss | token_error | text_distance |" in card
    assert "| loss | distance of the teacher's embeddings" in card  # not a KL that was never there
    with pytest.raises(SystemExit, match="--ce and --kl weigh the losses of language models"):
        uptrain(tmp_path, bert, kl=2)


def test_what_a_family_needs_is_said(tmp_path):
    with pytest.raises(SystemExit, match="span corruption needs a tokenizer with"):
        uptrain(tmp_path, t5)
    with pytest.raises(SystemExit, match="encoders are uptrained by distilling embeddings: give the --teacher"):
        uptrain(tmp_path, bert, teacher=None)
    with pytest.raises(SystemExit, match=r"S \(BertLMHeadModel\) sees the words after a token"):
        uptrain(tmp_path, bert, "--objective", "causal", teacher=None)


def test_a_padded_causal_run_equals_a_packed_one(tmp_path):
    """Without packing each document is a row of its own: the same tokens, the same losses."""
    make = lambda seed: tiny_llama(2, seed=seed)  # noqa: E731
    packed = uptrain(tmp_path, make, ce=1)
    padded = uptrain(tmp_path, make, "--packed", "false", ce=1)
    for a, b in zip(packed, padded, strict=True):
        assert abs(a["loss"] - b["loss"]) < 2e-3
        assert abs(a["kl"] - b["kl"]) < 2e-3


def test_an_encoder_trains_only_what_its_embeddings_come_through():
    from hf_attn_patch.training.model.other_objectives import EncoderObjective

    masked = bert(0)
    with_pooler = transformers.BertModel(masked.config)
    for model, unused in ((with_pooler, "pooler."), (masked, "cls.predictions.")):
        EncoderObjective(model)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {name for name, _ in model.named_parameters() if name.startswith(unused)}
        assert model.get_input_embeddings().weight.requires_grad  # the masked one's head shares it
        assert all(p.grad is None for p in model.parameters())
