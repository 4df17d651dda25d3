"""Contents of a checkpoint's ``header.json``, with every field looked at before anything is done with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitring.training.checkpoints.resharding import Table
from bitring.training.tree import Path

FORMAT = "bitring checkpoint 1"

_MOST_STEPS = 1 << 53
"""A trainer's record holds them as float64."""


class CheckpointError(ValueError):
    """A file is no checkpoint, is damaged, or belongs to other training. Raised on all ranks."""


@dataclass(frozen=True)
class Header:
    """``settings`` are the trainer's ``describe()``, ``steps`` it had made, ``algorithms`` it chose for its buckets.

    ``numbers``: path -> number. ``tables``: of each old rank, path -> array of the file; ``owner_residuals``: parameter
    -> array. ``dtypes``: array -> the dtype's name, which ``.npy`` cannot say of bfloat16. ``extra``: the user's.
    """

    settings: dict[str, Any]
    steps: int
    algorithms: list[str]
    numbers: dict[Path, float]
    tables: Sequence[Table]
    owner_residuals: dict[str, str]
    dtypes: dict[str, str]
    extra: dict[str, Any]


def checked_header(raw: Any) -> Header:
    """The header that ``raw``, read from JSON, stands for. Raises CheckpointError, which names the field."""
    fields = _object(raw, "header.json")
    if fields.get("format") != FORMAT:
        raise CheckpointError(f"is of the format {fields.get('format')!r}, not {FORMAT!r}")
    settings = _settings(_field(fields, "settings"))
    ranks = [_table(table, f"ranks[{rank}]") for rank, table in enumerate(_list(_field(fields, "ranks"), "ranks"))]
    if len(ranks) != settings["ranks"]:
        _wrong("ranks", f"a list of {settings['ranks']}, as settings.ranks says", len(ranks))
    for rank, table in enumerate(ranks):
        if table.keys() != ranks[0].keys():
            odd = "/".join(min(table.keys() ^ ranks[0].keys()))
            raise CheckpointError(f"is damaged: ranks 0 and {rank} keep different arrays, such as {odd}")
    owner_residuals: dict[str, str] = {}
    for path, member in _table(_field(fields, "owner_residuals"), "owner_residuals").items():
        if len(path) != 2 or path[0] != "owner_residual":
            _wrong("owner_residuals", "paths of 'owner_residual' and a parameter", path)
        owner_residuals[path[1]] = member
    algorithms = _list(_field(fields, "algorithms"), "algorithms")
    dtypes = _object(_field(fields, "dtypes"), "dtypes")
    for where, texts in (("algorithms", algorithms), ("dtypes", dtypes.values())):
        if not all(isinstance(text, str) for text in texts):
            _wrong(where, "strings", texts)
    return Header(
        settings,
        _count(_field(fields, "steps"), "steps"),
        algorithms,
        _pairs(_field(fields, "numbers"), "numbers", is_number, "numbers that are finite and >= 0"),
        ranks,
        owner_residuals,
        dtypes,
        _object(_field(fields, "extra"), "extra"),
    )


def is_number(value: object) -> bool:
    """Whether a state may hold it: numbers in states are finite and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _wrong(where: str, expected: str, got: object) -> None:
    raise CheckpointError(f"is damaged: {where} must be {expected}; got {str(got)[:80]!r}")


def _field(fields: Mapping[str, Any], name: str, inside: str = "") -> Any:
    if fields.get(name) is None:
        raise CheckpointError(f"is damaged: the field {inside}{name} is missing")
    return fields[name]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _wrong(where, "a JSON object", value)
    result: dict[str, Any] = value
    return result


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        _wrong(where, "a list", value)
    result: list[Any] = value
    return result


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_STEPS:
        _wrong(where, f"an integer from 0 to {_MOST_STEPS}", value)
    count: int = value
    return count


def _settings(value: Any) -> dict[str, Any]:
    settings = _object(value, "settings")
    for name in ("optimizer", "mode", "compression"):
        if not isinstance(_field(settings, name, "settings."), str):
            _wrong(f"settings.{name}", "a string", settings[name])
    if _count(_field(settings, "ranks", "settings."), "settings.ranks") < 1:
        _wrong("settings.ranks", "at least 1", settings["ranks"])
    for name, kind in _object(_field(settings, "parameters", "settings."), "settings.parameters").items():
        if not (isinstance(kind, list) and len(kind) == 2 and isinstance(kind[0], str) and isinstance(kind[1], list)):
            _wrong(f"settings.parameters of {name[:80]!r}", "a dtype and a shape", kind)
        for extent in kind[1]:
            _count(extent, f"settings.parameters of {name[:80]!r}")
    return settings


def _table(value: Any, where: str) -> dict[Path, str]:
    return _pairs(value, where, lambda member: isinstance(member, str), "names of arrays")


def _pairs(value: Any, where: str, good: Callable[[Any], bool], expected: str) -> dict[Path, Any]:
    """A list of [path, something] as a dict."""
    result: dict[Path, Any] = {}
    for entry in _list(value, where):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list) or not entry[0]:
            _wrong(where, "a list of paths with a value each", entry)
        if not all(isinstance(part, str) for part in entry[0]):
            _wrong(where, "paths of strings", entry[0])
        if not good(entry[1]):
            _wrong(where, expected, entry[1])
        if tuple(entry[0]) in result:
            raise CheckpointError(f"is damaged: {where} has {'/'.join(entry[0])} twice")
        result[tuple(entry[0])] = entry[1]
    return result
