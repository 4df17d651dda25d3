"""A store's values in shards, one for each owner, that are reached by messages. Serves on any ranks."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.interrupts import HeldBack
from bitring.collectives.runtime.jointly import jointly
from bitring.compression.factors import Factors
from bitring.training.optimizer import Elementwise, Optimizer
from bitring.training.store.codec import Codec, Pushes
from bitring.training.store.layout import Layout, Parameter, by_rows
from bitring.training.store.owner import WINDOW, Kind
from bitring.training.store.packing import Form, Piece, bytes_of, pack, unpack
from bitring.training.store.replay import Journal, Record, Replay, recorded
from bitring.training.store.row_cache import RowCache
from bitring.training.store.rule import Rule
from bitring.training.store.segments import segments, travels_in_segments
from bitring.training.store.service_job import ServiceJob, private_context
from bitring.training.store.serving import service_of
from bitring.training.store.shard import joined_slots
from bitring.training.store.table import Setup, Table, Update


class MessageTable(Table):
    """A table that serves everywhere. Collective to make.

    Raises on all ranks: OSError where a journal cannot be written or read, ValueError where it is of another run.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        context = private_context(setup.comm, setup.what)
        values, optimizer = setup.values, setup.optimizer
        self._push, self._get = setup.call or "inc", setup.call or "get"
        self._owners = list(range(self._size if setup.servers is None else min(setup.servers, self._size)))
        self._layout = Layout(values, len(self._owners), whole=not isinstance(optimizer, Elementwise))
        self._codec = Codec(self._layout, setup.encoders)
        self._pushes = Pushes(self._codec, self._layout)
        self._slots, self._counters = optimizer.slots, optimizer.counters
        self._clocks = [0] * self._size if setup.clocks is None else list(setup.clocks)
        self._clock = self._clocks[self._rank]
        self._left = self._ended = self._closed = False
        self._sent = dict.fromkeys(self._owners, 0)
        self._ahead: set[int] = set()  # owners that have parts of the next update
        self.factors = setup.factors
        self._round = 0
        self._troubles = 0  # that this rank has told
        self._settled = 0  # how often
        self._editions = dict.fromkeys(self._owners, -1)
        self._known = self._layout.empty() if self._codec.encodes else {}  # values, where answers are changes
        self._cache = RowCache(self._layout, optimizer) if setup.cache and self._terms.staleness is not None else None
        self._follows = any(setup.journal)
        self._in_segments = travels_in_segments(setup)
        kinds = OSError, ValueError
        rule, record = jointly(setup.comm, setup.what, lambda: self._rule_of(setup.journal), kinds)
        self._service = service_of(setup, context, self._owners, self._layout, self._codec, rule, record)
        self._job = ServiceJob(self._service, context, setup.what)

    def _rule_of(self, journal: Journal) -> tuple[Rule, Record | None]:
        run = {"ranks": self._size, "owners": len(self._owners), "terms": repr(self._terms)}
        rule = Rule(self._terms, self._size, self._clocks)
        if self._rank not in self._owners:
            return rule, None
        if journal.replay is not None:
            rule = Replay(self._terms, self._size, self._clocks, recorded(journal.replay, self._rank, run))
        return rule, None if journal.record is None else Record(journal.record, self._rank, run)

    # Updates

    def push(self, update: Update) -> None:
        """See Table."""
        whole: dict[int, Any] = {}
        some: dict[int, list[Piece]] = {owner: [] for owner in self._owners}
        for name, g in update.gradients.items():
            number = self._layout.numbers[name]
            parameter = self._layout.parameters[number]
            rows = update.rows.get(name)
            if rows is None:
                whole[number] = self._whole(g, parameter)
                continue
            for owner, part in self._layout.split(number, rows):
                own = rows[part] - parameter.cuts[owner]
                some[owner].append(Piece(number, own, bytes_of(np.ascontiguousarray(g[part]))))
        self.wait_for_room()
        drops, gathers = self._terms.late == "drop", self._terms.gather > 1
        numbers = (update.weight, float(self._round) if drops else math.nan)
        with HeldBack():
            for owner in self._around():
                pieces = self._pushes.pieces(owner, whole, self._sent[owner], drops) + some[owner]
                if pieces or drops or gathers or owner in self._ahead:
                    *parts, last = segments(pieces, self._layout) if self._in_segments else (pieces,)
                    for each in parts:
                        self._service.post(owner, Kind.PART, self._sent[owner], (), pack(each))
                        self._job.go_on()  # it goes while the next is copied
                    self._service.post(owner, Kind.PUSH, self._sent[owner], numbers, pack(last))
                    self._sent[owner] += 1
            self._pushes.complete()
            self._ahead.clear()
            if self._cache is not None:
                for name, g in update.gradients.items():
                    self._cache.update(self._layout.numbers[name], update.rows.get(name), g)
        self._job.go_on()

    def _whole(self, g: Any, parameter: Parameter) -> Any:
        """By rows; ``Factors`` stay where they are fewer values than their product."""
        if isinstance(g, Factors):
            values = len(g.u) * (parameter.rows + len(self._owners) * parameter.width)
            return g if values < parameter.rows * parameter.width else g.product()
        return by_rows(g, parameter)

    def push_ahead(self, gradients: Mapping[str, Any]) -> bool:
        """See Table."""
        numbers = self._layout.numbers
        whole = {numbers[name]: self._whole(g, self._layout.parameters[numbers[name]]) for name, g in gradients.items()}
        self.wait_for_room()
        with HeldBack():
            for owner in self._around():
                pieces = self._pushes.pieces(owner, whole, self._sent[owner], self._terms.late == "drop", ahead=True)
                if pieces:
                    self._service.post(owner, Kind.AHEAD, self._sent[owner], (), pack(pieces))
                    self._ahead.add(owner)
        self._job.go_on()
        return True

    def forget_ahead(self) -> None:
        """See Table."""
        with HeldBack():
            for owner in self._ahead:
                self._service.post(owner, Kind.FORGET, self._sent[owner])
            self._pushes.forget({owner: self._sent[owner] for owner in self._ahead})
            self._ahead.clear()

    def wait_for_room(self) -> None:
        """See Table."""
        service = self._service

        def there() -> bool:
            service.lack_room({o for o in self._owners if self._sent[o] - service.taken[o] >= WINDOW})
            return not service.without_room

        self._job.until(there, self._push)

    def tick(self) -> None:
        """See Table."""
        self._clock += 1
        self._tell(Kind.CLOCK)

    def use(self, optimizer: Optimizer) -> None:
        """See Table."""
        self._tell(Kind.USE, np.frombuffer(pickle.dumps(optimizer), np.uint8))

    def leave(self) -> None:
        """See Table."""
        if not (self._left or self._ended):
            self._left = True
            self._tell(Kind.LEAVE)

    def trouble(self, text: str, step: int) -> None:
        """See Table."""
        self._troubles += 1
        said = np.frombuffer(text.encode(errors="replace"), np.uint8)
        for rank in range(self._size):
            if rank not in self._service.ended:
                self._service.post(rank, Kind.TROUBLE, step, (), said)
        self._job.go_on()

    def told(self, step: float) -> str | None:
        """See Table."""
        self._job.go_on()
        troubles = self._service.troubles
        news = [troubles.popleft() for _ in range(len(troubles))]
        troubles.extend(each for each in news if each[0] >= step)
        return next((text for at, text in news if at < step), None)

    # Reads

    def pull(self, wanted: Mapping[str, Any] | None = None, least: int | None = None) -> dict[str, Any]:
        """See Table."""
        bound = math.nan if least is None else float(least)
        if wanted is None:
            self._ask(Kind.READ, dict.fromkeys(self._owners), (bound,), self._get)
            return self._taken()
        result = {
            name: np.empty(p.shape if rows is None else (len(rows), *p.row_shape), p.dtype)
            for name, rows in wanted.items()
            for p in (self._layout.parameters[self._layout.numbers[name]],)
        }
        asked: dict[int, list[Piece]] = {}
        places: dict[
            tuple[int, int], tuple[Any, Any, Any]
        ] = {}  # of a piece: an array, its rows there, the parameter's
        for name, rows in wanted.items():
            number = self._layout.numbers[name]
            parameter = self._layout.parameters[number]
            n = parameter.rows if rows is None else len(rows)
            into, missing = result[name].reshape(n, parameter.width), np.arange(n)
            if self._cache is not None and rows is not None and least is None and not self._left:
                missing = self._cache.take(number, rows, self._clock - (self._terms.staleness or 0), into)
            asks = missing if rows is None else rows[missing]
            for owner, part in self._layout.split(number, asks):
                own = None if rows is None else asks[part] - parameter.cuts[owner]
                asked.setdefault(owner, []).append(Piece(number, own, np.empty(0, np.uint8)))
                places[owner, number] = into, part if len(missing) == n else missing[part], asks[part]
        if self._cache is not None and wanted and not asked:
            self._job.go_on()
            return result
        asked = asked or {self._owners[0]: []}
        self._ask(Kind.READ, {owner: pack(pieces) for owner, pieces in asked.items()}, (bound,), self._get)
        for owner in asked:
            message = self._service.answers[owner]
            self._heard_of(owner, message.numbers)
            for piece in unpack(message.payload):
                into, at, rows = places[owner, piece.parameter]
                into[at] = values = piece.data.view(into.dtype).reshape(len(rows), into.shape[1])
                if self._cache is not None:
                    reached = min(clock if clock >= 0 else math.inf for clock in message.numbers[5:].tolist())
                    self._cache.put(piece.parameter, rows, values, reached)
        return result

    def wait_for_clocks(self, least: int) -> None:
        """See Table."""
        # Whether this rank knows of them by now is no matter of a record: there it asks always.
        if not self._follows and all(clock >= least for clock in self._service.clocks):
            return
        self.pull({}, least)

    def _taken(self) -> dict[str, Any]:
        """All values, of all owners' answers."""
        values = self._layout.empty()
        if self._cache is not None:  # what is read after this is not older
            self._cache.clear()
        with HeldBack():  # a change that is taken twice would be wrong
            for owner in self._owners:
                self._take(owner, values)
        return values

    def _take(self, owner: int, values: Mapping[str, Any]) -> None:
        """Put an owner's answer, of all that it has, into ``values``."""
        numbers, payload = self._service.answers[owner][3:]
        changes = bool(numbers[3])
        for piece in unpack(payload):
            parameter = self._layout.parameters[piece.parameter]
            part = parameter.part(owner)
            place = by_rows(self._known[parameter.name] if self._known else values[parameter.name], parameter)[part]
            if piece.form == Form.ENCODED:
                self._codec.decode(piece, owner, place.reshape(-1), accumulate=changes)
            else:
                place.reshape(-1)[...] = piece.data.view(place.dtype)
        if self._known:
            for _, parameter, part in self._layout.of(owner):
                by_rows(values[parameter.name], parameter)[part] = by_rows(self._known[parameter.name], parameter)[part]
            self._editions[owner] = int(numbers[2])
        self._heard_of(owner, numbers)

    def _heard_of(self, owner: int, numbers: Any) -> None:
        self._round = max(self._round, int(numbers[0]))
        dropped = self._service.dropped
        while dropped:
            self._pushes.take_back(*dropped.popleft())
        self._pushes.settled(owner, int(numbers[1]) - 1)

    # All ranks together

    def settle(self) -> dict[str, Any]:
        """See Table."""
        try:
            self._ask(Kind.REST, dict.fromkeys(self._owners), (self._troubles, self._settled), "synchronize")
        except BaseException:
            if not self._job.over:
                self._tell(Kind.GO_ON)
            raise
        self._settled += 1
        told = max(int(message.numbers[4]) for message in self._service.answers.values())
        values = self._taken()
        if not self._left:
            self._clock = max(int(clock) for clock in self._service.clocks if clock < math.inf)
        # Of what a rank has told that has died since not all may have come.
        self._job.until(lambda: self._service.troubles_heard >= told or bool(self._service.dead), "synchronize")
        return values

    def slots(self) -> dict[str, dict[str, Any]]:
        """See Table."""
        self._ask(Kind.SLOTS, dict.fromkeys(self._owners), (), "synchronize")
        parts = {owner: unpack(self._service.answers[owner].payload) for owner in self._owners}
        self.settle()  # nobody goes on before all have them
        return joined_slots(self._layout, self._slots, self._counters, parts)

    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> None:
        """See Table."""
        self.settle()
        engine.undisturbed(lambda: self._service.load(values, slots))
        self.settle()

    def claim(self, row: tuple[int, ...]) -> int:
        """See Table."""
        self._ask(Kind.CLAIM, {self._owners[0]: np.array(row, np.int64)}, (), "claimed")
        return int(self._service.answers[self._owners[0]].numbers[0])

    def end(self) -> bool:
        """See Table: this rank's shard is needed."""
        if not (self._ended or self._job.over):
            self._ended = True
            self._service.ended.add(self._rank)
            self._tell(Kind.END)
        return not self._job.over

    def free(self, waits: bool = True) -> None:
        """See Table."""
        if self._closed:
            return
        if self.end():
            self._job.stay(waits)
        self._closed = True
        for owner in self._service.owners:
            owner.close()
        self._job.close()

    @property
    def over(self) -> bool:
        """See Table."""
        return self._job.over

    # What is known

    @property
    def clocks(self) -> list[float]:
        """See Table."""
        known = list(self._service.clocks)
        for owner in self._service.owners:
            known = [max(pair) for pair in zip(known, owner.clocks, strict=True)]
        known[self._rank] = math.inf if self._left else float(self._clock)
        return known

    @property
    def ended(self) -> list[int]:
        """See Table."""
        return sorted(self._service.ended)

    @property
    def nbytes_sent(self) -> int:
        """See Table."""
        return self._service.nbytes_sent

    @property
    def residuals(self) -> dict[str, Any]:
        """See Table."""
        parameters = self._layout.parameters
        return {parameters[n].name: x.reshape(parameters[n].shape) for n, x in self._pushes.residuals.items()}

    def counts(self) -> dict[str, Any]:
        """See Table."""
        owners = self._service.owners
        result: dict[str, Any] = {"wait_seconds": self._job.waited, "waited_for": dict(self._job.waited_for)}
        if self._cache is not None:
            result["cached_rows"] = self._cache.hits
        if owners:
            staleness = sum((Counter(owner.staleness) for owner in owners), Counter[int]())
            result |= {
                "staleness": dict(sorted(staleness.items())),
                "applied": sum(owner.applied for owner in owners),
                "dropped": sum(owner.dropped for owner in owners),
            }
        return result

    # Messages

    def _around(self) -> list[int]:
        """The owners, this rank first: not all ranks send to the same one first."""
        mine = self._rank % len(self._owners)
        return self._owners[mine:] + self._owners[:mine]

    def _tell(self, kind: Kind, payload: Any = None) -> None:
        for owner in self._owners:
            self._service.post(owner, kind, 0, (), payload)
        self._job.go_on(ends=kind == Kind.END)

    def _ask(self, kind: Kind, requests: Mapping[int, Any], numbers: Sequence[float], call: str) -> None:
        """Send requests, and wait for all answers."""
        service = self._service
        ticket = service.ask(list(requests))
        for owner, payload in requests.items():
            given = (*numbers, float(self._editions[owner])) if kind == Kind.READ else tuple(numbers)
            service.post(owner, kind, ticket, given, payload)
        try:
            self._job.until(lambda: not service.awaiting, call)
        finally:
            service.awaiting = set()
