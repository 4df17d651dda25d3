"""What a stress run's ranks do and must get, from the seed alone; benchmarks/stress.py does it."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

FLOATS, INTEGERS = ("float32", "float64", "float16"), ("int32", "int64", "uint8")
OPERATIONS = ("SUM", "SUM", "SUM", "MAX", "MIN", "PROD")
ALGORITHMS = ("auto", "auto", "auto", "ring", "recursive_doubling", "double_binary_tree", "mpi", "shared_memory")
OWN = ("TypeError", "ValueError")
"""The error of a rank whose arguments are bad."""

UNUSABLE = ("RuntimeError", "PeerError")

_REDUCE = ("dtype", "shape", "order", "op", "algorithm")
FUNCTIONS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    # What a rank does: the name by which ranks know it, what they must give alike, what can be wrong with it.
    "Allreduce": ("Allreduce", _REDUCE, ("read_only", "short", "swapped", "object", "strided")),
    "Iallreduce": ("Iallreduce", _REDUCE, ("read_only", "short", "swapped", "object", "strided")),
    "persistent": ("Allreduce_init", _REDUCE, ("read_only", "short", "swapped", "strided")),
    "Reduce": ("Reduce", (*_REDUCE, "root"), ("root", "list")),
    "Reduce_scatter_block": ("Reduce_scatter_block", ("dtype", "shape", "op", "algorithm"), ("read_only", "short")),
    "Allgather": ("Allgather", ("shape", "algorithm"), ("read_only", "short", "swapped")),
    "Iallgather": ("Iallgather", ("shape", "algorithm"), ("read_only", "short", "swapped")),
    "Bcast": ("Bcast", ("shape", "order", "root", "algorithm"), ("root", "swapped", "strided")),
    "allreduce": ("allreduce", (*_REDUCE, "mean"), ("read_only", "short", "object", "algorithm", "mean")),
    "plan": ("plan_allreduce", _REDUCE, ("read_only", "swapped", "object", "strided", "algorithm")),
    "started": ("plan_allreduce", _REDUCE, ("read_only", "swapped", "object", "strided", "algorithm")),
    "compressed": ("plan_allreduce", ("dtype", "shape", "algorithm"), ("read_only", "algorithm", "nan")),
    "empty": ("empty", ("dtype", "shape"), ("shape", "object")),
    "kept": ("a run of a plan", ("index",), ()),
    "trainer": ("DataParallel", (), ("nan",)),
}
WEIGHTS = {"Allreduce": 5, "allreduce": 3, "kept": 5, "trainer": 0.5, "compressed": 1, "empty": 1}
BESIDE = ("Iallreduce", "Iallgather", "kept")
SINGLE = ("Allreduce", "allreduce", "Allgather", "Reduce_scatter_block")
"""One call of the library each, that no rank comes out of before all have come."""

KINDS = {
    "legal": 50.0,
    "illegal": 20.0,
    "together": 8.0,
    "part": 5.0,
    "turns": 2.0,
    "own": 2.0,
    "race": 1.5,
    "collide": 1.5,
    "late": 1.5,
    "interrupt": 1.5,
    "unequal": 1.0,
}
"""Kinds of steps, and how often they come.

