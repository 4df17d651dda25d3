"""The extension itself: what it does is tested where it is used."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

import bitring
from bitring.arrays import NUMERIC_DTYPES
from bitring.native import extension, native, type_of


@pytest.mark.single
def test_it_is_there_unless_it_is_left_out():
    """Tests of the native engine are skipped without it, so that one that cannot be loaded would go unnoticed."""
    assert (native() is None) == (os.environ.get("BITRING_NATIVE") == "0")


@pytest.mark.single
@pytest.mark.skipif(native() is None, reason="there is no native engine")
def test_the_stub_is_what_the_extension_has():
    """Where they differ, ``scripts/stub`` writes it anew. Layout may depend on nanobind's version, and is left out."""
    stubgen: Any = pytest.importorskip("nanobind.stubgen")
    stub = stubgen.StubGen(extension)
    stub.put(extension)
    committed = Path(str(bitring.__file__)).with_name("_native.pyi")
    assert ast.dump(ast.parse(stub.get())) == ast.dump(ast.parse(committed.read_text(encoding="utf-8")))


@pytest.mark.single
@pytest.mark.skipif(native() is None, reason="there is no native engine")
def test_it_knows_the_dtypes_that_are_reduced():
    assert {type_of(dtype) for dtype in NUMERIC_DTYPES} == set(extension.Type)
