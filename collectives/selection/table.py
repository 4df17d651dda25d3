"""The measured table: which algorithm was the fastest AllReduce, by what was reduced where.

``bitring tune`` writes it, ``selection.choose`` asks it. Rank 0's is the communicator's, so that all ranks agree.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bitring.collectives.schedules.schedule import algorithms

logger = logging.getLogger("bitring")

_FORMAT = "bitring table"
_VERSION = 1

_SWITCH = math.log(1.1)
"""Another algorithm must be so much faster at one size (or a little at several) to be worth a crossover: times vary."""


class Rules(NamedTuple):
    """The best algorithms for one kind of AllReduce, as measured.

    ``library``: the MPI library's name and version. ``itemsize``: bytes per value. ``resident``: the buffers are in
    memory that the node's ranks share. ``native``: the native engine took part. ``best``: ``(from_nbytes, algorithm)``
    by rising size, the first from 0.
    """

    library: str
    ranks: int
    nodes: int
    itemsize: int
    resident: bool
    native: bool
    best: tuple[tuple[int, str], ...]

    def algorithm(self, nbytes: int) -> str:
        """The best algorithm's name for a buffer of ``nbytes``."""
        return next(name for start, name in reversed(self.best) if start <= nbytes)

    @property
    def kind(self) -> tuple[Any, ...]:
        """All but the answer."""
        return self[:-1]

    @property
    def title(self) -> str:
        """The kind that was measured, in words."""
        return (
            f"{self.ranks} ranks on {self.nodes} node{'s' * (self.nodes != 1)}, {self.itemsize}-byte values, "
            f"{'resident' if self.resident else 'private'}"
        )


class Table(NamedTuple):
    """``rules`` of all kinds that were measured."""

    rules: tuple[Rules, ...] = ()

    def nearest(self, ranks: int, nodes: int, itemsize: int, resident: bool, native: bool) -> Rules | None:
        """The rules for the kind measured that is most like this one; None: there is none to compare with.

        One node is never compared with several, nor the native engine with the portable executor.
        """

        def distance(rules: Rules) -> tuple[float, ...]:
            return (
                abs(math.log2(rules.nodes / nodes)) + abs(math.log2(rules.ranks / ranks)),
                abs(math.log2(rules.itemsize / itemsize)),
                rules.resident != resident,
                rules.ranks,
                rules.nodes,
                rules.itemsize,
            )

        alike = [rules for rules in self.rules if rules.native == native and (rules.nodes == 1) == (nodes == 1)]
        return min(alike, key=distance, default=None) if nodes else None

    def merged(self, newer: Sequence[Rules]) -> Table:
        """This table with ``newer`` rules instead of its own for the same kinds."""
        kinds = {rules.kind: rules for rules in (*self.rules, *newer)}
        return Table(tuple(kinds[kind] for kind in sorted(kinds)))

    def of(self, library: str) -> Table:
        """The rules that were measured with the MPI library ``library``."""
        return Table(tuple(rules for rules in self.rules if rules.library == library))


BUILT_IN = Table()
"""Nothing measured: the choice is ``selection``'s default."""


def crossovers(seconds: Mapping[int, Mapping[str, float]]) -> tuple[tuple[int, str], ...]:
    """``Rules.best`` from the seconds of each algorithm at each size in bytes.

    An algorithm takes over half way, by ratio, between the last size where it is not the choice and the first where it
    is. The choices make the sum of the log times the least, where each change costs as much as a tenth of the time.
    """
    sizes = sorted(seconds)
    names = sorted(set.intersection(*(set(seconds[nbytes]) for nbytes in sizes)))
    paths: dict[str, tuple[float, list[str]]] = {name: (0.0, []) for name in names}
    for nbytes in sizes:
        paths = {
            name: min(
                (cost + _SWITCH * (bool(path) and path[-1] != name) + math.log(seconds[nbytes][name]), [*path, name])
                for cost, path in paths.values()
            )
            for name in names
        }
    path = min(paths.values())[1]
    starts = [0, *(math.isqrt(below * above) + 1 for below, above in pairwise(sizes))]
    return tuple(
        (start, name) for k, (start, name) in enumerate(zip(starts, path, strict=True)) if path[k - 1 : k] != [name]
    )


def path_of_table() -> Path:
    """Path of this user's table: ``$BITRING_TABLE``, or ``bitring/table.json`` in the user's folder for settings."""
    if named := os.environ.get("BITRING_TABLE"):
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "bitring" / "table.json"


def read_table(path: Path) -> Table:
    """The table in a file. Raises OSError, and ValueError for anything but a table of this version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content[_FORMAT]
        if version != _VERSION:
            raise ValueError(f"its version is {version!r}, not {_VERSION}")
        return Table(tuple(_read_rules(each) for each in content["rules"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not a table that bitring tune wrote: {error!r}") from error


def _read_rules(content: Mapping[str, Any]) -> Rules:
    best = tuple((start, name) for start, name in content["best"])
    fields: dict[str, Any] = {**content, "best": best}
    rules = Rules(**fields)
    for name, least in (("ranks", 1), ("nodes", 1), ("itemsize", 1)):
        number = content[name]
        if type(number) is not int or number < least:
            raise ValueError(f"{name} must be a whole number from {least} on; got {number!r}")
    for name in ("resident", "native"):
        if type(content[name]) is not bool:
            raise ValueError(f"{name} must be true or false; got {content[name]!r}")
    starts = [start for start, _ in best]
    if starts[:1] != [0] or any(type(start) is not int for start in starts) or starts != sorted(set(starts)):
        raise ValueError(f"the sizes in best must rise from 0; got {starts}")
    for _, name in best:
        algorithms.get(name)
    return rules


def write_table(path: Path, table: Table) -> None:
    """Write a table to a file, all of it or nothing; makes its folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rules = ",\n".join("  " + json.dumps(each._asdict()) for each in table.rules)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".table-", delete=False) as file:
        try:
            file.write(f'{{"{_FORMAT}": {_VERSION}, "rules": [\n{rules}\n]}}\n')
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@functools.cache
def load_table(path: Path) -> Table:
    """The table in ``path``; nothing measured where there is none, or none that can be read (the log says so once)."""
    try:
        return read_table(path)
    except FileNotFoundError:
        return BUILT_IN
    except (OSError, ValueError) as error:
        logger.warning("the measured table %s is not used, the built-in default is: %s", path, error)
        return BUILT_IN
