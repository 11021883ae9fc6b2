"""Sources of this package that run without it: a module, and all of ours that it imports, as files of one folder."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_ABSOLUTE = re.compile(r"^( *from )(hf_attn_patch(?:\.\w+)*)\.(\w+)( import)", re.MULTILINE)
_RELATIVE = re.compile(r"^ *from \.(\w+) import", re.MULTILINE)
#: what other packages are called: files of these names would be theirs for whoever has the folder on the path
_TAKEN = {"torch", "transformers", "triton"}


def standalone_files(module: str, file: str | None = None) -> dict[str, str]:
    """The files that ``module`` needs, name -> text: its own and all that it imports from here, imports relative.

    Args:
        module: of this package, by its full name.
        file: what its own file is called; None: as here.

    >>> sorted(standalone_files("hf_attn_patch.grouping"))
    ['errors.py', 'grouping.py']
    """
    wanted, files = [module], {}
    while wanted:
        name = wanted.pop()
        target = file if file is not None and name == module else f"{_file_of(name)}.py"
        if target in files:
            continue
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        text = Path(spec.origin).read_text(encoding="utf-8")
        files[target] = _ABSOLUTE.sub(lambda m: f"{m[1]}.{_file_of(f'{m[2]}.{m[3]}')}{m[4]}", text)
        wanted += [f"{name.rpartition('.')[0]}.{other}" for other in _RELATIVE.findall(text)]
        wanted += [f"{package}.{other}" for _, package, other, _ in _ABSOLUTE.findall(text)]
    return files


def _file_of(module: str) -> str:
    package, _, name = module.rpartition(".")
    return f"{package.rpartition('.')[2]}_{name}" if name in _TAKEN else name
