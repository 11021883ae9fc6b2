"""peft, trl and torch's parallel wrappers around a grouped model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from scripts import on_two
from tiny import python_sources, trained_tokenizer
from torch import distributed
from transformers import AutoModelForCausalLM, PreTrainedModel
from works_with import works_with

import hf_attn_patch


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By parameter name, of the loss on real tokens that a real token predicts."""
    mask = batch["attention_mask"] == 1
    labels = torch.where(mask & mask.roll(1, dims=1), batch["input_ids"], -100)
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.removeprefix("module.")] = full.clone()
    return found


def opt() -> PreTrainedModel:
    from hf_attn_patch.modeling.opt import GroupedOPTConfig, GroupedOPTForCausalLM

    torch.manual_seed(0)
    config = GroupedOPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=64, attn_implementation="hf_attn_patch", dropout=0.0,
    )  # fmt: skip
    model: PreTrainedModel = GroupedOPTForCausalLM(config).eval()
    return model


@works_with("peft", "LoRA on k_proj and v_proj, merged, saved", 'LoraConfig(target_modules=["k_proj", "v_proj"])')
@pytest.mark.parametrize("family", ["llama", "gqa_opt"])
def test_lora(family: str, load: Any, batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load() if family == "llama" else opt()
    assert base.config.model_type == family
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it begins as zeros, with which nothing would be tested
            torch.nn.init.normal_(parameter, std=0.1)
            assert parameter.shape[0] == 2 * 16  # HKV heads of D
    found = gradients(model, batch)
    assert len(found) == 2 * 2 * 2 and all(g.abs().sum() > 0 for g in found.values())
    model.eval()
    with torch.no_grad():
        adapted = model(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, adapted, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hf_attn_patch").eval()
        assert torch.equal(again(**batch).logits, merged(**batch).logits)


@works_with("trl", "SFTTrainer with packing", "SFTTrainer(..., args=SFTConfig(packing=True))")
def test_sft_trainer_packs_without_leaks(load: Any, tmp_path: Path) -> None:
    """The loss of packed documents is the mean over their tokens of the losses that each has alone, with eager."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in (7, 20, 12, 9)]
    arguments = trl.SFTConfig(
        str(tmp_path), packing=True, max_length=32, per_device_train_batch_size=2, max_steps=1, logging_steps=1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=load(), args=arguments, train_dataset=Dataset.from_dict({"input_ids": documents}),
        processing_class=trained_tokenizer(),
    )  # fmt: skip
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    eager, total, tokens = load("eager"), 0.0, 0
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor([document])
            total += float(eager(ids, labels=ids).loss) * (len(document) - 1)
            tokens += len(document) - 1
    assert loss == pytest.approx(total / tokens, abs=2e-4)


def history(trainer: Any, *names: str) -> list[float]:
    """What a trainer of trl logs under these names, step by step."""
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry for name in names]


def texts(*lengths: int) -> list[str]:
    return [python_sources()[1].read_text(encoding="utf-8")[: 3 * n] for n in lengths]


QUIET: dict[str, Any] = {
    "max_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
    "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 1e-3, "per_device_train_batch_size": 4,
}  # fmt: skip


@works_with("trl", "DPOTrainer, padding-free", "DPOTrainer(..., args=DPOConfig(padding_free=True))")
def test_dpo_trainer_without_padding(load: Any, tmp_path: Path) -> None:
    """The losses of padded batches with eager attention."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = {"prompt": texts(7, 20, 12, 9), "chosen": texts(9, 4, 6, 13), "rejected": texts(5, 11, 8, 3)}
    losses = []
    for implementation, free in (("hf_attn_patch", True), ("eager", False)):
        trainer = trl.DPOTrainer(
            load(implementation), load(implementation), args=trl.DPOConfig(str(tmp_path), padding_free=free, **QUIET),
            train_dataset=Dataset.from_dict(data), processing_class=trained_tokenizer(),
        )  # fmt: skip
        losses.append(history(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] == pytest.approx(math.log(2)) and losses[0][1] < 0.69


@works_with("trl", "GRPOTrainer, growing cache", 'GRPOTrainer(model=enable(model, cache="growing"), ...)')
def test_grpo_trainer_samples_and_trains_the_same(load: Any, tmp_path: Path) -> None:
    """Rewards and losses of sdpa with transformers' cache: the same tokens from the same seed, the same gradients."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    found = []
    for implementation in ("hf_attn_patch", "sdpa"):
        model = load(implementation)
        if implementation == "hf_attn_patch":
            hf_attn_patch.enable(model, cache="growing")
        torch.manual_seed(0)
        arguments = trl.GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=8, beta=0.04, **QUIET)
        trainer = trl.GRPOTrainer(
            model, reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            args=arguments, train_dataset=Dataset.from_dict({"prompt": texts(7, 20, 12, 9)}),
            processing_class=trained_tokenizer(),
        )  # fmt: skip
        found.append(history(trainer, "reward", "kl", "loss"))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][0] > 1 and found[0][4] > 0  # answers were sampled; the second step is off the reference


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    if distributed.is_initialized():
        pytest.skip("another test's process group is open")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@works_with("torch", "DistributedDataParallel", "DistributedDataParallel(hf_attn_patch.enable(model))")
@pytest.mark.usefixtures("one_process")
def test_ddp(load: Any, batch: dict[str, torch.Tensor]) -> None:
    found = gradients(torch.nn.parallel.DistributedDataParallel(load()), batch)
    for name, gradient in gradients(load("eager"), batch).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@works_with("torch", "FSDP2 (fully_shard)", "fully_shard(layer) for each layer, then fully_shard(model)")
@pytest.mark.usefixtures("one_process")
def test_fsdp2(load: Any, batch: dict[str, torch.Tensor]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (1,)), load()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = gradients(model, batch)
    for name, gradient in gradients(load("eager"), batch).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@works_with(
    "accelerate", "FSDP2 with context parallelism, packed documents",
    "with accelerator.maybe_context_parallel(buffers=[ids, position_ids, labels], ...)",
)  # fmt: skip
def test_context_parallel() -> None:
    """Two processes take the step that all documents by themselves ask for (tests/gpu has two GPUs do it)."""
    told = on_two("tests/helpers/fsdp2_on_cpu.py", "tests/helpers/accelerate_context_parallel.py")
    assert told.count("the step of each document by itself") == 2


@works_with(
    "transformers", "Trainer under FSDP2 with context parallelism, packed documents",
    'override("sdpa"); Trainer(..., args=TrainingArguments(parallelism_config=ParallelismConfig(cp_size=2)))',
)  # fmt: skip
def test_context_parallel_by_the_trainer() -> None:
    told = on_two("tests/helpers/fsdp2_on_cpu.py", "tests/helpers/trainer_context_parallel.py")
    assert told.count("the loss of each document by itself") == 2


@works_with("torch", "activation offload", "with torch.autograd.graph.save_on_cpu(): loss = model(**batch).loss")
def test_saved_tensors_may_be_moved(load: Any, batch: dict[str, torch.Tensor]) -> None:
    expected = gradients(load("eager"), batch)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(load(), batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@works_with("safetensors", "slices of a converted checkpoint", 'file.get_slice("...k_proj.weight")[:head_dim]')
def test_a_slice_is_a_head(multi_head: Path, grouped: Path) -> None:
    name, D = "model.layers.0.self_attn.k_proj.weight", 16
    with (
        safe_open(grouped / "model.safetensors", "pt") as new,
        safe_open(multi_head / "model.safetensors", "pt") as old,
    ):
        second = new.get_slice(name)[D : 2 * D]
        third_and_fourth = old.get_tensor(name).view(4, D, -1)[2:]
    torch.testing.assert_close(second, third_and_fourth.mean(0))


@works_with("torch", "torch.export", "torch.export.export(model, (ids,), strict=False)")
def test_export(load: Any, batch: dict[str, torch.Tensor]) -> None:
    model, ids = load(), batch["input_ids"][1:]
    program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    with torch.no_grad():
        out = program.module()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(out, load("eager")(ids).logits, rtol=1e-4, atol=1e-5)


@works_with("torch", "torch.compile", "torch.compile(hf_attn_patch.enable(model))")
def test_compile(load: Any, batch: dict[str, torch.Tensor]) -> None:
    compiled = torch.compile(hf_attn_patch.enable(load("eager")), backend="aot_eager", fullgraph=True)
    seen = batch["attention_mask"] == 1
    with torch.no_grad():
        expected = load("eager")(**batch).logits[seen]
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits[seen], expected, rtol=1e-4, atol=1e-5)
