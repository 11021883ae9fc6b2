"""The paper's figure in small: that the script does what it says (its numbers need its full length)."""

import json

import torch
from click.testing import CliRunner
from scripts import load_script

script = load_script("examples/t5_paper.py")


def test_a_run_of_few_steps(tmp_path):
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--steps", "20", "--pairs", "60", "--seeds", "1", "--alpha", "0.1"]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 0, result.output
    results = json.loads((out / "results.json").read_text())
    for method in script.METHODS:
        (converted,), (uptrained,) = results[method]["converted"], results[method]["uptrained"]
        assert 0 < uptrained < converted + 1
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "after 2 more steps" in result.output


def test_pairs_are_real():
    pairs = list(script.functions(30, script.installed()))
    assert len(pairs) == 30
    for code, line in pairs:
        assert code.startswith("def ")
        assert line not in code


SOURCES = {
    "a.py": 'def add(a, b):\n    """The sum of two numbers.\n\n    More of it.\n    """\n    return a + b\n',
    "deep/b.py": 'def f(x):\n    """Raise what is missing."""\n    raise KeyError("Raise what is missing.")\n',
    "deep/c.py": 'def again(a):\n    """The sum of two numbers."""\n    return a\n',
    "deep/d.py": 'def short():\n    """Short."""\n    return 1\n',
    "deep/broken.py": "def (:\n",
    "tests/e.py": 'def tested():\n    """Not to be learned from."""\n    return 1\n',
}


def test_a_docstring_once_and_never_with_code_that_holds_it(tmp_path):
    for where in ("x", "tests"):  # a folder named like tests above them does not hide them
        for name, text in SOURCES.items():
            path = tmp_path / where / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    found = [list(script.functions(9, [tmp_path / where])) for where in ("x", "tests")]
    assert found[0] == found[1]
    ((code, line),) = found[0]
    assert line == "The sum of two numbers."
    assert code in ("def add(a, b):\n    return a + b", "def again(a):\n    return a")


def test_the_loss_counts_real_tokens_only():
    model = script.T5ForConditionalGeneration(
        script.T5Config(vocab_size=20, d_model=16, d_kv=4, num_heads=4, d_ff=16, num_layers=1, decoder_start_token_id=0)
    )
    source = torch.tensor([[5, 6, 1, 0, 0], [7, 1, 0, 0, 0]])
    target = torch.tensor([[3, 1, 0, 0], [4, 9, 8, 1]])
    alone = [(script.held_out_loss(model, source[i : i + 1], target[i : i + 1]), n) for i, n in ((0, 2), (1, 4))]
    want = sum(loss * n for loss, n in alone) / 6
    assert abs(script.held_out_loss(model, source, target) - want) < 1e-5
