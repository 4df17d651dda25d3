"""What can be asked for as ``compression=``, and how it is written."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import bitring
from bitring.compression.compressor import compressors, make, name_of, parsed, spelled
from bitring.compression.exchange.owner_schedule import encoders

pytestmark = pytest.mark.single


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("topk", bitring.TopK()),
        ("topk:density=0.001", bitring.TopK(density=0.001)),
        ("topk:density=1", bitring.TopK(density=1.0)),
        ("topk:block=64,sampled=true", bitring.TopK(block=64, sampled=True)),
        (" topk : sampled = False , density = 1e-3 ", bitring.TopK(density=0.001)),
        ("threshold:tau=0.5", bitring.Threshold(tau=0.5)),
        ("threshold:tau=none,density=0.1", bitring.Threshold(density=0.1)),
        ("linear:bits=4", bitring.Linear()),
        ("powersgd:matrix_rank=2,seed=7", bitring.PowerSGD(matrix_rank=2, seed=7)),
        ("onebit:block=4096", bitring.OneBit(block=4096)),
        ("sufficient_factors", bitring.SufficientFactors()),
    ],
)
def test_make(text: str, wanted: Any):
    made = make(text, compressors)
    assert made == wanted
    assert [type(x) for x in vars(made).values()] == [type(x) for x in vars(wanted).values()]
    assert name_of(text) == compressors.name_of(type(wanted))


@pytest.mark.parametrize("name", compressors.names())
def test_every_setting_can_be_given_and_is_spelled_again(name: str):
    """Of what is registered: a new compressor is covered the moment its file exists."""
    default: Any = compressors.get(name)()
    assert spelled(name, default) == name
    every = ",".join(
        f"{field.name}={str(getattr(default, field.name)).lower()}" for field in dataclasses.fields(default)
    )
    text = f"{name}:{every}" if every else name
    assert make(text, compressors) == default
    # All others that are as good.
    for field in dataclasses.fields(default):
        now = getattr(default, field.name)
        other: Any = {type(None): 0.25, bool: not now, int: 2 * (now or 1), float: (now or 0) / 3}[type(now)]
        changed = dataclasses.replace(default, **{field.name: other})
        again = spelled(name, changed)
        assert again.startswith(f"{name}:{field.name}=")
        assert make(again, compressors) == changed
        assert spelled(name, make(again, compressors)) == again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "unknown compressor 'zip'; known: bfloat16, "),
        ("zip:level=9", "unknown compressor 'zip'; known: bfloat16, "),
        ("topk:densty=0.1", "unknown setting 'densty' of the compressor topk; known: density, sampled, block"),
        ("sufficient_factors:block=64", "unknown setting 'block' of the compressor sufficient_factors; it has none"),
        ("topk:", "topk:: expected KEY=VALUE after topk:, separated by commas; got ''"),
        ("topk:0.1", "topk:0.1: expected KEY=VALUE after topk:, separated by commas; got '0.1'"),
        ("topk:density=", "got 'density='"),
        ("topk:density=0.1,", "got ''"),
        ("topk:density=0.1,density=0.2", "topk:density=0.1,density=0.2: density is given twice"),
        ("topk:density=few", "topk:density=few: density must be a number; got 'few'"),
        ("topk:sampled=1", "topk:sampled=1: sampled must be true or false; got '1'"),
        ("topk:block=1e3", "topk:block=1e3: block must be a whole number; got '1e3'"),
        ("threshold:density=none", "threshold:density=none: density must be a number; got 'none'"),
        ("topk:density=2", "TopK: density must be above 0 and at most 1; got 2.0"),
        ("onebit:block=10", "OneBit: block must be a positive multiple of 64; got 10"),
        ("linear:bits=9", "Linear: bits must be 2 to 8; got 9"),
        ("powersgd:matrix_rank=0", "PowerSGD: matrix_rank must be at least 1; got 0"),
    ],
)
def test_mistakes(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(text, compressors)


def test_of_encoders_alone():
    with pytest.raises(ValueError, match="unknown encoder 'powersgd'; known: "):
        make("powersgd:matrix_rank=2", encoders)


def test_what_compression_stands_for():
    made = bitring.TopK()
    assert parsed(made) is made
    assert parsed(3) == 3
    assert parsed("topk:density=0.001") == bitring.TopK(density=0.001)
    for text in ("none", "none:block=64"):
        message = f"'{text}' is no compressor: compression=None is exact; known: bfloat16, "
        with pytest.raises(ValueError, match=message):
            parsed(text)
