"""Does a longer history help? A year of hourly prices, forecast by a transformer that sees a week, a month, a year.

    python examples/hourly_forecast.py [--csv FILE --column NAME] [--steps 600] [--output FOLDER]

A transformer reads 8,760 hours and forecasts the next 24 from every hour on; its context is a sliding window, so one
pass over the series trains every window of it. The last tenth of the year is held out. Printed: error per context and
number of KV heads, against the price of the same hour one week ago; bytes of KV cache; latency of one forecast (the
whole history read, with standard attention and with hf_attn_patch, and one more hour on a KV cache); time and memory of
one pass over the year; and whether the longer history helped. Without a CSV of yours, a market is generated: daily,
weekly and yearly seasons, two regimes, noise. A few minutes on a GPU; two CPU cores do a short form in half an hour.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, MistralConfig, MistralModel

import hf_attn_patch
from hf_attn_patch.compat.cache_keyword import keyword_of

HORIZON = 24
CONTEXTS = {"week": 168, "month": 720, "year": 8760}
HEADS = 8


def generated_market(hours: int = 8760, seed: int = 0) -> Tensor:
    """Prices [hours] with seasons, a calm and a wild regime, and noise with memory; drawn, not real."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(hours, dtype=torch.float64)
    day, week, year = (2 * math.pi * t / period for period in (24, 168, 8760))
    price = 60 + 12 * torch.sin(day - 2) + 6 * torch.sin(2 * day) + 7 * torch.cos(week) + 15 * torch.cos(year)
    switch, drawn = torch.rand(hours, generator=rng), torch.randn(hours, generator=rng, dtype=torch.float64)
    wild, level = False, 0.0
    for hour in range(hours):
        wild = bool(switch[hour] > 0.01) if wild else bool(switch[hour] < 0.003)
        level = 0.97 * level + (4.0 if wild else 1.0) * float(drawn[hour])
        price[hour] += level + (10.0 if wild else 0.0)
    return price.float()


def read_csv(path: Path, column: str | None) -> Tensor:
    """One column of prices, an hour a row; where another column holds times, they are held to that."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as CSV: {error}") from None
    names = [name for name in rows[0] if name] if rows else []
    name = column or (names[-1] if names else "")
    if name not in names:
        raise SystemExit(f"{path} has no column {name!r}; it has {', '.join(map(str, names)) or 'no rows'}")
    if is_number(name):
        raise SystemExit(f"{path} has no header: its first line is {','.join(names)}; put one above it, say time,price")
    prices = []
    for line, row in enumerate(rows, 2):
        try:
            prices.append(float(row[name]))
        except (TypeError, ValueError):
            raise SystemExit(f"{path}, line {line}: {row[name]!r} in column {name!r} is no number") from None
        if not math.isfinite(prices[-1]):
            raise SystemExit(f"{path}, line {line}: {row[name]!r} in column {name!r} is not finite; fill the gap first")
    check_hours(path, rows, [other for other in names if other != name])
    return torch.tensor(prices)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_hours(path: Path, rows: list[dict[str, str]], columns: list[str]) -> None:
    """Refuse rows that are not an hour apart, by the first of ``columns`` that holds times (ISO 8601).

    Local times skip an hour in spring and have one twice in autumn, on a Sunday night; the rows are an hour apart all
    the same.
    """
    for column in columns:
        try:
            before = datetime.fromisoformat(rows[0][column])
        except (TypeError, ValueError):
            continue
        if ":" not in rows[0][column]:  # a date alone
            continue
        for line, row in enumerate(rows[1:], 3):
            try:
                now = datetime.fromisoformat(row[column])
                hours = (now - before) / timedelta(hours=1)
            except (TypeError, ValueError):
                raise SystemExit(f"{path}, line {line}: {row[column]!r} in column {column!r} is no time") from None
            summer_time = now.tzinfo is None and now.weekday() == 6 and now.hour <= 3 and hours in (0, 2)
            if hours != 1 and not summer_time:
                raise SystemExit(
                    f"{path}, line {line}: {now} is {hours:g} hours after {before}; sort the rows, fill missing "
                    "hours and remove doubled ones first"
                )
            before = now
        return


def features(prices: Tensor) -> Tensor:
    """[S, 6]: the price, the hour of the day and of the week as points on circles, and the change since yesterday."""
    t = torch.arange(len(prices))
    circles = [f(2 * math.pi * t / period) for period in (24, 168) for f in (torch.sin, torch.cos)]
    change = prices - torch.cat([prices[:1].expand(24), prices[:-24]])
    return torch.stack([prices, *circles, change], dim=-1)


class Forecaster(nn.Module):
    """Price history in, the next 24 prices out, at every hour; attention looks back over ``context`` hours.

    The forecast is a correction of last week's prices, so an untrained model already is the seasonal guess.
    """

    def __init__(self, context: int, kv_heads: int, width: int, layers: int, attention: str) -> None:
        super().__init__()
        config = MistralConfig(
            vocab_size=1, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=HEADS, num_key_value_heads=kv_heads, head_dim=width // HEADS,
            sliding_window=context, max_position_embeddings=8760, pad_token_id=None, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        body: MistralModel = AutoModel.from_config(config, attn_implementation=attention)
        self.embed, self.body, self.head = nn.Linear(6, width), body, nn.Linear(width, HORIZON)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, 6] -> corrections [B, S, 24]."""
        return self.head(self.body(inputs_embeds=self.embed(x), use_cache=False)[0])

    @torch.no_grad()
    def cached_step(self, x: Tensor) -> Callable[[], Tensor]:
        """A forecast for one more hour when all of ``x`` [1, S, 6] is in the KV cache already."""
        cache = hf_attn_patch.GrowingCache(config=self.body.config)
        cached = {keyword_of(self.body.forward): cache, "use_cache": True}
        self.body(inputs_embeds=self.embed(x), **cached)

        def step() -> Tensor:
            new = self.embed(x[:, -1:])
            return self.head(self.body(inputs_embeds=new, **cached)[0])

        return step

    @property
    def kv_bytes(self) -> int:
        """Of a full context, in fp32."""
        c = self.body.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * c.sliding_window * 4


