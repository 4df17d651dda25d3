"""Settings of compressors, modes and optimizers: how their values are checked, and how they are written as text.

They are frozen dataclasses. Each is asked for as an instance, ``TopK(density=0.001)``, or as text: a name, or a name
and settings, ``topk:density=0.001,sampled=true``. The keys are the keyword arguments of the class.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from bitring.registry import Registry

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The numbers that are allowed, or texts; None where there is no such bound."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    one_of: tuple[str, ...] | None = None

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, str):
            return self.one_of is None or value in self.one_of
        return (
            -math.inf < value < math.inf
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or (value > 0 and value % self.multiple_of == 0))
        )

    def words(self, kind: type) -> str:
        """The range as a message says it, for values of ``kind``: int, float or str."""
        if self.one_of is not None:
            return f"one of {', '.join(map(repr, self.one_of))}"
        if self.multiple_of is not None:
            return f"a positive multiple of {self.multiple_of}"
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        parts = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        if kind is float and self.most is None and self.below is None:
            parts.append("finite")
        return " and ".join(parts)


def setting(
    default: T,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    multiple_of: int | None = None,
    one_of: tuple[str, ...] | None = None,
) -> T:
    """A field whose numbers have a range, ``tau: int = setting(50, least=1)``, or whose texts are known."""
    within = Range(least, above, most, below, multiple_of, one_of)
    return dataclasses.field(default=default, metadata={"range": within})


class Settings:
    """Base of settings. Making an instance checks its fields of the types bool, int, float and str, or None beside.

    Raises TypeError for a value of another type and ValueError for one outside its ``setting``'s range. A class with
    rules between its fields checks them in its own ``__post_init__``, after this one.
    """

    def __post_init__(self) -> None:
        owner: Any = type(self)
        for name, (kind, optional, within) in _checks(owner).items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            plain = checked(owner.__name__, name, value, kind, within)
            if plain is not value:
                object.__setattr__(self, name, plain)


def checked(owner: str, name: str, value: Any, kind: type, within: Range = Range()) -> Any:
    """``value``, which must be of ``kind`` (bool, int, float or str) and ``within`` a range.

    NumPy's scalars will do, and an int for a float; a bool is no number. An int or a bool is returned as Python's own,
    a float as it is. Raises TypeError and ValueError, which begin with ``owner`` and ``name``.
    """
    accepted, words = _KINDS[kind]
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise TypeError(f"{owner}: {name} must be {words}; got {type(value).__name__}")
    if kind is not bool and value not in within:
        got = repr(value) if kind is str else value
        raise ValueError(f"{owner}: {name} must be {within.words(kind)}; got {got}")
    return value if kind is float else kind(value)


_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool, np.bool_), "a bool"),
    int: ((int, np.integer), "an int"),
    float: ((int, float, np.integer, np.floating), "a number"),
    str: ((str,), "a str"),
}


@functools.cache
def _checks(cls: Any) -> dict[str, tuple[type, bool, Range]]:
    """Name -> type, whether None will do, and range, of the fields of those types that are checked and read."""
    try:
        hints = get_type_hints(cls)
    except NameError:  # a class inside a function, or a name for type checkers alone
        return {}
    found: dict[str, tuple[type, bool, Range]] = {}
    for field in dataclasses.fields(cls):
        kind, optional = hints[field.name], False
        if get_origin(kind) in (Union, types.UnionType):
            others = [each for each in get_args(kind) if each is not type(None)]
            optional = len(others) < len(get_args(kind))
            kind = others[0] if len(others) == 1 else object
        if kind in _KINDS:
            found[field.name] = kind, optional, field.metadata.get("range", Range())
    return found


def name_of(text: str) -> str:
    """The name in ``text``, which settings may follow."""
    return text.partition(":")[0].strip()


def read(text: str, registry: Registry[T]) -> tuple[type[T], dict[str, Any]]:
    """The class that ``text`` names, and the settings given in it.

    Raises ValueError for unknown names and keys, listing the known ones, and for values that are not of the key's type.
    """
    name = name_of(text)
    cls: Any = registry.get(name)
    known = [field.name for field in dataclasses.fields(cls)] if hasattr(cls, "__dataclass_fields__") else []
    given: dict[str, Any] = {}
    for part in text.split(":", 1)[1].split(",") if ":" in text else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{text}: expected KEY=VALUE after {name}:, separated by commas; got {part!r}")
        if key not in known:
            has = f"known: {', '.join(known)}" if known else "it has none"
            raise ValueError(f"unknown setting {key!r} of the {registry.kind} {name}; {has}")
        if key in given:
            raise ValueError(f"{text}: {key} is given twice")
        if key not in _checks(cls):
            raise ValueError(f"{text}: {key} cannot be given as text; give an instance of {cls.__name__}")
        given[key] = _value(f"{text}: {key}", value, *_checks(cls)[key][:2])
    return cls, given


def make(text: str, registry: Registry[T]) -> T:
    """The instance that ``text`` asks for. Raises ValueError as ``read`` does, and what the class raises."""
    cls, given = read(text, registry)
    return cls(**given)


def spelled(name: str, settings: Any) -> str:
    """The text that asks for ``settings`` of the class registered as ``name``: the same for equal settings."""
    fields = [field for field in dataclasses.fields(settings) if getattr(settings, field.name) != field.default]
    given = (f"{field.name}={str(getattr(settings, field.name)).lower()}" for field in fields)
    return f"{name}:{','.join(given)}" if fields else name


def _bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


_READ: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_bool, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
}


def _value(what: str, text: str, kind: type, optional: bool) -> Any:
    """``text`` as a ``kind``."""
    if optional and text.lower() == "none":
        return None
    read, expected = _READ[kind]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"{what} must be {expected}; got {text!r}") from None
