"""Old module paths give the new modules, themselves, and say where they are now."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_attn_patch.moved import MOVED, install

PROBE = """
import importlib, sys, warnings
for old, new in zip(sys.argv[1::2], sys.argv[2::2]):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    assert module is importlib.import_module(new), module
    assert module.__name__ == module.__spec__.name == new
    (said,) = [str(w.message) for w in seen if "hf_attn_patch" in str(w.message)]
    assert said == f"{old} is now {new}", said
"""


def fresh(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_old_path_is_the_new_module() -> None:
    olds = ["layout", "training.losses", "conversion.kvfield"]
    fresh(PROBE, *(f"hf_attn_patch.{path}" for old in olds for path in (old, MOVED[old])))


def test_every_old_path_answers() -> None:
    code = """
import importlib, warnings
warnings.simplefilter("ignore")
from hf_attn_patch.moved import MOVED
for old, new in MOVED.items():
    if "kernels" not in new:
        assert importlib.import_module(f"hf_attn_patch.{old}") is importlib.import_module(f"hf_attn_patch.{new}"), old
"""
    fresh(code)


def test_the_warning_points_at_who_imports() -> None:
    code = "import warnings; warnings.simplefilter('error')\ntry:\n    import hf_attn_patch.layout\n"
    code += "except DeprecationWarning as e:\n    print(e)"
    assert fresh(code) == "hf_attn_patch.layout is now hf_attn_patch.attn.visibility\n"
    code = "import sys, warnings\nwarnings.simplefilter('always')\n"
    code += "warnings.showwarning = lambda text, kind, file, line, *_: print(file, line, text)\n"
    code += "import hf_attn_patch\nfrom hf_attn_patch import dispatch\nhf_attn_patch.masking\nhf_attn_patch.masking\n"
    dispatch, masking = fresh(code).splitlines()
    assert dispatch == "<string> 5 hf_attn_patch.dispatch is now hf_attn_patch.attn.dispatch"
    assert masking == "<string> 6 hf_attn_patch.masking is now hf_attn_patch.hf.mask_function"


def test_names_of_a_module_that_became_a_package() -> None:
    import hf_attn_patch.cache
    import hf_attn_patch.conversion.families

    with pytest.warns(DeprecationWarning, match=r"now hf_attn_patch\.cache\.growing_cache\.GrowingCache$"):
        assert hf_attn_patch.cache.GrowingCache is hf_attn_patch.GrowingCache
    with pytest.warns(DeprecationWarning, match=r"now hf_attn_patch\.conversion\.families\.table\.register$"):
        assert callable(hf_attn_patch.conversion.families.register)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf_attn_patch.cache.nothing


def test_the_finder_is_there_once() -> None:
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before
