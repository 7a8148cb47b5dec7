"""Without Tunix the library works, and `proma_jax.tunix` says what is missing."""

import subprocess
import sys

import pytest

import proma_jax as proma
from proma_jax.tunix import use_proma


def test_without_tunix_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tunix", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[tunix\]'"):
        use_proma(object(), accumulation=proma.Accumulation())


@pytest.mark.any_version
def test_the_library_does_not_import_tunix():
    program = "import sys, proma_jax; sys.exit(any('tunix' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", program], check=True)