``legal`` and ``illegal``: one call of each rank. ``together``: several begun before any is waited for. ``part``: in a
duplicate, or in parts that are split off. ``turns``: two threads in turns. ``own``: two threads, each with its own
duplicate. ``race``: two threads at once in one communicator. ``collide``: a thread comes while another surely is
inside. ``late``: a rank is interrupted while it surely waits for another. ``interrupt``: at any time, on one rank or
more. ``unequal``: a trainer's step on most ranks, another call on one.
"""


@dataclass(frozen=True)
class Call:
    """What one rank does. ``bad``: what is wrong with it. ``mixed``: it is waited for in a Waitall, beside others."""

    function: str
    dtype: str = "float64"
    shape: tuple[int, ...] = (10,)
    op: str = "SUM"
    root: int = 0
    algorithm: str = "auto"
    order: str = "C"
    mean: bool = False
    index: int = 0
    in_place: bool = True
    mixed: bool = False
    bad: str = ""


@dataclass(frozen=True)
class Step:
    """What all ranks do. ``rounds``: one call of each rank after the other.

    ``victims`` are interrupted, or have threads that collide; ``late`` comes when that has happened. ``colors``: the
    part in which each rank is. ``seconds``: how long each rank waits before, and its interrupt.
    """

    number: int
    kind: str
    rounds: tuple[tuple[Call, ...], ...]
    victims: tuple[int, ...]
    late: int
    colors: tuple[int, ...]
    seconds: tuple[float, ...]
    fresh: bool
    raw: bool

    def words(self) -> str:
        """The step in a few lines: what is not as usual in each call."""
        usual = {field.name: field.default for field in dataclasses.fields(Call)}
        lines = [f"step {self.number}: {self.kind}, victims {self.victims}, late {self.late}, colors {self.colors}"]
        for calls in self.rounds:
            for rank, call in enumerate(calls):
                if rank == 0 or call != calls[0]:
                    unusual = [f"{k}={v}" for k, v in dataclasses.asdict(call).items() if v != usual[k]]
                    lines.append(f"  {'all ranks' if len(set(calls)) == 1 else f'rank {rank}'}: {', '.join(unusual)}")
        return "\n".join(lines)


def draw(seed: int, number: int, size: int) -> Step:
    """Step ``number`` of ``size`` ranks."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    victims = tuple(sorted(rng.sample(range(size), rng.randrange(1, size))))
    if kind in ("late", "unequal"):
        victims = victims[:1]
    if kind == "interrupt" and rng.random() < 0.3:
        victims = tuple(range(size))
    late = rng.choice([rank for rank in range(size) if rank not in victims] or [0])
    alike, functions = True, tuple(FUNCTIONS)
    count = rng.randrange(2, 5) if kind in ("together", "part", "turns", "own") else 1
    if kind in ("collide", "race", "interrupt"):
        more = {"collide": ("kept",), "race": (), "interrupt": ("Reduce", "Bcast", "kept")}[kind]
        functions = SINGLE + more
    elif kind == "together":
        functions = BESIDE
    elif kind == "unequal":
        functions = ("Allreduce", "allreduce", "Bcast", "plan", "kept", "trainer")
    indices = rng.sample(range(3), 3) * 2
    rounds: list[tuple[Call, ...]] = []
    for k in range(count):
        call = replace(legal(rng, functions, 2 if kind == "part" else size), index=indices[k])
        if kind in ("late", "interrupt"):
            call = replace(call, mixed=False)
        if kind == "together" and call.function == "kept" and k > 2:
            call = replace(call, function="Iallreduce")
        alike = kind not in ("illegal", "together", "part", "own") or (kind != "illegal" and rng.random() < 0.7)
        rounds.append((call,) * size if alike else illegal(rng, call, size, functions))
    if kind == "collide":
        second = legal(rng, tuple(f for f in FUNCTIONS if f != "kept"), size)
        rounds.append((replace(second, mixed=False),) * size)
    if kind == "together":
        rounds = _with_active(rounds)
    colors = tuple(rng.randrange(2) for _ in range(size)) if rng.random() < 0.6 else (0,) * size
    seconds = tuple(rng.choice((0.0, rng.uniform(0, 3e-3))) for _ in range(size))
    return Step(number, kind, tuple(rounds), victims, late, colors, seconds, rng.random() < 0.03, rng.random() < 0.4)


def legal(rng: random.Random, functions: Sequence[str], size: int) -> Call:
    """A call that all ranks may make."""
    function = rng.choices(functions, [WEIGHTS.get(name, 2) for name in functions])[0]
    dtype = rng.choice(FLOATS + INTEGERS)
    shape: tuple[int, ...] = (rng.choice((0, 1, 3, 10, 100, 1000, 20000)),)
    if rng.random() < 0.01:
        shape = (300_000,)
    order = "C"
    if "order" in FUNCTIONS[function][1] and rng.random() < 0.3:
        shape, order = (rng.randrange(2, 20), rng.randrange(2, 20)), rng.choice("CF")
    if function in ("compressed", "trainer"):
        dtype, shape = "float32", (rng.choice((1, 10, 3000)),)
    if function == "kept":
        return Call(function)
    op = rng.choice(OPERATIONS) if "op" in FUNCTIONS[function][1] else "SUM"
    if function in ("Allreduce", "Iallreduce", "Reduce") and rng.random() < 0.05:
        op, dtype = "user", "float64"
    mean = function == "allreduce" and op == "SUM" and dtype in FLOATS and rng.random() < 0.3
    return Call(
        function,
        dtype,
        shape,
        op,
        root=rng.randrange(size) if "root" in FUNCTIONS[function][1] else 0,
        algorithm=rng.choice(ALGORITHMS) if "algorithm" in FUNCTIONS[function][1] else "auto",
        order=order,
        mean=mean,
        in_place=rng.random() < 0.5,
        mixed=function == "Iallreduce" and rng.random() < 0.3,
    )


