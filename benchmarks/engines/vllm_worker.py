"""Asks vLLM: ``python vllm_worker.py JOBS ANSWERS``, in vLLM's environment.

Every line of JOBS is a checkpoint to ask; its line of ANSWERS has tokens and log probabilities, or the error. Offline
all checkpoints are loaded one after another into this process: importing vLLM takes longer than asking it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
MAX_LENGTH = 64


def offline(job: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=job["folder"], dtype="float32", enforce_eager=True, max_model_len=MAX_LENGTH, max_num_seqs=8,
        model_impl=job["implementation"], trust_remote_code=job["own_code"], disable_log_stats=True,
        distributed_executor_backend="uni",
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=job["steps"], min_tokens=job["steps"], logprobs=job["top"])
    answers = [x.outputs[0] for x in llm.generate([{"prompt_token_ids": p} for p in prompts], asked, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return {
        "tokens": [list(x.token_ids) for x in answers],
        "logprobs": [[{i: p.logprob for i, p in step.items()} for step in x.logprobs] for x in answers],
    }


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text(errors='replace')[-3000:]}")
        try:
            call(f"{url}/health")
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"the server did not answer within {seconds:.0f} s")


def served(job: dict[str, Any], prompts: list[list[int]], log: Path) -> dict[str, Any]:
    """As a client of the OpenAI server sees it: tokens come as ``token_id:17`` beside the text."""
    port = free_port()
    command = [
        # `vllm serve` is the same server, but asks for a distribution called vllm, which vllm-cpu is not
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", job["folder"],
        "--served-model-name", "converted", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "8", "--max-logprobs", str(job["top"]),
        "--model-impl", job["implementation"],
    ]  # fmt: skip
    if job["own_code"]:
        command.append("--trust-remote-code")
    url = f"http://127.0.0.1:{port}"
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env) as server:
        try:
            wait_until_ready(server, url, log)
            body = {
                "model": "converted", "prompt": prompts, "temperature": 0, "max_tokens": job["steps"],
                "min_tokens": job["steps"], "logprobs": job["top"], "return_tokens_as_token_ids": True,
            }  # fmt: skip
            found = call(f"{url}/v1/completions", body)["choices"]
        finally:
            server.terminate()
            server.wait(120)
    said = [x["logprobs"] for x in sorted(found, key=lambda x: x["index"])]
    return {
        "tokens": [[token_of(t) for t in x["tokens"]] for x in said],
        "logprobs": [[{token_of(t): p for t, p in step.items()} for step in x["top_logprobs"]] for x in said],
    }


def token_of(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def main() -> None:
    import vllm

    jobs, answers = (Path(p) for p in sys.argv[1:3])
    with answers.open("w") as out:
        for job in map(json.loads, jobs.read_text().splitlines()):
            way, prompts = job["way"], job["prompts"]
            found: dict[str, Any] = {"version": f"vLLM {vllm.__version__} (CPU)"}
            try:
                found |= (
                    offline(job, prompts) if way == "offline" else served(job, prompts, answers.with_suffix(".log"))
                )
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":  # vLLM starts processes
    main()
