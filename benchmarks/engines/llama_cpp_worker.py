"""Asks llama.cpp by xllamacpp: ``python llama_cpp_worker.py JOBS ANSWERS``, in llama.cpp's environment.

The server inside answers ``/completion`` on this machine: prompts are tokens, and the log probabilities those of the
model before any sampling.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def loaded(gguf: str) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 256, 1, 0, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


def completion(url: str, job: dict[str, Any], prompt: list[int]) -> list[dict[str, Any]]:
    body = {
        "prompt": prompt, "n_predict": job["steps"], "n_probs": job["top"], "temperature": 0.0, "top_k": 1,
        "samplers": ["top_k"], "cache_prompt": False,
    }  # fmt: skip
    head = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), head), timeout=300
    ) as answer:
        steps: list[dict[str, Any]] = json.loads(answer.read())["completion_probabilities"]
    return steps


def asked(job: dict[str, Any]) -> dict[str, Any]:
    server = loaded(job["gguf"])
    steps = [completion(server.listening_address, job, prompt) for prompt in job["prompts"]]
    return {
        "tokens": [[step["id"] for step in row] for row in steps],
        "logprobs": [[{x["id"]: x["logprob"] for x in step["top_logprobs"]} for step in row] for row in steps],
    }


def main() -> None:
    jobs, answers = (Path(p) for p in sys.argv[1:3])
    with answers.open("w") as out:
        for job in map(json.loads, jobs.read_text().splitlines()):
            found: dict[str, Any] = {"version": f"llama.cpp (xllamacpp {xllamacpp.__version__})"}
            try:
                found |= asked(job)
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