def illegal(rng: random.Random, call: Call, size: int, functions: Sequence[str]) -> tuple[Call, ...]:
    """``call`` on most ranks; on some something else, or with something wrong."""
    calls = [call] * size
    _, terms, faults = FUNCTIONS[call.function]
    differing = rng.sample(range(size), rng.randrange(1, size))
    way = rng.random()
    if way < 0.35 and faults:
        bad = rng.choice(faults)
        some = range(size) if rng.random() < 0.2 or bad == "nan" else differing
        for rank in some:
            calls[rank] = spoiled(call, bad)
    elif way < 0.7 and terms:
        other = different(rng, call, rng.choice(terms))
        if other is not None:
            for rank in differing:
                calls[rank] = other
    else:
        others = [f for f in functions if FUNCTIONS[f][0] != FUNCTIONS[call.function][0]]
        if others:
            other = replace(legal(rng, others, size), index=call.index)
            for rank in differing:
                calls[rank] = other
    return tuple(calls)


def _with_active(rounds: Sequence[tuple[Call, ...]]) -> list[tuple[Call, ...]]:
    """The rounds; a plan that is started again is a fault, "active"."""
    kept: list[tuple[Call, ...]] = []
    for calls in rounds:
        kept.append(
            tuple(
                replace(call, bad="active")
                if call.function == "kept" and any(before[rank] == call for before in kept)
                else call
                for rank, call in enumerate(calls)
            )
        )
    return kept


def spoiled(call: Call, bad: str) -> Call:
    """The call with something wrong."""
    if bad == "swapped":
        call = replace(call, dtype=call.dtype if call.dtype != "uint8" else "int32")
    if bad == "short":
        call = replace(call, in_place=False)
    if bad in ("short", "strided", "nan", "swapped"):
        call = replace(call, shape=(max(2, math.prod(call.shape)),), order="C")
    return replace(call, bad=bad, op="SUM" if call.op == "user" else call.op)


def different(rng: random.Random, call: Call, term: str) -> Call | None:
    """The call with another ``term``; None where there is none."""
    if term == "dtype":
        dtypes = FLOATS[:2] if call.function == "compressed" else FLOATS[:2] + INTEGERS
        return (
            replace(call, dtype=rng.choice([d for d in dtypes if d != call.dtype]), op="SUM", mean=False)
            if not (call.mean or call.op != "SUM")
            else None
        )
    if term == "shape":
        return replace(call, shape=(math.prod(call.shape) + rng.randrange(1, 9),), order="C")
    if term == "order":
        return replace(call, order="F" if call.order == "C" else "C") if len(call.shape) == 2 else None
    if term == "op":
        return (
            replace(call, op=rng.choice([o for o in ("SUM", "MAX", "MIN", "PROD") if o != call.op]), mean=False)
            if (not call.mean)
            else None
        )
    if term == "root":
        return replace(call, root=1 - call.root if call.root < 2 else 0)
    if term == "algorithm":
        return replace(call, algorithm=rng.choice([a for a in ALGORITHMS if a != call.algorithm]))
    if term == "mean":
        return replace(call, mean=not call.mean) if call.dtype in FLOATS and call.op == "SUM" else None
    return replace(call, index=3)


def expected(calls: Sequence[Call]) -> list[tuple[str, ...]]:
    """What each rank may get of one call of each: "right", or the name of an error."""
    names = {FUNCTIONS[call.function][0] for call in calls}
    bad = [call.bad != "" for call in calls]
    if len(calls) == 1:
        found: list[tuple[str, ...]] = [("right",) if not bad[0] else OWN]
    elif len(names) > 1:
        found = [OWN if each else ("MismatchError",) for each in bad]
    elif any(bad):
        found = [OWN if each else ("PeerError",) for each in bad]
    else:
        terms = FUNCTIONS[calls[0].function][1]
        alike = {(call.function == "compressed", *(getattr(call, term) for term in terms)) for call in calls}
        found = [("right",) if len(alike) == 1 else ("MismatchError",)] * len(calls)
    special = {"nan": ("NonFiniteError",), "active": ("RuntimeError",)}
    found = [special.get(call.bad, each) for call, each in zip(calls, found, strict=True)]
    return [
        ("Exception",) if call.mixed and each != ("right",) else each for call, each in zip(calls, found, strict=True)
    ]


