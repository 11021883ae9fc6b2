"""Where private names of others are gone, the feature that needs them fails, and ``import hf_attn_patch`` does not."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import warnings
warnings.simplefilter("ignore")
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto import auto_factory
from transformers.utils import output_capturing
from torch.utils import _python_dispatch

del _python_dispatch.TorchDispatchMode
del output_capturing._active_collector, auto_factory._LazyAutoMapping
for name in ("_is_any_autocast_enabled", "_storage_Use_Count"):
    if hasattr(torch._C, name):
        delattr(torch._C, name)
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    import hf_attn_patch, hf_attn_patch.conversion, hf_attn_patch.training
    from hf_attn_patch import enable
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
    with torch.no_grad():
        enable(model, cache="growing")
        print(model.model.layers[0].self_attn(
            torch.ones(1, 3, 16), (torch.ones(1, 3, 8), torch.zeros(1, 3, 8)), None)[0].shape)
print(*sorted({str(w.message).split(":")[0] for w in caught if "hf_attn_patch" in str(w.message)}), sep="|")
"""


def test_what_is_gone_ends_no_import() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, said = done.stdout.splitlines()[-2:]
    assert shape == "torch.Size([1, 3, 16])"
    assert said == "AutoModel does not know the grouped families|output_attentions=True gives no attentions"
