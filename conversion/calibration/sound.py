"""Calibration on sound, for models that write down what they hear.

A sample is what the checkpoint's own feature extractor makes of a recording, and the tokens of what is said in it: the
transcript where there is one, else what the model itself writes, drawn token by token.

Shapes: N recordings, M mel bins, F frames of features, S' frames of the encoder's output, E model width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.documents.recordings import Recording, recordings
from hf_attn_patch.documents.tokenizers import first_line
from hf_attn_patch.errors import ConversionError, TrainingError

from .babble import babble
from .gather import OWN, parse_sources
from .own_pairs import heard
from .samples import Samples, ended
from .text import tokenizer_of
from .written_pairs import written

#: recordings, and tokens of a transcript, at most
COUNT, LENGTH = 256, 96
#: samples a second of sound that is made here
BABBLED = 16_000
#: languages from here on have a token; English models have one id less
MULTILINGUAL = 51865


def sound_samples(
    plan: Plan, original: Any, calibrate: str, *, count: int | None, length: int | None, device: torch.device
) -> Samples:
    """Samples out of recordings: see :func:`~.collect.collected`.

    Raises:
        ConversionError: there are none, or they cannot be read.
    """
    wanted = COUNT if count is None else count
    limit = int(plan.config.max_target_positions)
    if length is not None and not 4 <= length <= limit:
        raise ConversionError(f"--calibration-length {length}: give 4 to {limit} tokens")
    extractor, tokenizer = extractor_of(plan), _tokenizer(plan, calibrate)
    found: list[Tensor] = []
    texts: list[str | None] = []
    about: dict[str, Any] = {"source": calibrate, "seed": plan.seed, "parts": {}}
    for name, share in parse_sources(calibrate):
        some = list(_features(_recordings(name, plan.seed), extractor, max(1, round(share * wanted))))
        if not some:
            raise ConversionError(f"--calibrate {name} holds no recording")
        about["parts"][name] = len(some)
        found += [features for features, _ in some]
        texts += [text for _, text in some]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    features, texts = torch.stack([found[i] for i in order]), [texts[i] for i in order]
    writer = Writer(plan, original, tokenizer, device)
    samples = writer.samples(features, texts, min(limit, length or LENGTH), about)
    if len(samples) < 0.9 * min(wanted, 64):
        samples.notes.append(f"only {len(samples)} recordings to calibrate on; more give a better model")
    return samples


def _babbled(seed: int) -> Iterator[Recording]:
    """Without end: a few seconds each of sound like speech (:mod:`.babble`)."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        seconds = 2 + 6 * float(torch.rand((), generator=draw))
        yield Recording(babble(seconds, BABBLED, draw), BABBLED, None, OWN)


def _recordings(name: str, seed: int) -> Iterator[Recording]:
    if name == OWN:
        yield from _babbled(seed)
    try:
        yield from recordings(name, seed)
    except TrainingError as error:
        raise ConversionError(f"--calibrate: {error}") from None


