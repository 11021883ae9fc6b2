"""Every example, in a small form."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone

import pytest
import torch
from scripts import load_script, start_script
from tiny import save_tiny, tiny_llama
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration


def test_generate(tmp_path, capsys):
    before, after = save_tiny(tmp_path / "mha", tiny_llama(4)), save_tiny(tmp_path / "gqa", tiny_llama(1))
    main = load_script("examples/generate.py").main
    rows = main([before, after, "--max-new-tokens", "6", "--device", "cpu", "--prompt", "import"])
    assert [row["attention"] for row in rows] == ["sdpa", "hf_attn_patch", "hf_attn_patch"]
    assert rows[0]["text"] == rows[1]["text"]  # the same model says the same, whatever its attention
    # two layers, K and V, heads of 16, fp32
    assert [row["kv"] for row in rows] == [2 * 2 * 4 * 16 * 4] * 2 + [2 * 2 * 1 * 16 * 4]
    assert "tokens/s" in capsys.readouterr().out


def test_generate_with_an_encoder(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=32, vocab_size=512, decoder_start_token_id=0, pad_token_id=0
    )
    path = save_tiny(tmp_path / "t5", T5ForConditionalGeneration(config))
    rows = load_script("examples/generate.py").main([path, "--max-new-tokens", "6", "--device", "cpu"])
    assert rows[0]["text"] == rows[1]["text"]
    assert len(rows[0]["text"]) == 6
    assert [row["kv"] for row in rows] == [2 * 2 * 4 * 8 * 4] * 2  # of the decoder's own tokens


def test_long_context():
    rows = load_script("examples/long_context.py").main(["--tokens", "64", "128", "--shape", "tiny", "--device", "cpu"])
    assert [row["standard"] for row in rows] == [2 * 4 * S * S * 4 for S in (64, 128)]
    # a random model over 256 words
    assert all(abs(row["loss"] - torch.log(torch.tensor(256.0)).item()) < 0.5 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate.py", "nowhere/at-all"], "nowhere/at-all cannot be loaded with sdpa"),
        (["generate.py", "{mha}", "--before", "flash_attention_9"], "cannot be loaded with flash_attention_9"),
        (["generate.py", "{mha}", "--prompt", ""], "makes no token of ''"),
        (["generate.py", "{mha}", "--device", "nonsense"], "--device nonsense: "),
        (["generate.py", "{mha}", "--max-new-tokens", "300"], "has 256 positions: shorten the prompt or lower"),
        (["generate.py", "{bert}"], "BertForMaskedLM generates no text"),
        (["long_context.py", "--model", "{t5}", "--tokens", "64"], r"\(t5\) is not built like Llama"),
        (["long_context.py", "--tokens", "1"], "--tokens starts at 2"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_tiny(tmp_path / "mha", tiny_llama(4))
    T5Config(d_model=8, d_kv=4, num_layers=1, num_heads=2, d_ff=8, vocab_size=16).save_pretrained(tmp_path / "t5")
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=512)
    save_tiny(tmp_path / "bert", BertForMaskedLM(bert))
    script, *words = (a.format(mha=tmp_path / "mha", t5=tmp_path / "t5", bert=tmp_path / "bert") for a in arguments)
    with pytest.raises(SystemExit) as refused:
        load_script(f"examples/{script}").main(words)
    assert re.search(message, f"{refused.value} {capsys.readouterr().err}")


def test_hourly_forecast(tmp_path, capsys):
    script = load_script("examples/hourly_forecast.py")
    prices = script.generated_market(1200)
    path = tmp_path / "prices.csv"
    path.write_text("hour,price\n" + "".join(f"{i},{float(p)}\n" for i, p in enumerate(prices)))
    arguments = ["--csv", str(path), "--steps", "3", "--width", "32", "--layers", "1", "--output", str(tmp_path)]
    errors = script.main([*arguments, "--device", "cpu"])
    assert set(errors) == {f"{c} {k}" for c in ("week", "month", "year") for k in ("MHA", "GQA 4:1", "MQA")}
    shown = capsys.readouterr().out
    # GQA 4:1 keeps a quarter of MHA's bytes and MQA an eighth
    found = [int(n.replace(",", "")) for n in re.findall(r"\| week \| [^|]*\| ([\d,]+) \|", shown)]
    assert found == [found[0], found[0] // 4, found[0] // 8]
    assert re.search(r"A year instead of a week (helped|hurt|made no clear difference) \([+-]\d", shown)
    assert "These are 1,200 hours" in shown
    assert (tmp_path / "hourly_forecast.png").stat().st_size > 10_000


def test_a_longer_history_is_judged_by_days():
    """30 days of errors that are 1 smaller in the mean: clear if they differ by little from day to day, else not."""
    helped = load_script("examples/hourly_forecast.py").helped
    short = torch.full((30 * 24 + 5, 24), 10.0)
    days = torch.arange(30 * 24 + 5)[:, None] // 24 % 2 * 2.0 - 1  # -1 and +1 by turns
    assert helped(short, short - 1 + 0.1 * days).startswith("helped (+1.000 +- 0.019")
    assert helped(short - 1 + 0.1 * days, short).startswith("hurt (-1.000")
    assert helped(short, short - 1 + 10 * days).startswith("made no clear difference")


def test_prices_that_cannot_be_used_are_refused(tmp_path):
    script, path = load_script("examples/hourly_forecast.py"), tmp_path / "prices.csv"
    for text, column, message in (
        ("a,b\n1,2\n", "c", "no column 'c'; it has a, b"),
        ("a,b\n1,2\n1,x\n", None, "line 3: 'x' in column 'b' is no number"),
        ("a,b\n1,nan\n", "b", "line 2: 'nan' in column 'b' is not finite"),
        ("a,b\n1,2\n", None, "1 hours are too few"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit, match=message):
            script.main(["--csv", str(path), *(["--column", column] if column else [])])


def hourly(hours, start="2023-01-01T00:00") -> list[datetime]:
    return [datetime.fromisoformat(start) + timedelta(hours=i) for i in range(hours)]


def test_rows_that_are_not_an_hour_apart_are_refused(tmp_path):
    """They had been taken for consecutive hours: after a gap, every hour of the day was another one."""
    script, path = load_script("examples/hourly_forecast.py"), tmp_path / "prices.csv"

    def read(times) -> int:
        path.write_text("time,price\n" + "".join(f"{t.isoformat()},{i}\n" for i, t in enumerate(times)))
        return len(script.read_csv(path, None))

    year = hourly(8760)
    assert read(year) == 8760
    for times, message in (
        (year[:100] + year[101:], "line 102: 2023-01-05 05:00:00 is 2 hours after 2023-01-05 03:00:00; sort the rows"),
        (year[:100] + year[99:], "line 102: .* is 0 hours after"),
        (year[::-1], "line 3: .* is -1 hours after"),
    ):
        with pytest.raises(SystemExit, match=message):
            read(times)
    # a year of local time: 26 March has no 02:00, 29 October has it twice
    spring, autumn = year.index(datetime(2023, 3, 26, 2)), year.index(datetime(2023, 10, 29, 3))
    assert read(year[:spring] + year[spring + 1 : autumn] + year[autumn - 1 :]) == 8760
    zones = [t.astimezone(timezone(timedelta(hours=1 + (spring <= i < autumn)))) for i, t in enumerate(
        t.replace(tzinfo=timezone.utc) for t in year)]  # fmt: skip
    assert read(zones) == 8760
    with pytest.raises(SystemExit, match="2 hours after"):  # with offsets there is nothing to guess
        read(zones[:spring] + zones[spring + 1 :])
    path.write_text("date,hour,price\n" + "".join(f"{t.date()},{t.hour},{i}\n" for i, t in enumerate(year[:50])))
    assert len(script.read_csv(path, None)) == 50


def test_prices_without_a_header_or_without_change_are_refused(tmp_path):
    script, path = load_script("examples/hourly_forecast.py"), tmp_path / "prices.csv"
    path.write_text("".join(f"{i}.5\n" for i in range(2000)))
    with pytest.raises(SystemExit, match=r"has no header: its first line is 0\.5; put one above it"):
        script.main(["--csv", str(path), "--output", str(tmp_path)])
    path.write_text("price\n" + "5\n" * 2000)
    with pytest.raises(SystemExit, match="the price is 5 throughout"):  # its errors had been NaN
        script.main(["--csv", str(path), "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "said"), [(["--steps", "0"], "start at 1"), (["--output", "{file}/x"], "can't be made")]
)
def test_a_forecast_that_could_not_be_drawn_is_refused_before_it_is_made(tmp_path, capsys, words, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        load_script("examples/hourly_forecast.py").main([w.format(file=tmp_path / "file") for w in words])
    assert said in capsys.readouterr().err


def test_a_forecast_on_the_cache_is_that_of_the_whole_history():
    """The cached step reads one hour; it says what a pass over the history and that hour once more says of the last."""
    script = load_script("examples/hourly_forecast.py")
    torch.manual_seed(0)
    model = script.Forecaster(16, 2, 32, 2, "hf_attn_patch").eval()
    torch.nn.init.normal_(model.head.weight)
    x = torch.randn(1, 40, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            model.cached_step(x)()[:, -1], model(torch.cat([x, x[:, -1:]], 1))[:, -1], atol=1e-5, rtol=1e-4
        )


def test_a_forecast_does_not_see_the_future():
    """Prices after the cut may change what is held out, not what the model is trained on or says before them."""
    script = load_script("examples/hourly_forecast.py")
    prices = script.generated_market(1200)
    changed = prices.clone()
    changed[1080:] += 100
    a, b = script.Data.of(prices, "cpu"), script.Data.of(changed, "cpu")
    seen = a.cut - script.HORIZON
    assert torch.equal(a.x[:, :seen], b.x[:, :seen])
    assert torch.equal(a.future[:seen], b.future[:seen])
    assert torch.equal(a.naive[:seen], b.naive[:seen])
    # row t is told hours up to t, and asked for t + 1 and on
    mean, scale = prices[: a.cut].mean(), prices[: a.cut].std()
    torch.testing.assert_close(a.x[0, 500, 0] * scale + mean, prices[500])
    torch.testing.assert_close(a.future[500] * scale + mean, prices[501:525])
    torch.testing.assert_close(a.naive[500] * scale + mean, prices[333:357])


@pytest.mark.slow
def test_encoder_decoder(tmp_path):
    process = start_script(
        "examples/encoder_decoder.py", "--output", str(tmp_path), "--tokens", "40k", "--width", "32",
        "--sequence-length", "64",
    )  # fmt: skip
    out = process.communicate()[0]
    assert process.returncode == 0, out
    assert re.search(r"\| 2 KV heads, uptrained \| \d\.\d{3} \|", out), out
    assert "is filled with" in out


@pytest.mark.slow
def test_demo(tmp_path):
    process = start_script("examples/demo.py", "--size", "tiny", "--output", str(tmp_path))
    out = process.communicate()[0]
    assert process.returncode == 0, out
    rows = re.findall(r"^\| ([a-z-]+) \| (\d) \| ([\d,]+) \| .* \| (\d\.\d+) \| (\d\.\d+) \|$", out, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("multi-head", "8"), *((method, heads) for heads in "21" for method in ("mean", "aligned", "calibrated"))
    ]  # fmt: skip
    # K and V, two layers, heads of 8, fp32
    assert [int(row[2].replace(",", "")) for row in rows] == [2 * 2 * 8 * 4 * int(row[1]) for row in rows]
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found[0]["kl"] == 0.0  # of the original to itself
    assert all(e["kl"] > 0 for e in found[1:])
    assert "--calibrate YOUR_TEXT" in out
    assert (tmp_path / "quality_over_kv_bytes.png").exists()
