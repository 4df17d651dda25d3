"""What can be asked for as ``compression=``."""

from __future__ import annotations

import pytest

import bitring
from bitring.compression.compressor import parsed

pytestmark = pytest.mark.single


def test_what_compression_stands_for():
    made = bitring.TopK()
    assert parsed(made, "allreduce") is made
    assert parsed(3, "allreduce") == 3
    assert parsed("topk:density=0.001", "allreduce") == bitring.TopK(density=0.001)
    for text in ("none", "none:block=64"):
        message = f"'{text}' is no compressor: compression=None is exact; known: bfloat16, "
        with pytest.raises(ValueError, match=message):
            parsed(text, "allreduce")
