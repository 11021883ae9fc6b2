"""A checkpoint that carries its code loads where this package is not installed."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from click.testing import CliRunner
from zoo_cases import BY_NAME, CASES, output

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, convert, verify
from hf_attn_patch.modeling import remote_code

# a fresh interpreter in which hf_attn_patch cannot be imported, only transformers
LOAD = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_attn_patch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import torch, transformers
for folder in sys.argv[1:]:
    feed = torch.load(folder + "/feed.pt")
    name = feed.pop("auto")
    model, info = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.save_pretrained(folder + "/again")  # the code goes along
    again = getattr(transformers, name).from_pretrained(folder + "/again", trust_remote_code=True).eval()
    with torch.no_grad():
        out, twice = model.eval()(**feed), again(**feed)
    out, twice = (o.logits if hasattr(o, "logits") else o.logits_per_text for o in (out, twice))
    assert torch.equal(out, twice)
    torch.save(out, folder + "/out.pt")
    if not hasattr(model, "generate") or not model.can_generate():
        continue
    feed.pop("decoder_input_ids", None)
    tokens, static = {}, {"cache_implementation": "static", "disable_compile": True}
    for attention, beams, kind in (("eager", 1, {}), ("sdpa", 3, {}), ("sdpa", 1, static)):
        model.set_attn_implementation(attention)
        new = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "repetition_penalty": 1.6}
        new |= {"eos_token_id": None, "return_dict_in_generate": True}
        want = model.generate(**feed, **new, use_cache=False).sequences
        got = model.generate(**feed, **new, **kind)
        assert torch.equal(got.sequences, want), (folder, attention, beams, kind)
        cache = got["cache"] if "cache" in got else got["past_key_values"]
        cache = getattr(cache, "self_attention_cache", cache)
        assert cache.get_seq_length() == want.shape[1] - 1, (folder, attention, beams, kind)
        tokens[f"{attention} {beams}"] = want
    torch.save(tokens, folder + "/tokens.pt")
assert not any(name.split(".")[0] == "hf_attn_patch" for name in sys.modules)
"""


WITH_CODE = [case for case in CASES if case.stock != "falcon"]  # which has KV heads of its own


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Every family converted with its code and loaded in one other process: family -> (folder, its input, errors)."""
    root = tmp_path_factory.mktemp("with_code")
    feeds = {}
    for case in WITH_CODE:
        folder = root / case.stock
        case.make(None).save_pretrained(root / "stock" / case.stock)
        arguments = [str(root / "stock" / case.stock), str(folder), "--kv-heads", "2", "--with-code", "-q"]
        result = CliRunner().invoke(main, ["convert", *arguments])
        assert result.exit_code == 0, result.output
        feeds[case.stock] = case.inputs(padding="left" if case.kind == "causal" else None)
        torch.save({**feeds[case.stock], "auto": case.auto}, folder / "feed.pt")
    environment = {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    environment["OMP_NUM_THREADS"] = "1"  # several wait for each other more than they work on models this small
    command = [sys.executable, "-c", LOAD, *(str(root / case.stock) for case in WITH_CODE)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    return root, feeds, run.stderr[-3000:]


@pytest.mark.parametrize("case", WITH_CODE, ids=[c.stock for c in WITH_CODE])
def test_loads_without_this_package(case, elsewhere):
    root, feeds, errors = elsewhere
    folder = root / case.stock
    assert (folder / "out.pt").is_file(), errors
    here = getattr(transformers, case.auto).from_pretrained(folder).eval()
    assert type(here).__module__.startswith("hf_attn_patch.")
    with torch.no_grad():
        want = output(here, feeds[case.stock])
    # not bit for bit: the other process may have another number of threads
    torch.testing.assert_close(torch.load(folder / "out.pt"), want, atol=1e-5, rtol=1e-5)
    assert (folder / "tokens.pt").is_file() == case.generates, errors  # with its cache filled, and without one


def test_the_record_says_so_and_verify_agrees(tmp_path):
    BY_NAME["gpt2"].make(None).save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "new", 2, with_code=True)
    assert json.loads((tmp_path / "new" / "conversion.json").read_text())["with_code"] is True
    assert {"gpt2.py", "grouped.py", "grouping.py"} <= {p.name for p in (tmp_path / "new").iterdir()}
    assert verify(tmp_path / "stock", tmp_path / "new").ok


def test_code_that_is_not_needed_is_refused(tmp_path):
    BY_NAME["falcon"].make(None).save_pretrained(tmp_path / "stock")
    with pytest.raises(ConversionError, match="leave the option out"):
        convert(tmp_path / "stock", tmp_path / "new", 2, with_code=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("case", CASES, ids=[c.stock for c in CASES])
def test_the_files_stand_alone(case):
    for name, text in remote_code.code_files(case.ours).items():
        assert "hf_attn_patch." not in "\n".join(
            line for line in text.splitlines() if line.startswith(("from ", "import "))
        ), name
