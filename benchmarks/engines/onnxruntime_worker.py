"""Asks ONNX Runtime: ``python onnxruntime_worker.py JOBS ANSWERS``, in its environment, by torch's own exporter.

The model is exported without a cache: every step reads the whole text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers


class Logits(torch.nn.Module):
    """A causal language model as a function from ids [1, S] to logits [1, S, V]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def asked(job: dict[str, Any], file: Path) -> dict[str, Any]:
    """Greedy tokens, and the log probabilities on the way."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    length = torch.export.Dim("length", min=2, max=model.config.max_position_embeddings)
    torch.onnx.export(
        Logits(model.eval()), (torch.tensor([job["prompts"][0]]),), str(file), dynamo=True, input_names=["ids"],
        output_names=["logits"], dynamic_shapes={"ids": {1: length}}, external_data=False, verbose=False,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    tokens, logprobs = [], []
    for prompt in job["prompts"]:
        text, steps = list(prompt), []
        for _ in range(job["steps"]):
            row = session.run(None, {"ids": np.array([text])})[0][0, -1].astype(np.float64)
            row -= row.max() + np.log(np.exp(row - row.max()).sum())
            steps.append({int(i): float(row[i]) for i in np.argsort(-row)[: job["top"]]})
            text.append(int(row.argmax()))
        tokens.append(text[len(prompt) :])
        logprobs.append(steps)
    return {"tokens": tokens, "logprobs": logprobs}


def main() -> None:
    jobs, answers = (Path(p) for p in sys.argv[1:3])
    version = f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__.split('+')[0]}"
    with answers.open("w") as out:
        for number, job in enumerate(map(json.loads, jobs.read_text().splitlines())):
            found: dict[str, Any] = {"version": version}
            try:
                found |= asked(job, answers.with_suffix(f".{number}.onnx"))
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
