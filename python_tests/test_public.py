"""The public face: names that are asked for in any order, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WAYS = (
    "import d4s; assert 'alphaedit' in d4s.methods() and isinstance(d4s.methods(), tuple)",
    "import d4s.methods.alphaedit as A; assert A.AlphaEdit.name == 'alphaedit'",
    "from d4s.methods import METHODS; assert METHODS['alphaedit'].__module__ == 'd4s.methods.alphaedit'",
)


@pytest.mark.parametrize("first", range(3))
def test_methods_is_a_function_and_a_package_whichever_is_asked_first(first):
    check = (
        "import sys, d4s\n"
        "assert d4s.methods is sys.modules['d4s.methods']\n"
        "assert tuple(d4s.methods.METHODS) == d4s.methods() == tuple(METHODS)\n"
        "from d4s import methods\n"
        "assert methods() == d4s.methods() and methods.base.Method is d4s.Method"
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((*WAYS[first:], *WAYS[:first], check))],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
