"""Options of an uptraining run: the same from the command line and from YAML, and refused in one sentence."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from hf_attn_patch.training import TrainingError, UptrainOptions, parse_options
from hf_attn_patch.training.options import RANGES

LEAST = ["--model", "m", "--dataset", "d", "--tokens", "50M"]
#: of every option: what YAML holds, and what it means
GIVEN: dict[str, tuple[str, object]] = {
    "model": ("m", "m"), "teacher": ("t", "t"), "output": ("o", "o"), "objective": ("seq2seq", "seq2seq"),
    "dataset": ("d", "d"), "dataset_config": ("en", "en"), "dataset_split": ("test", "test"),
    "dataset_glob": ("'*.py'", "*.py"), "text_field": ("body", "body"), "source_field": ("a", "a"),
    "target_field": ("b", "b"), "text_unit": ("line", "line"), "alpha": ("5e-2", 0.05),
    "pretraining_tokens": ("1T", 10**12), "sequence_length": ("64", 64), "batch_size": ("4", 4),
    "micro_batch_size": ("2", 2), "ce": ("1", 1.0), "kl": ("0.5", 0.5), "temperature": ("2", 2.0),
    "layerwise_tokens": ("1_000", 1000), "mode": ("lora", "lora"), "lora_rank": ("8", 8), "lora_alpha": ("16", 16.0),
    "lora_targets": ("'q_proj,v_proj'", "q_proj,v_proj"), "lr": ("1e-3", 1e-3), "lr_floor": ("0.1", 0.1),
    "warmup": ("0.1", 0.1), "decay": ("wsd", "wsd"), "weight_decay": ("0", 0.0), "beta1": ("0.8", 0.8),
    "beta2": ("0.99", 0.99), "clip": ("0", 0.0), "seed": ("3", 3), "shuffle": ("no", False), "packed": ("false", False),
    "precision": ("no", "no"), "dtype": ("bfloat16", "bfloat16"), "gradient_checkpointing": ("yes", True),
    "compile": ("true", True), "attn_implementation": ("sdpa", "sdpa"), "peak_tflops": ("989", 989.0),
    "eval_dataset": ("e", "e"), "held_out_every": ("50", 50), "eval_tokens": ("1.5e3", 1500), "eval_every": ("7", 7),
    "checkpoint_every": ("9", 9), "keep": ("2", 2), "resume": ("on", True), "overwrite": ("off", False),
    "log_every": ("5", 5), "log_with": ("all", "all"),
}  # fmt: skip


def test_every_option_in_both_forms(tmp_path: Path) -> None:
    assert set(GIVEN) == {f.name for f in fields(UptrainOptions)} - {"tokens"}
    (tmp_path / "u.yaml").write_text("".join(f"{name}: {text}\n" for name, (text, _) in GIVEN.items()))
    (tmp_path / "dashes.yaml").write_text(
        "".join(f"{name.replace('_', '-')}: {text}\n" for name, (text, _) in GIVEN.items()) + "tokens: null\n"
    )
    typed = [
        f"--{name.replace('_', '-')}={'true' if value is True else 'false' if value is False else value}"
        for name, (_, value) in GIVEN.items()
    ]
    meant = {"tokens": None, **{name: value for name, (_, value) in GIVEN.items()}}
    for arguments in (["--config", str(tmp_path / "u.yaml")], ["--config", str(tmp_path / "dashes.yaml")], typed):
        assert asdict(parse_options(arguments)) == meant
    both = parse_options(["--seed", "4", "--config", str(tmp_path / "u.yaml"), "--mode", "full"])
    assert (both.seed, both.mode, both.lr) == (4, "full", 1e-3)
    assert both.budget == 5 * 10**10


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("clip", "-1", "at least 0"),  # it had turned every gradient around
        ("lr", "nan", "at least 0"),
        ("warmup", "2", "at least 0 and at most 1"),
        ("beta1", "1.0", "at least 0 and under 1"),
        ("temperature", "0", "above 0"),
        ("keep", "0", "at least 1"),
        ("log_every", "0", "at least 1"),
        ("seed", "-1", "at most 4,294,967,295"),
        ("ce", "nan", "at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=f"^--{name.replace('_', '-')} .*it must be .*{said}"):
        parse_options([*LEAST, f"--{name}={value}"])
    (tmp_path / "u.yaml").write_text(f"{name}: {value}\n")
    with pytest.raises(TrainingError, match="it must be"):
        parse_options([*LEAST, "--config", str(tmp_path / "u.yaml")])


def test_every_range_holds_the_default() -> None:
    for name, (least, most) in RANGES.items():
        default = getattr(UptrainOptions(), name)
        assert default is None or least <= default <= most, name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mode: lorra", "invalid choice: 'lorra'"),  # it had been taken, and trained adapters that nobody saved
        ("batch_size: four", "invalid int value: 'four'"),
        ("tokens: lots", "'lots' is not a number of tokens; write 50M"),
        ("shuffle: maybe", "Truthy value expected"),
    ],
)
def test_yaml_is_judged_as_the_command_line_is(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "u.yaml").write_text(text + "\n")
    name, value = text.split(": ")
    for arguments in (["--config", str(tmp_path / "u.yaml")], [f"--{name}={value}"]):
        with pytest.raises(TrainingError, match=re.escape(said)):
            parse_options([*LEAST[:4], *arguments])


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1, 2]", "is no list of options"), ("lr: [1", "can't be read: while parsing"), ("1: 2", "unknown options: 1")],
)
def test_yaml_that_holds_no_options(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "u.yaml").write_text(text)
    with pytest.raises(TrainingError, match=said) as refused:
        parse_options([*LEAST, "--config", str(tmp_path / "u.yaml")])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", [["--nonsense", "3"], ["stray"], ["--micro-batch", "1"]])
def test_what_is_no_option_is_named(wrong: list[str], capsys) -> None:
    with pytest.raises(TrainingError, match=f"there is no option {' '.join(wrong)}; --help lists all"):
        parse_options([*LEAST, *wrong])
    assert capsys.readouterr() == ("", "")  # and no usage of sixty options


def test_the_help_of_an_option_that_switches_off(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--no_shuffle, --no-shuffle Short for --shuffle false. --packed" in text  # and no "(default: False)"
    assert text.count("Shuffle the documents (in blocks). (default: True)") == 1
    assert [parse_options([*LEAST, *given]).shuffle for given in ([], ["--no_shuffle"])] == [True, False]


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(TrainingError, match="nothing would be left to train on"):
        parse_options([*LEAST, "--held-out-every", "1"])
    parse_options([*LEAST, "--held-out-every", "1", "--eval-dataset", "e"])
    with pytest.raises(TrainingError, match="choose one"):
        parse_options([*LEAST, "--resume", "--overwrite"])


@pytest.mark.parametrize("text", ["abc", "1e400", "nan", "-5x", ""])
def test_what_is_no_number_of_tokens(text: str) -> None:
    from hf_attn_patch.training import Count

    with pytest.raises(TrainingError, match="is not a number of tokens") as refused:
        Count(text)
    assert isinstance(refused.value, argparse.ArgumentTypeError)


def test_modules_may_be_a_list_in_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: m\ndataset: d\ntokens: 50M\nlora_targets: [q_proj, v_proj]\n")
    assert parse_options(["--config", str(file)]).lora_targets == "q_proj,v_proj"
    file.write_text("model: [m]\ndataset: d\ntokens: 50M\n")
    with pytest.raises(TrainingError, match="model takes one value, not a list"):
        parse_options(["--config", str(file)])
