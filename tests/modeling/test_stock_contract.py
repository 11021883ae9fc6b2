"""The zoo names keywords, attributes and buffers of stock classes: each is there, and a rename is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stock_contract import broken
from zoo_cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=[c.stock for c in CASES])
def test_the_stock_classes_have_all_that_ours_name(case: Case) -> None:
    found = broken(case)
    assert not found, "\n".join(found)


#: family -> (what its stock file says, what it says instead, what must be found)
RENAMES = {
    "opt": ("self.scaling", "self.score_scale", "OPTAttention has no 'scaling', which modeling/opt.py reads"),
    "gpt_neox": (
        "position_embeddings",
        "turns",
        "'turns' is passed to GPTNeoXAttention, and modeling/gpt_neox.py does",
    ),
    "bloom": ("alibi", "slopes", "nothing passes 'alibi' to BloomAttention, which modeling/bloom.py needs"),
    "falcon": (
        "build_alibi_tensor",
        "alibi_of",
        "modeling_falcon has no 'build_alibi_tensor', which modeling/falcon.py",
    ),
    "mpt": ("position_bias", "bias", "'bias' is passed to MptAttention, and modeling/mpt.py does not know it"),
    "gpt_neo": (
        "self.layer_id",
        "self.place",
        "GPTNeoSelfAttention has no 'layer_id', which modeling/gpt_neo.py reads",
    ),
    "gptj": ("self.rotary_dim", "self.turned", "GPTJAttention has no 'rotary_dim', which modeling/gptj.py reads"),
    "codegen": (
        "self.resid_dropout",
        "self.drop",
        "CodeGenAttention has no 'resid_dropout', which modeling/codegen.py",
    ),
    "bart": ("self.is_decoder", "self.decodes", "BartAttention has no 'is_decoder', which modeling/bart.py reads"),
    "t5": ("self.n_heads", "self.heads", "T5Attention has no 'n_heads', which modeling/t5.py reads"),
    "bert": ("self.key", "self.k_proj", "BertSelfAttention has no 'key', which modeling/bert.py reads"),
}
# an interpreter in which each of these files of transformers is read with one name changed
RENAMED = """
import importlib.machinery, json, re, sys
renames = json.loads(sys.argv[1])
Loader = importlib.machinery.SourceFileLoader
get_code = Loader.get_code
def renamed(self, fullname):
    package, _, family = fullname.rpartition(".modeling_")
    if not package.startswith("transformers.models.") or family not in renames:
        return get_code(self, fullname)
    old, new = renames[family]
    text, times = re.subn(rf"\\b{re.escape(old)}\\b", new, self.get_source(fullname))
    assert times, fullname
    return compile(text, self.get_filename(fullname), "exec")
Loader.get_code = renamed
from stock_contract import broken
from zoo_cases import BY_NAME
print(json.dumps({family: broken(BY_NAME[family]) for family in renames}))
"""


def test_a_rename_is_found_and_named() -> None:
    helpers = Path(__file__).parents[1] / "helpers"
    renames = json.dumps({family: (old, new) for family, (old, new, _) in RENAMES.items()})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(helpers), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-c", RENAMED, renames], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for family, (_, _, wanted) in RENAMES.items():
        assert any(wanted in sentence for sentence in found[family]), (family, found[family])