@dataclass
class Data:
    """The series as features [1, S, 6], what is to come [S, 24] and last week's prices for the same hours [S, 24]."""

    x: Tensor
    future: Tensor
    naive: Tensor
    cut: int
    scale: float

    @classmethod
    def of(cls, prices: Tensor, device: str) -> Data:
        cut = int(len(prices) * 0.9)
        mean, scale = prices[:cut].mean(), prices[:cut].std()  # of the training hours alone
        p = (prices - mean) / scale
        hours = torch.arange(len(p) - HORIZON)[:, None] + 1 + torch.arange(HORIZON)
        naive = p[(hours - 168).clamp(min=0)]
        x = features(p)[None, : len(hours)]
        return cls(x.to(device), p[hours].to(device), naive.to(device), cut, float(scale))

    def errors(self, corrections: Tensor) -> Tensor:
        """Absolute errors [S, 24] in the data's own unit."""
        return (self.naive + corrections[0] - self.future).abs() * self.scale


def train(data: Data, model: Forecaster, steps: int, lr: float, name: str) -> Tensor:
    """Train on the first nine tenths; return the held-out errors [hours, 24]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    # a forecast may not be trained on prices after the cut
    seen = data.cut - HORIZON
    for step in (bar := tqdm(range(steps), desc=name, leave=False)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
        out = model(data.x[:, :seen])
        loss = (data.naive[168:seen] + out[0, 168:] - data.future[168:seen]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(mae=f"{float(loss.detach()) * data.scale:.3f}", refresh=False)
    with torch.no_grad():
        return data.errors(model.eval()(data.x))[data.cut :]


def timed(call: Callable[[], Tensor], device: str, repeats: int = 3) -> tuple[float, int | None]:
    """(seconds, peak bytes on a GPU) of a call; the first of it warms up."""
    best = math.inf
    for repeat in range(repeats + 1):
        if on_gpu := device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.no_grad():
            call()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start) if repeat else best
    return best, torch.cuda.max_memory_allocated() if on_gpu else None


def helped(short: Tensor, long: Tensor) -> str:
    """Whether the errors [hours, 24] of the longer history are smaller, judged day by day (days are nearly apart)."""
    days = len(short) // 24
    gain = (short - long).mean(1)[: days * 24].reshape(days, 24).mean(1)
    mean, error = float(gain.mean()), float(gain.std() / math.sqrt(days))
    verdict = "helped" if mean > 2 * error else "hurt" if mean < -2 * error else "made no clear difference"
    return f"{verdict} ({mean:+.3f} +- {error:.3f} less error)"


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, Tensor]:
    """The options, checked, and the prices that they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="with a header and an hour a row, in order")
    parser.add_argument("--column", help="of the prices; the last one if not given")
    parser.add_argument("--hours", type=int, default=8760, help="of the generated market")
    parser.add_argument("--steps", type=int, help="of training, each over the whole year; 600, on a CPU 30")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("hourly-forecast-output"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.width % (2 * HEADS):
        parser.error(f"--width {args.width} is no multiple of {2 * HEADS}: {HEADS} heads of an even size make it up")
    args.steps = (30 if args.device == "cpu" else 600) if args.steps is None else args.steps
    if min(args.steps, args.layers) < 1:
        parser.error("--steps and --layers start at 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {args.output} can't be made: {error.strerror}")
    prices = read_csv(args.csv, args.column) if args.csv else generated_market(args.hours)
    if len(prices) < 1000:
        raise SystemExit(f"{len(prices)} hours are too few: of 1,000 on there is something to train on and to hold out")
    if prices.min() == prices.max():
        raise SystemExit(f"the price is {prices[0]:g} throughout: there is nothing to forecast")
    return args, prices


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    args, prices = parsed(arguments)
    if len(prices) < CONTEXTS["year"]:
        print(f'These are {len(prices):,} hours: "a year" below is all of them that came before.\n')
    data = Data.of(prices, args.device)

    def make(context: int, kv_heads: int, attention: str = "hf_attn_patch") -> Forecaster:
        torch.manual_seed(0)
        return Forecaster(context, kv_heads, args.width, args.layers, attention).to(args.device)

    kinds = {"MHA": HEADS, "GQA 4:1": HEADS // 4, "MQA": 1}
    errors: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    print("| context | KV heads | KV bytes | error, 24 hours ahead | ms a forecast, standard | ours | ours, cached |")
    print("|---|---|---|---|---|---|---|")
    naive = data.errors(torch.zeros(1, 1, HORIZON, device=args.device))[data.cut :]
    for name, context in CONTEXTS.items():
        for kind, kv_heads in kinds.items():
            model = make(context, kv_heads)
            errors[f"{name} {kind}"] = train(data, model, args.steps, args.lr, f"{name} {kind}")
            sizes[f"{name} {kind}"] = model.kv_bytes
            window = data.x[:, -context:]
            latency = {}
            for attention in ("eager", "hf_attn_patch"):
                model.body.set_attn_implementation(attention)
                latency[attention] = timed(functools.partial(model, window), args.device)[0] * 1e3
            latency["cached"] = timed(model.cached_step(window), args.device, repeats=8)[0] * 1e3
            off = float(errors[f"{name} {kind}"].mean())
            speed = " | ".join(f"{ms:.1f}" for ms in latency.values())
            print(f"| {name} | {kind} ({kv_heads}) | {model.kv_bytes:,} | {off:.3f} | {speed} |", flush=True)
    print(f"| same hour last week | | | {float(naive.mean()):.3f} | | | |")

    whole = {}
    for attention in ("eager", "hf_attn_patch"):
        model = make(CONTEXTS["year"], HEADS, attention)
        whole[attention] = timed(functools.partial(model, data.x), args.device, repeats=1)
    S = data.x.shape[1]
    print(f"\nOne pass over all {S:,} hours: {whole['eager'][0]:.3f} s with standard attention, "
          f"{whole['hf_attn_patch'][0]:.3f} s with ours; standard attention's scores alone are "
          f"{HEADS * S * S * 4 / 2**20:,.0f} MiB a layer")  # fmt: skip
    if whole["eager"][1] is not None:
        peaks = [f"{(peak or 0) / 2**20:,.0f} MiB" for _, peak in whole.values()]
        print(f"peak memory: {peaks[0]} with standard attention, {peaks[1]} with ours")
    print(f"\nA month instead of a week {helped(errors['week MHA'], errors['month MHA'])}.")
    print(f"A year instead of a week {helped(errors['week MHA'], errors['year MHA'])}.")
    draw(errors, sizes, naive, list(kinds), args.output)
    return errors


def draw(errors: dict[str, Tensor], sizes: dict[str, int], naive: Tensor, kinds: list[str], folder: Path) -> None:
    """Error over hours ahead for each context, and over bytes of KV cache."""
    try:
        import matplotlib
    except ImportError:
        print("(no figure: pip install 'hf-attn-patch[plot]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    ahead = range(1, HORIZON + 1)
    for name in CONTEXTS:
        left.plot(ahead, errors[f"{name} {kinds[0]}"].mean(0).cpu(), label=f"a {name} of history")
        points = [(sizes[f"{name} {kind}"], float(errors[f"{name} {kind}"].mean())) for kind in kinds]
        right.plot(*zip(*points, strict=True), "o-", label=f"a {name}")
        for kind, point in zip(kinds, points, strict=True):
            right.annotate(kind, point, xytext=(3, 4), textcoords="offset points", fontsize=7)
    left.plot(ahead, naive.mean(0).cpu(), color="grey", label="same hour last week")
    left.set(xlabel="hours ahead", ylabel="mean absolute error, held-out hours", title=kinds[0])
    right.set(xlabel="bytes of KV cache, a full context", xscale="log", title="the next 24 hours")
    left.legend()
    right.legend()
    figure.savefig(folder / "hourly_forecast.png", dpi=150)
    print(f"Figure: {folder / 'hourly_forecast.png'}")


if __name__ == "__main__":
    main()