def _features(found: Iterator[Recording], extractor: Any, count: int) -> Iterator[tuple[Tensor, str | None]]:
    """Features [M, F] and transcripts of the first ``count`` recordings; longer ones than the model hears at a time
    are cut, and their transcripts, of which nobody knows which part is where, left out."""
    rate, most = int(extractor.sampling_rate), int(extractor.n_samples)
    given = 0
    for recording in found:
        pieces = [piece for piece in recording.at(rate).split(most) if len(piece) > rate // 4]
        for piece in pieces:
            if not bool(piece.isfinite().all()):
                raise ConversionError(f"{recording.name} holds samples that are not finite")
            made = extractor(piece.numpy(), sampling_rate=rate, return_tensors="pt").input_features[0]
            yield made, recording.text if len(pieces) == 1 else None
            given += 1
            if given == count:
                return


def _tokenizer(plan: Plan, calibrate: str) -> Any:
    """The checkpoint's tokenizer; None where it has none and nothing but its own words is read."""
    try:
        return tokenizer_of(plan)
    except ConversionError:
        if calibrate != OWN:
            raise
        return None


def extractor_of(plan: Plan) -> Any:
    """The checkpoint's own feature extractor."""
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(str(plan.source.folder), trust_remote_code=False)
    except Exception as error:  # of the extractor's constructor, from whatever its file holds
        raise ConversionError(
            f"--calibrate: {plan.source.name} has no feature extractor that can be loaded"
            f" ({first_line(error)}); put preprocessor_config.json beside the weights"
        ) from None


class Writer:
    """The original as it writes down what it hears.

    Args:
        device: where a copy of it runs, in fp32 on a CPU.
    """

    def __init__(self, plan: Plan, original: Any, tokenizer: Any, device: torch.device) -> None:
        self.plan, self.tokenizer = plan, tokenizer
        dtype = torch.float32 if device.type == "cpu" else original.dtype
        self.kept = original.dtype
        same = original.device == device and original.dtype == dtype
        self.model = original if same else copy.deepcopy(original).to(device, dtype)
        self.start = int(plan.config.decoder_start_token_id)
        self.end = int(plan.config.eos_token_id)

    def samples(self, features: Tensor, texts: list[str | None], length: int, about: dict[str, Any]) -> Samples:
        """Samples of ``features`` [N, M, F]; what has no text is written down, at temperature 1.

        Args:
            length: of a decoder's input, at most.
        """
        memory = heard(self.model, features).to(self.kept)
        prefix = self.prefix(memory)
        unknown = [i for i, text in enumerate(texts) if text is None]
        rows: list[list[int]] = [[] for _ in texts]
        for i, text in enumerate(texts):
            if text is not None:
                said = self.tokenizer(" " + text, add_special_tokens=False, verbose=False)["input_ids"]
                rows[i] = [*prefix[i].tolist(), *said, self.end]
        if unknown:
            said = written(
                self.model, memory[unknown], prefix[unknown], length + 1, end=self.end, seed=self.plan.seed,
                forbidden=self._marks(),
            )  # fmt: skip
            for i, row in zip(unknown, said, strict=True):
                rows[i] = row
        ids, kept, labels = ended(rows, length, prefix.shape[1], self.end)
        about |= {"samples": len(ids), "tokens": int(kept.sum()), "transcripts": len(texts) - len(unknown)}
        return Samples([features, ids], about, [], kept, labels, memory)

    @torch.no_grad()
    def prefix(self, memory: Tensor) -> Tensor:
        """What a transcript begins with [N, P]: the start, the language that the model hears, the task, no times."""
        known = {name: self._id(name) for name in ("<|transcribe|>", "<|notimestamps|>")}
        columns = [torch.full((len(memory),), self.start)]
        languages = self._languages()
        if languages and known["<|transcribe|>"] is not None:
            decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
            said = []
            for part in memory.split(16):
                ids = torch.full((len(part), 1), self.start, device=self.model.device)
                hidden = decoder(input_ids=ids, encoder_hidden_states=part.to(self.model.device, self.model.dtype))[0]
                said.append(head(hidden[:, -1])[:, languages].argmax(-1).cpu())
            columns += [torch.tensor(languages)[torch.cat(said)], torch.full_like(columns[0], known["<|transcribe|>"])]
        if known["<|notimestamps|>"] is not None:
            columns.append(torch.full_like(columns[0], known["<|notimestamps|>"]))
        return torch.stack(columns, 1)

    def _id(self, word: str) -> int | None:
        found = None if self.tokenizer is None else self.tokenizer.convert_tokens_to_ids(word)
        words = self.plan.config.vocab_size
        return None if found is None or found == self.tokenizer.unk_token_id or found >= words else int(found)

    def _languages(self) -> list[int]:
        """The ids of languages, if the model has more than one."""
        if self.plan.config.vocab_size < MULTILINGUAL:
            return []
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        return [i for i in (self._id(f"<|{name}|>") for name in LANGUAGES) if i is not None]

    def _marks(self) -> Tensor:
        """Ids that are no words: what stands before a transcript, and times."""
        special = () if self.tokenizer is None else self.tokenizer.all_special_ids
        ids = {i for i in special if i < self.plan.config.vocab_size} - {self.end}
        last = self._id("<|notimestamps|>")
        if last is not None:
            ids |= set(range(last, self.plan.config.vocab_size))
        return torch.tensor(sorted(ids), dtype=torch.int64)
