"""Lists of compressors as the command line writes them."""

from __future__ import annotations

import pytest

from bitring.commands._compression import split

pytestmark = pytest.mark.single


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("onebit", ["onebit"]),
        ("onebit, sign", ["onebit", "sign"]),
        (
            "exact,topk:density=0.1,sampled=true,onebit:block=64,sign",
            ["exact", "topk:density=0.1,sampled=true", "onebit:block=64", "sign"],
        ),
        ("topk:density=0.1, block = 64 ,sign", ["topk:density=0.1, block = 64", "sign"]),
    ],
)
def test_split(text: str, parts: list[str]):
    assert split(text) == parts
