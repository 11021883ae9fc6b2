"""Measurements, one command and one table each: ``python benchmarks/models.py`` or ``python -m benchmarks.models``.

They import one another as ``benchmarks.*`` from the root of the repository. A script's own folder leaves ``sys.path``:
other packages would take ``kernels.py`` there for the package ``kernels`` that they look for.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

from conformance import assert_conforms
from scripts import load_script

__all__ = ["assert_conforms", "load_script"]