def part_of(step: Step, rank: int) -> list[int]:
    """The ranks in the rank's part."""
    return [r for r, color in enumerate(step.colors) if color == step.colors[rank]]


def name_of(got: str) -> str:
    return got.partition(":")[0]


def breaks(calls: Sequence[Call], shared: bool) -> bool:
    """Whether a communicator may be unusable after the calls, though none was cut short.

    Runs of plans find out that they differ beside the exchange, where ranks do not all share memory.
    """
    differ = expected(calls) != [("right",)] * len(calls)
    return differ and not shared and any(call.function == "kept" for call in calls)


def expected_in_turn(rounds: Sequence[Sequence[Call]], shared: bool) -> list[list[tuple[str, ...]]]:
    """``expected`` of rounds in one communicator."""
    found: list[list[tuple[str, ...]]] = []
    broken: tuple[str, ...] = ()
    for calls in rounds:
        found.append([each + broken for each in expected(calls)])
        if breaks(calls, shared):
            broken = (*UNUSABLE, "Exception")
    return found


def judge(step: Step, everyone: Sequence[Sequence[str]], shared: bool) -> str:
    """What is wrong with what the ranks got, in words; empty if nothing. ``shared``: they all share memory."""
    size = len(everyone)
    names = [[name_of(each) for each in got] for got in everyone]
    want: list[list[tuple[str, ...]]]
    if step.kind in ("legal", "illegal", "together", "turns"):
        rounds = expected_in_turn(step.rounds, shared)
        want = [[each[rank] for each in rounds] for rank in range(size)]
    elif step.kind == "own":
        halves = [expected_in_turn(step.rounds[k::2], shared) for k in range(2)]
        want = [[halves[k % 2][k // 2][rank] for k in range(len(step.rounds))] for rank in range(size)]
    elif step.kind == "part":
        want = []
        for rank in range(size):
            part = part_of(step, rank)
            rounds = expected_in_turn([[calls[r] for r in part] for calls in step.rounds], shared)
            want.append([each[part.index(rank)] for each in rounds])
    elif step.kind == "collide":
        want = [[("right",), ("RuntimeError",) if rank in step.victims else ("MismatchError",)] for rank in range(size)]
    elif step.kind == "unequal":
        want = [[("right",), ("MismatchError",), ("right",)]] * size
        if breaks(step.rounds[0], shared) or (step.rounds[0][0].function == "kept" and not shared):
            want = [[("right",), ("MismatchError",), ("right", *UNUSABLE)]] * size
    elif step.kind == "race":
        want = [[("right", "RuntimeError", "MismatchError")] * 10] * size
    elif step.kind == "late":
        return _judge_late(step, names)
    else:
        can = ("right", "KeyboardInterrupt", "PeerError", "RuntimeError")
        want = [[can if rank in step.victims else ("right", "PeerError")] * len(names[rank]) for rank in range(size)]
        if not any("KeyboardInterrupt" in got for got in names):
            want = [[("right",)]] * size
    wrong = [
        f"rank {rank}, round {k} should get {' or '.join(each)}"
        for rank in range(size)
        for k, each in enumerate(want[rank])
        if k >= len(names[rank]) or names[rank][k] not in each
    ]
    return "; ".join(wrong)


def _judge_late(step: Step, names: Sequence[Sequence[str]]) -> str:
    """Either the interrupt broke the call off, or all goes on as if it had not been.

    Others who had all that they needed by then are right all the same; they hear of it in their next call.
    """
    victim = list(names[step.victims[0]])
    others = {name for rank, got in enumerate(names) if rank not in step.victims for name in got}
    begun = step.rounds[0][0].function in BESIDE
    broken_off = others <= {"PeerError", "right"} and victim in (
        ["KeyboardInterrupt", "RuntimeError"],
        ["KeyboardInterrupt", "KeyboardInterrupt"] if begun else [],
    )
    goes_on = others == {"right"} and victim == ["KeyboardInterrupt", "right"]
    return "" if broken_off or goes_on else "the interrupt should break the call off on all ranks, or on none"
