"""What can be asked for as ``compression=``: an encoder or a reducer, by name or as an instance.

Settings may follow the name: ``topk``, or ``topk:density=0.001,sampled=true``.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from bitring.registry import Registry

T = TypeVar("T")


class Compressor:
    """Base of Encoder and Reducer: settings, a frozen dataclass. State belongs to the plan."""


compressors: Registry[Compressor] = Registry(
    "compressor", Compressor, "compression/encoders", "compression/reducers", group="bitring.compressors"
)


def name_of(text: str) -> str:
    """The compressor's name."""
    return text.partition(":")[0].strip()


def make(text: str, registry: Registry[T]) -> T:
    """The compressor that ``text`` asks for; keys are the keyword arguments of its class.

    Raises ValueError for unknown names and keys, listing the known ones, and values that are not of the key's type;
    and what the class raises.
    """
    name = name_of(text)
    cls: Any = registry.get(name)
    kinds = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    given: dict[str, Any] = {}
    for setting in text.split(":", 1)[1].split(",") if ":" in text else ():
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{text}: expected KEY=VALUE after {name}:, separated by commas; got {setting!r}")
        if key not in known:
            has = f"known: {', '.join(known)}" if known else "it has none"
            raise ValueError(f"unknown setting {key!r} of the {registry.kind} {name}; {has}")
        if key in given:
            raise ValueError(f"{text}: {key} is given twice")
        given[key] = _read(f"{text}: {key}", value, kinds[key])
    made: T = cls(**given)
    return made


def parsed(compression: object) -> Any:
    """A name, settings behind it or not, as the compressor that it asks for; anything else as it is.

    Raises ValueError as ``make`` does.
    """
    if not isinstance(compression, str):
        return compression
    if name_of(compression) == "none":
        known = ", ".join(compressors.names())
        raise ValueError(f"{compression!r} is no compressor: compression=None is exact; known: {known}")
    return make(compression, compressors)


def spelled(name: str, compressor: Any) -> str:
    """How ``compressor``, registered as ``name``, is asked for: the same text for equal settings."""
    fields = [field for field in dataclasses.fields(compressor) if getattr(compressor, field.name) != field.default]
    settings = (f"{field.name}={str(getattr(compressor, field.name)).lower()}" for field in fields)
    return f"{name}:{','.join(settings)}" if fields else name


def _bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


_READ: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (_bool, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}


def _read(what: str, text: str, kind: Any) -> Any:
    """``text`` as a ``kind``, which may be optional."""
    if get_origin(kind) in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(each for each in get_args(kind) if each is not type(None))
    read, expected = _READ[kind]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"{what} must be {expected}; got {text!r}") from None
