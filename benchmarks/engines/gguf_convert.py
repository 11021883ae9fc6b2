"""llama.cpp's own converter, with one answer given: ``python gguf_convert.py LLAMA_CPP JOBS``.

Every line of JOBS is a folder, a format (f16, q8_0) and a file to write, and gets ``error`` beside where it fails.
The converter tells byte-level tokenizers apart by what they make of a sentence, and does not know that of a tiny model:
here every one of them splits words as GPT-2's does. Nothing else is changed; prompts are asked as tokens.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    root, jobs = sys.argv[1], Path(sys.argv[2])
    sys.path[:0] = [root, f"{root}/gguf-py"]
    base = importlib.import_module("conversion.base")  # llama.cpp's, not ours
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    script = f"{root}/convert_hf_to_gguf.py"
    done = []
    for job in map(json.loads, jobs.read_text().splitlines()):
        sys.argv = [script, job["folder"], "--outtype", job["way"], "--outfile", job["gguf"]]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:  # its answer to an architecture that it does not know, which it has logged
            job |= {"error": "the converter does not support the architecture"} if end.code else {}
        except Exception as error:
            job["error"] = f"{type(error).__name__}: {error}"
        done.append(job)
    jobs.write_text("".join(json.dumps(job) + "\n" for job in done))


if __name__ == "__main__":
    main()
