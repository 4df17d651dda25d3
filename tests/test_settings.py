"""Settings: what is checked, how they are written, and that everything that has some can be asked for as text."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.compression.compressor import compressors
from bitring.compression.exchange.owner_schedule import encoders
from bitring.registry import Registry
from bitring.settings import Range, Settings, checked, make, name_of, setting, spelled
from bitring.training.mode import Mode, modes
from bitring.training.optimizer import optimizers

pytestmark = pytest.mark.single

REGISTRIES: list[Registry[Any]] = [compressors, modes, optimizers]
REGISTERED = [(registry, name) for registry in REGISTRIES for name in registry.names()]


def registry_of(text: str) -> Registry[Any]:
    return next((registry for registry in REGISTRIES if name_of(text) in registry.names()), compressors)


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
        ("onebit:levels=row", bitring.OneBit(levels="row")),
        ("sufficient_factors", bitring.SufficientFactors()),
        ("sync", bitring.Sync()),
        ("local:tau=20", bitring.Local(tau=20)),
        (
            "block_momentum:tau=20,zeta=1,momentum=none,nesterov=false",
            bitring.BlockMomentum(tau=20, zeta=1.0, nesterov=False),
        ),
        ("adagrad:eps=1e-6,weight_decay=0.1", bitring.AdaGrad(eps=1e-6, weight_decay=0.1)),
        ("sgd:nesterov=true,momentum=0.9", bitring.SGD(momentum=0.9, nesterov=True)),
    ],
)
def test_make(text: str, wanted: Any):
    registry = registry_of(text)
    made = make(text, registry)
    assert made == wanted
    assert [type(x) for x in vars(made).values()] == [type(x) for x in vars(wanted).values()]
    assert name_of(text) == registry.name_of(type(wanted))


def integer(field: Any, now: Any) -> Any:
    """Another that is allowed, where ``now`` is one."""
    return (
        next(n for n in (2 * (now or 1), now + 1) if n in field.metadata.get("range", Range()))
        if type(now) is int
        else None
    )


@pytest.mark.parametrize(("registry", "name"), REGISTERED, ids=[f"{r.kind}={n}" for r, n in REGISTERED])
def test_every_setting_can_be_given_and_is_spelled_again(registry: Registry[Any], name: str):
    """Of what is registered: a new compressor, mode or optimizer is covered the moment its file exists."""
    default: Any = registry.get(name)()
    assert spelled(name, default) == name
    every = ",".join(
        f"{field.name}={str(getattr(default, field.name)).lower()}" for field in dataclasses.fields(default)
    )
    text = f"{name}:{every}" if every else name
    assert make(text, registry) == default
    # All others that are as good.
    others: dict[str, Any] = {}
    absences = {field.name: None for field in dataclasses.fields(default) if "None" in str(field.type)}
    for field in dataclasses.fields(default):
        now: Any = getattr(default, field.name)
        absent: Any = 2 if "int" in str(field.type) else "text" if "str" in str(field.type) else 0.25
        others[field.name] = (
            next(text for text in field.metadata["range"].one_of if text != now)
            if isinstance(now, str)
            else {type(None): absent, bool: not now, int: integer(field, now), float: (now or 1) / 3}[type(now)]
        )
    for field, other in others.items():
        changed: Any = None
        # It may need another (Nesterov's momentum), or that another is not given.
        for given in ({}, others, absences, others | absences):
            with contextlib.suppress(ValueError):
                changed = changed or dataclasses.replace(default, **(given | {field: other}))
        again = spelled(name, changed)
        assert f"{field}=" in again
        assert make(again, registry) == changed
        assert spelled(name, make(again, registry)) == again
        with pytest.raises((TypeError, ValueError), match=rf"^{type(default).__name__}: {field} must be "):
            dataclasses.replace(default, **{field: 3 if other == "text" else "text"})


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
        ("local:tau=0", "Local: tau must be at least 1; got 0"),
        ("local:zeta=1", "unknown setting 'zeta' of the mode local; known: tau"),
        ("sync:tau=1", "unknown setting 'tau' of the mode sync; it has none"),
        ("block_momentum:tau=2.5", "block_momentum:tau=2.5: tau must be a whole number; got '2.5'"),
        ("block_momentum:zeta=none", "block_momentum:zeta=none: zeta must be a number; got 'none'"),
        ("sgd:eps=1e-6", "unknown setting 'eps' of the optimizer sgd; known: lr, momentum, nesterov, weight_decay"),
        ("sgd:nesterov=yes", "sgd:nesterov=yes: nesterov must be true or false; got 'yes'"),
        ("sgd:nesterov=true", "SGD: nesterov=True needs momentum > 0, got momentum=0"),
        ("adagrad:lr=nan", "AdaGrad: lr must be above 0 and finite; got nan"),
        ("powersgd:matrix_rank=0", "PowerSGD: matrix_rank must be at least 1; got 0"),
    ],
)
def test_mistakes(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(text, registry_of(text))


def test_of_encoders_alone():
    with pytest.raises(ValueError, match="unknown encoder 'powersgd'; known: "):
        make("powersgd:matrix_rank=2", encoders)


@dataclass(frozen=True)
class Every(Settings):
    """Each type and each kind of range."""

    least: int = setting(1, least=1)
    between: int = setting(3, least=3, most=16)
    multiple: int = setting(64, multiple_of=64)
    above: float = setting(1.0, above=0)
    share: float = setting(0.5, above=0, most=1)
    factor: float = setting(0.5, least=0, below=1)
    any: float = 0.0
    flag: bool = False
    absent: float | None = setting(None, above=0)
    what: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("least", 0, ValueError, "at least 1; got 0"),
        ("least", 1.0, TypeError, "an int; got float"),
        ("least", True, TypeError, "an int; got bool"),
        ("least", None, TypeError, "an int; got NoneType"),
        ("between", 2, ValueError, "3 to 16; got 2"),
        ("between", np.int64(17), ValueError, "3 to 16; got 17"),
        ("multiple", 100, ValueError, "a positive multiple of 64; got 100"),
        ("multiple", 0, ValueError, "a positive multiple of 64; got 0"),
        ("above", 0, ValueError, "above 0 and finite; got 0"),
        ("above", float("inf"), ValueError, "above 0 and finite; got inf"),
        ("above", "1", TypeError, "a number; got str"),
        ("above", False, TypeError, "a number; got bool"),
        ("share", 1.5, ValueError, "above 0 and at most 1; got 1.5"),
        ("share", float("nan"), ValueError, "above 0 and at most 1; got nan"),
        ("factor", 1, ValueError, "at least 0 and below 1; got 1"),
        ("factor", -0.5, ValueError, "at least 0 and below 1; got -0.5"),
        ("any", float("-inf"), ValueError, "finite; got -inf"),
        ("flag", 1, TypeError, "a bool; got int"),
        ("absent", 0.0, ValueError, "above 0 and finite; got 0.0"),
        ("absent", "none", TypeError, "a number; got str"),
    ],
)
def test_what_is_checked(field: str, value: Any, error: type[Exception], message: str):
    with pytest.raises(error) as caught:
        Every(**{field: value})
    assert str(caught.value) == f"Every: {field} must be {message}"


def test_what_is_taken():
    given: dict[str, Any] = {"least": np.int16(7), "above": 2, "share": np.float32(0.25), "flag": np.bool_(True)}
    made = Every(**given, what=(1, 2))
    assert (made.least, made.above, made.share, made.flag, made.absent, made.what) == (7, 2, 0.25, True, None, (1, 2))
    assert type(made.least) is int
    assert type(made.flag) is bool
    whole: Any = np.int16(7)
    assert repr(Every(least=whole)) == repr(Every(least=7))  # ranks compare their settings' text
    assert checked("f", "x", np.int8(3), int, Range(least=3)) == 3


def test_a_class_from_elsewhere(monkeypatch: pytest.MonkeyPatch):
    """Settings of other types are its own affair; so are those whose types only a type checker knows."""

    class Unknown:
        pass

    @dataclass(frozen=True)
    class Mine(Settings):
        what: Unknown | None = None

    assert Mine().what is None
    registry: Registry[Any] = Registry("mode", Mode)
    monkeypatch.setattr(registry, "get", {"every": Every, "mine": Mine, "plain": Unknown}.get)
    assert make("every:least=9,absent=2", registry) == Every(least=9, absent=2.0)
    assert make("plain", registry).__class__ is Unknown
    for text, message in (
        ("every:what=1", "every:what=1: what cannot be given as text; give an instance of Every"),
        ("mine:what=1", "mine:what=1: what cannot be given as text; give an instance of Mine"),
        ("plain:what=1", "unknown setting 'what' of the mode plain; it has none"),
    ):
        with pytest.raises(ValueError) as caught:
            make(text, registry)
        assert str(caught.value) == message
