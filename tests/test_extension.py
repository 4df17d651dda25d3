"""The extension itself: what it does is tested where it is used."""

from __future__ import annotations

import os

import pytest

from bitring.native import native


@pytest.mark.single
def test_it_is_there_unless_it_is_left_out():
    """Tests of the native engine are skipped without it, so that one that cannot be loaded would go unnoticed."""
    assert (native() is None) == (os.environ.get("BITRING_NATIVE") == "0")
