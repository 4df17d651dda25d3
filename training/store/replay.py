"""The order of a run, kept in files, and a run that follows it: the same updates in the same order, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from bitring.training.store.rule import Action, Apply, Claim, Defer, Drop, Rule, Serve, Settle, Terms

_KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in (Apply, Drop, Serve, Settle, Claim)}


class Journal(NamedTuple):
    """Where a run's order is written to, and where one is read from, that is followed; without the owner's number."""

    record: str | None = None
    replay: str | None = None


NO_JOURNAL = Journal()


class Record:
    """Writes what one shard's rule has decided: a line for each action, after one that says of what run it is."""

    def __init__(self, path: str, owner: int, run: dict[str, Any]) -> None:
        """Raises OSError where the file cannot be written."""
        self._file: TextIO = Path(f"{path}.{owner}").open("w", encoding="utf-8", buffering=1)  # noqa: SIM115  # until ``close``
        self._file.write(json.dumps(run) + "\n")

    def write(self, action: Action) -> None:
        """A read that waits is no decision."""
        if not isinstance(action, Defer):
            self._file.write(json.dumps([type(action).__name__.lower(), *action]) + "\n")

    def close(self) -> None:
        """It is complete."""
        self._file.close()


def recorded(path: str, owner: int, run: dict[str, Any]) -> Iterator[Action]:
    """The actions in a file. Raises OSError where it cannot be read, ValueError where it is of another run."""
    name = Path(f"{path}.{owner}")
    lines = iter(name.read_text(encoding="utf-8").splitlines())
    there = json.loads(next(lines, "{}"))
    for key, value in run.items():
        if there.get(key) != value:
            raise ValueError(f"replay: {name} is of a run with {key}={there.get(key)}; got {value}")
    return (_action(*json.loads(line)) for line in lines)


def _action(kind: str, *values: Any) -> Action:
    made: Action = _KINDS[kind](*map(_tuples, values))
    return made


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


class Replay(Rule):
    """In a rule's place: does what one did, in that order, each thing as soon as what it takes is there.

    Raises RuntimeError where members do more than there is in the record.
    """

    def __init__(self, terms: Terms, members: int, clocks: Sequence[int], actions: Iterator[Action]) -> None:
        super().__init__(terms, members, clocks)
        self._actions = actions
        self._next = next(actions, None)
        self._came: set[tuple[int, int]] = set()
        self._claims: dict[int, tuple[int, tuple[float, ...]]] = {}  # a member's ticket and row

    def push(self, member: int, number: int, weight: float = 1.0, round_: int | None = None) -> list[Action]:
        """See Rule."""
        if weight:
            self._came.add((member, number))
        return self._go_on()

    def claim(self, member: int, ticket: int, row: tuple[float, ...]) -> list[Action]:
        """See Rule."""
        self._claims[member] = ticket, row
        return self._go_on()

    def _awaited(self, member: int) -> tuple[int, ...]:
        return tuple(m for m in self._at_work() if m != member)

    def _go_on(self) -> list[Action]:
        actions: list[Action] = []
        while (done := self._done()) is not None:
            actions.append(done)
            self._next = next(self._actions, None)
        if self._next is None and (self._came or self._waiting or self._claims):
            raise RuntimeError("replay: ranks do more than in the run that was recorded")
        return actions

    def _done(self) -> Action | None:
        """The next action, where what it takes is there."""
        due = self._next
        if isinstance(due, Apply) and self._came.issuperset(due.pushes):
            self._came.difference_update(due.pushes)
            self.version += 1
            return due
        if isinstance(due, Drop) and (due.member, due.number) in self._came:
            self._came.remove((due.member, due.number))
            return due
        if isinstance(due, Serve) and due.member in self._waiting:
            self._absent[due.member] = False
            return Serve(due.member, self._waiting.pop(due.member).ticket)
        if isinstance(due, Claim) and due.member in self._claims:
            return Claim(due.member, self._claims.pop(due.member)[0], due.number)
        if isinstance(due, Settle) and all(self._resting[member] for member in due.members):
            return self._settle()[-1]
        return None
