"""Asks CTranslate2: ``python ctranslate2_worker.py JOBS ANSWERS``, in its environment, by its own converter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np


def asked(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Greedy tokens with its cache, then the log probabilities of the whole text in one pass."""
    ctranslate2.converters.TransformersConverter(job["folder"]).convert(str(folder), quantization="float32", force=True)
    generator = ctranslate2.Generator(str(folder), compute_type="float32", intra_threads=1)
    words = json.loads((folder / "vocabulary.json").read_text())
    steps, tokens, logprobs = job["steps"], [], []
    for prompt in job["prompts"]:
        found = generator.generate_batch(
            [[words[i] for i in prompt]], max_length=steps, min_length=steps, sampling_topk=1,
            include_prompt_in_result=False,
        )  # fmt: skip
        tokens.append(list(found[0].sequences_ids[0]))
        scores = np.array(generator.forward_batch([prompt + tokens[-1]], return_log_probs=True))
        rows = scores[0, len(prompt) - 1 : -1]
        logprobs.append([{int(i): float(row[i]) for i in np.argsort(-row)[: job["top"]]} for row in rows])
    return {"tokens": tokens, "logprobs": logprobs}


def main() -> None:
    jobs, answers = (Path(p) for p in sys.argv[1:3])
    with answers.open("w") as out:
        for number, job in enumerate(map(json.loads, jobs.read_text().splitlines())):
            found: dict[str, Any] = {"version": f"CTranslate2 {ctranslate2.__version__}"}
            try:
                found |= asked(job, answers.with_suffix(f".{number}"))
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
