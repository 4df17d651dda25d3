"""The owner of a shard, alone: the native one says and holds, bit for bit, what the reference does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from bitring.collectives.runtime.mailbox import Message
from bitring.compression.compressor import compressors
from bitring.native import native
from bitring.settings import make
from bitring.training.optimizer import optimizers
from bitring.training.store.codec import MOST_EDITIONS, Codec, Pushes
from bitring.training.store.layout import Layout
from bitring.training.store.native_service import NativeOwner
from bitring.training.store.owner import Kind, Owner
from bitring.training.store.packing import Piece, pack, unpack
from bitring.training.store.rule import Rule, Terms
from bitring.training.store.shard import Shard

pytestmark = [
    pytest.mark.single,
    pytest.mark.skipif(native() is None, reason="there is no native engine"),
]

ENCODERS = [
    *("onebit:block=64", "onebit:block=64,levels=row", "onebit:block=64,levels=rank_one", "sign:block=64"),
    *("topk:density=0.1,block=64", "fixed:bits=4,block=64"),  # of no fixed size; that draws
]
OPTIMIZERS = ["sgd:lr=0.1", "sgd:lr=0.1,momentum=0.9,weight_decay=0.01", "adagrad:lr=0.1"]
MEMBERS = 3

TERMS = st.one_of(
    st.builds(
        Terms,
        gather=st.integers(1, MEMBERS),
        staleness=st.sampled_from([None, 0, 2]),
        scale=st.sampled_from(["none", "inverse"]),
    ),
    st.builds(Terms, gather=st.integers(1, MEMBERS), late=st.just("drop")),
)
# What a member does; of a push, or what comes ahead of one: its weight, and whether some rows come as they are.
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "push",
                "push",
                "part",
                "part",
                "read",
                "read",
                "ahead",
                "forget",
                "rows",
                "clock",
                "rest",
                "leave",
                "load",
            ]
        ),
        st.integers(0, MEMBERS - 1),
        st.sampled_from([1.0, 3.0, 0.0]),
        st.booleans(),
    ),
    max_size=40,
)


class Both:
    """An owner each of both kinds, of equal shards, and the members, who tell both the same."""

    def __init__(self, terms: Terms, encoder: Any, optimizer: Any, dtype: Any, encodes: bool, owner: int) -> None:
        rng = np.random.default_rng(0)
        values = {
            "w": rng.standard_normal((30, 9)),
            "v": rng.standard_normal(130),
            "small": np.ones(()),
            "x": np.ones(70),
        }
        self.values = {name: w.astype(dtype) for name, w in values.items()}
        layout = Layout(self.values, 2, False)
        self.encodes = encodes
        encoders = dict.fromkeys(["w", "v", "small"], encoder) if encodes else {}
        self.codec, self.number = Codec(layout, encoders), owner
        self.layout, self.rng = layout, np.random.default_rng(1)
        self.sent: list[tuple[int, int, int, list[float], bytes]] = []
        shards = [Shard(layout, owner, self.values, optimizer) for _ in range(2)]
        rule = Rule(terms, MEMBERS)
        self.python = Owner(shards[0], rule, self.codec, owner, MEMBERS, optimizer, self.take)
        self.native = NativeOwner(shards[1], terms, [0] * MEMBERS, self.codec, owner, optimizer)
        self.pushes = [Pushes(self.codec, layout) for _ in range(MEMBERS)]
        self.numbers, self.editions, self.rounds = [0] * MEMBERS, [-1] * MEMBERS, [0] * MEMBERS
        self.ahead: set[int] = set()
        self.parts: dict[int, list[Piece]] = {}  # of each member's update that is under way, those to come
        self.ticket = 0
        self.gather = terms.gather

    def take(self, member: int, kind: Kind, serial: int, numbers: Sequence[float], payload: Any) -> None:
        told = [float(each) for each in numbers]
        self.sent.append((member, int(kind), serial, told, b"" if payload is None else payload.tobytes()))

    def tell(
        self, member: int, kind: Kind, serial: int = 0, numbers: Sequence[float] = (), payload: Any = None
    ) -> None:
        """A message to both, who answer the same."""
        given = np.empty(0, np.uint8) if payload is None else payload
        self.sent.clear()
        found = self.native.native.hear(member, int(kind), serial, list(numbers), payload)
        self.python.hear(Message(member, int(kind), serial, np.array(numbers, np.float64), given.copy()))
        mine = [(to, what, s, list(told), data.tobytes()) for to, what, s, told, data in found]
        assert mine == self.sent, f"{kind.name} of {member}"
        for to, what, _, told, _ in self.sent:
            if what in (Kind.VALUES, Kind.SETTLED):
                self.rounds[to] = int(told[0])
                self.editions[to] = int(told[2])

    def pieces(self, member: int, names: Sequence[str], some: bool, ahead: bool) -> list[Piece]:
        made: list[Piece] = []
        whole: dict[int, Any] = {}
        for name in names:
            parameter = self.layout.parameters[self.layout.numbers[name]]
            part, dtype = parameter.part(self.number), parameter.dtype
            if some and name == "w":
                n = part.stop - part.start
                rows = np.flatnonzero(self.rng.random(n) < 0.5)
                g = self.rng.standard_normal((len(rows), parameter.width)).astype(dtype)
                made.append(Piece(self.layout.numbers[name], rows, g.reshape(-1).view(np.uint8)))
            else:
                shape = parameter.rows, parameter.width
                whole[self.layout.numbers[name]] = self.rng.standard_normal(shape).astype(dtype)
        return self.pushes[member].pieces(self.number, whole, self.numbers[member], False, ahead) + made

    def cut(self, pieces: list[Piece]) -> Piece:
        """Takes away the first of the pieces, or some rows of it."""
        piece = pieces.pop(0)
        parameter = self.layout.parameters[piece.parameter]
        row = parameter.width * parameter.dtype.itemsize
        n = int(self.rng.integers(1, max(2, piece.data.size // row)))
        if piece.form or piece.rows is not None or n * row >= piece.data.size:
            return piece
        first = piece.first or 0
        pieces.insert(0, piece._replace(data=piece.data[n * row :], first=first + n))
        return piece._replace(data=piece.data[: n * row], first=first)

    def do(
        self,
        what: str,
        member: int,
        weight: float,
        some: bool,
        drops: bool,
        of: Sequence[str] = ("w", "v", "small", "x"),
    ) -> None:
        number = self.numbers[member]
        if member in self.parts and what not in ("part", "push"):
            return  # it sends nothing else before it has sent the rest
        if what == "part" and not drops and self.gather == 1:
            if member not in self.parts:
                names = ["v", "small"] if member in self.ahead else of
                self.parts[member] = self.pieces(member, names, some, False)
            if self.parts[member]:
                self.tell(member, Kind.PART, number, (), pack([self.cut(self.parts[member])]))
        elif what == "push" and member in self.parts:
            self.tell(member, Kind.PUSH, number, (1.0, math.nan), pack(self.parts.pop(member)))
            self.numbers[member] += 1
            self.ahead.discard(member)
        elif what == "push":
            weight = 1.0 if member in self.ahead else weight
            names = ["v", "small"] if member in self.ahead else of
            pieces = self.pieces(member, names, some, False)
            round_ = float(self.rounds[member]) if drops else math.nan
            self.tell(member, Kind.PUSH, number, (weight, round_), pack(pieces))
            self.numbers[member] += 1
            self.ahead.discard(member)
        elif what == "ahead" and member not in self.ahead:
            self.tell(member, Kind.AHEAD, number, (), pack(self.pieces(member, ["x", "w"], False, True)))
            self.ahead.add(member)
        elif what == "forget" and member in self.ahead:
            self.tell(member, Kind.FORGET, number)
            self.ahead.discard(member)
        elif what == "read":
            self.ticket += 1
            self.tell(member, Kind.READ, self.ticket, (math.nan, float(self.editions[member] - some)))
        elif what == "rows":
            self.ticket += 1
            rows = np.array([0, 2]) if some else None
            wanted = pack([Piece(self.layout.numbers["w"], rows, np.empty(0, np.uint8))])
            self.tell(member, Kind.READ, self.ticket, (0.0, float(self.editions[member])), wanted)
        elif what == "rest":
            self.tell(member, Kind.REST, self.ticket, (0.0, 0.0))
        elif what in ("clock", "leave"):
            self.tell(member, Kind[what.upper()])
        elif what == "load":
            given = {name: w * 2 for name, w in self.values.items()}
            slots = dict.fromkeys(self.python.shard.slots, given)
            self.python.load(given, slots)
            self.native.load(given, slots)


@settings(max_examples=100)
@given(
    TERMS,
    *(st.sampled_from(each) for each in (ENCODERS, OPTIMIZERS, [np.float32, np.float64])),
    st.sampled_from([True, True, True, False]),
    st.integers(0, 1),
    EVENTS,
)
def test_the_native_owner_does_the_same(terms, encoder, optimizer, dtype, encodes, owner, events):
    both = Both(terms, make(encoder, compressors), make(optimizer, optimizers), dtype, encodes, owner)
    for what, member, weight, some in events:
        both.do(what, member, weight, some, terms.late == "drop")
    for ours, theirs in [
        (both.python.shard.values, both.native.shard.values),
        *zip(both.python.shard.slots.values(), both.native.shard.slots.values(), strict=True),
    ]:
        assert [x.tobytes() for x in ours.values()] == [x.tobytes() for x in theirs.values()]
    assert (both.native.applied, both.native.dropped) == (both.python.applied, both.python.dropped)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("often", [(1, 3, 16), (1, 17, 20)])
def test_readers_that_are_behind_get_what_the_reference_gives(encoder, often):
    """One reads at every version, others every few of them: as many as editions are kept, or more."""
    both = Both(Terms(), make(encoder, compressors), make("sgd:lr=0.1", optimizers), np.float64, True, 0)
    known: list[dict[int, Any]] = [{} for _ in range(MEMBERS)]
    for version in range(1, 52):
        both.do("push", 0, 1.0, False, False, ["w", "v"])
        for member, each in enumerate(often):
            if version % each and version < 51:
                continue
            both.do("read", member, 1.0, False, False)
            _, _, _, told, data = both.sent[-1]
            if encoder == "onebit:block=64" and each < version < 51:
                assert bool(told[3]) == (each <= MOST_EDITIONS), f"a reader {each} editions behind"
            for piece in unpack(np.frombuffer(data, np.uint8)):
                if piece.form:
                    out = known[member].setdefault(piece.parameter, np.zeros(0))
                    both.codec.decode(piece, 0, out, accumulate=bool(told[3]))
                else:
                    known[member][piece.parameter] = piece.data.view(np.float64).copy()
    for member in (1, 2):
        assert all((known[member][n] == x).all() for n, x in known[0].items()), member
    assert both.python.applied == 51


def test_parts_are_applied_as_they_come_whoever_reads_and_pushes_between():
    """A read between finds the parts that have come, at the version before; the bits are those of that order."""
    terms = Terms(scale="inverse")
    both = Both(terms, None, make("sgd:lr=0.1,momentum=0.9", optimizers), np.float32, False, 0)
    before = both.native.shard.values[0].copy()
    for what, member in ("part", 0), ("part", 1), ("read", 2), ("part", 0), ("push", 2), ("part", 1), ("read", 2):
        both.do(what, member, 1.0, False, False)
        if what == "read" and both.native.applied == 0:
            (_, kind, _, told, data) = both.sent[0]
            values = unpack(np.frombuffer(data, np.uint8))[0].data.view(np.float32).reshape(before.shape)
            changed = (values != before).any(axis=1)
            assert (kind, told[0]) == (Kind.VALUES, 0) and changed.any() and not changed.all()
    assert both.native.applied == both.python.applied == 1, "parts are no updates"
    for member in (0, 1):
        both.do("push", member, 1.0, False, False)
    both.do("read", 0, 1.0, False, False)
    assert both.native.applied == both.python.applied == 3
    assert both.native.staleness == dict(both.python.staleness) == {0: 3}


@pytest.mark.parametrize("terms", [Terms(gather=2), Terms(late="drop")], ids=["gathered", "dropped"])
def test_a_part_is_refused_where_updates_wait_for_others(terms):
    both = Both(terms, None, make("sgd:lr=0.1", optimizers), np.float32, False, 0)
    message = pack([Piece(0, None, np.zeros(36, np.uint8), first=0)])
    before = both.native.shard.values[0].tobytes()
    with pytest.raises(ValueError, match="not applied as they come"):
        both.native.native.hear(0, int(Kind.PART), 0, [], message)
    with pytest.raises(AssertionError):
        both.python.hear(Message(0, Kind.PART, 0, np.empty(0), message))
    assert both.native.shard.values[0].tobytes() == before


@pytest.mark.parametrize(("first", "nbytes"), [(26, 36), (25, 72), (0, 40), (2**60, 36), (0, 2**62)])
def test_a_run_of_rows_that_does_not_fit_is_refused(first, nbytes):
    """Behind the end, over it, no whole rows, and longer than its message."""
    both = Both(Terms(), None, make("sgd:lr=0.1", optimizers), np.float32, False, 0)
    assert both.native.shard.values[0].shape == (26, 9)
    before = {n: w.tobytes() for n, w in both.native.shard.values.items()}
    message = np.concatenate([[1, 0, -2 - first, nbytes, 0], np.ones(9, np.int64)]).astype(np.int64).view(np.uint8)
    with pytest.raises(ValueError, match="does not fit"):
        both.native.native.hear(0, int(Kind.PART), 0, [], message)
    assert before == {n: w.tobytes() for n, w in both.native.shard.values.items()}


def test_terms_and_settings_of_other_members_hold():
    """Each member's own optimizer applies its updates, encoded as they come."""
    both = Both(Terms(), make("onebit:block=64", compressors), make("sgd:lr=0.1", optimizers), np.float64, True, 1)
    other = make("sgd:lr=3.0", optimizers)
    both.native.use(1, other)
    both.python._optimizers[1] = other
    for member in (0, 1, 2, 1):
        both.do("push", member, 1.0, False, False)
        both.do("read", member, 1.0, False, False)


@pytest.mark.parametrize(
    "piece", [(0, -1, 40, 1), (0, -1, 8, 1), (0, 1, 8, 1), (3, -1, 16, 1), (0, -1, 48, 2), (0, -1, 2**62, 0)]
)
def test_what_is_encoded_and_does_not_fit_is_refused(piece):
    """Too short, too long, of some rows, of what travels as it is, of factors; and a piece longer than its message."""
    both = Both(Terms(), make("onebit:block=64", compressors), make("sgd:lr=0.1", optimizers), np.float32, True, 0)
    before = {n: w.tobytes() for n, w in both.native.shard.values.items()}
    message = np.array([1, *piece, *[0] * 8], np.int64).view(np.uint8)
    with pytest.raises(ValueError, match="does not fit"):
        both.native.native.hear(0, int(Kind.PUSH), 0, [1.0, math.nan], message)
    assert before == {n: w.tobytes() for n, w in both.native.shard.values.items()}
