"""A stress run: ranks that make random legal and illegal calls, threads that collide, and interrupts.

    python benchmarks/stress.py --calls 10000 --ranks 3 --seed 0 --json FILE

A step is drawn from the seed and its number alone, for all ranks at once. So each rank knows what all of them do in it,
and what each must get: the right sum of small whole numbers, or an error of the right kind. After each step the ranks
compare what they got over a communicator of mpi4py's own. A communicator that has become unusable must be so on every
rank; the ranks go on with a fresh duplicate of one that is kept aside. ``--first NUMBER --calls 1`` repeats a step.

What must hold: no hang (a call that takes too long ends the job, with all stacks), no wrong sum, no crash, and no error
but the one that the documentation promises (docs/communicator.md).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stress_calls import Arena, Calls, outcome
from stress_steps import BESIDE, FLOATS, UNUSABLE, Call, Step, breaks, draw, judge, name_of, part_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from run import launcher  # how this environment's mpirun is called

LIMIT_SECONDS = 90.0
"""For one call. BITRING_TIMEOUT is a third of it, so that most hangs come as errors."""


class Ranks:
    """One rank's part of the run."""

    def __init__(self, seed: int) -> None:
        from mpi4py import MPI

        self.seed = seed
        self.aside, self.side = MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.aside.Get_rank(), self.aside.Get_size()
        for rank in range(self.size):  # compiling may take longer than a wait may
            if rank == self.rank:
                _compile()
            self.side.Barrier()
        self.calls = Calls(self.side)
        self.arena = Arena(self.aside.Dup(), raw=False)
        self.arenas = 1
        self.counted: Counter[str] = Counter()
        self._armed = False
        self._watched: tuple[float, str] = (math.inf, "")
        signal.signal(signal.SIGINT, self._interrupt)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            until, words = self._watched
            if time.monotonic() > until:
                faulthandler.dump_traceback_later(5, exit=True)  # in case this thread cannot go on either
                print(f"rank {self.rank} hangs, seed {self.seed}, {words}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                time.sleep(3)  # the other ranks say it, too
                os._exit(1)

    def _interrupt(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def renew(self, raw: bool) -> None:
        """Go on with a fresh communicator. Collective."""
        self.arena.free()
        self.arena = Arena(self.aside.Dup(), raw)
        self.arenas += 1

    def step(self, number: int) -> str:
        """Make the step; what is wrong with what the ranks got, empty if nothing."""
        step = draw(self.seed, number, self.size)
        faulthandler.dump_traceback_later(LIMIT_SECONDS + 10, exit=True)
        self._watched = (time.monotonic() + LIMIT_SECONDS, step.words())
        if step.fresh:
            self.renew(step.raw)
        time.sleep(step.seconds[self.rank])
        mine = getattr(self, f"_do_{step.kind}")(step)
        everyone = self.side.allgather(mine)
        complaint = judge(step, everyone, self._shared())
        for got in everyone:
            self.counted.update(name_of(each) for each in got)
        if not complaint:
            complaint = self._probe(step, number)
        self._watched = (math.inf, "")
        if not complaint:
            return ""
        self.renew(step.raw)
        told = "\n".join(f"  rank {rank} got {got}" for rank, got in enumerate(everyone))
        return f"seed {self.seed}, {self.size} ranks, {step.words()}\n{told}\n  {complaint}"

    def _probe(self, step: Step, number: int) -> str:
        """Whether the communicator is usable, or unusable, on all ranks; and goes on with another one in that case."""
        probe = Call(("Allreduce", "allreduce", "Bcast", "Iallreduce", "plan")[number % 5])
        if step.kind == "legal":
            return ""
        first = self.side.allgather(self.calls.outcome(self.arena, probe))
        if all(each == "right" for each in first) and step.kind != "collide":
            return ""
        may_break = step.kind in ("illegal", "together", "unequal") and any(
            breaks(calls, self._shared())
            or (step.kind == "unequal" and calls[0].function == "kept" and not self._shared())
            for calls in step.rounds
        )
        if step.kind not in ("collide", "race", "late", "interrupt") and not may_break:
            return f"then {probe.function} should be right on all ranks; got {first}"
        if not all(name_of(each) in UNUSABLE for each in first):
            return f"then {probe.function} should be right on all ranks, or an error on all; got {first}"
        second = self.side.allgather(self.calls.outcome(self.arena, probe))
        if not all("this communicator is unusable since" in each for each in second):
            return f"then the communicator should be unusable on all ranks; got {first}, and {second}"
        self.renew(step.raw)
        return ""

    def _prepare(self, arena: Arena, calls: Sequence[Call]) -> None:
        if any(call.function == "kept" for call in calls):
            arena.make_plans()

    def _do_legal(self, step: Step) -> list[str]:
        self._prepare(self.arena, step.rounds[0])
        return [self.calls.outcome(self.arena, step.rounds[0][self.rank])]

    _do_illegal = _do_legal

    def _do_together(self, step: Step) -> list[str]:
        self._prepare(self.arena, [call for calls in step.rounds for call in calls])
        begun: dict[int, Callable[[], str]] = {}
        got = [""] * len(step.rounds)
        for k, calls in enumerate(step.rounds):
            try:
                begun[k] = self.calls.begin(self.arena, calls[self.rank], beside=True)
            except Exception as error:
                got[k] = f"{type(error).__name__}: {error}"
        order = list(begun)
        random.Random(f"{step.number} {self.rank}").shuffle(order)
        for k in order:
            got[k] = outcome(begun[k])
        return got

    def _do_part(self, step: Step) -> list[str]:
        if len(set(step.colors)) == 1:
            part = Arena(self.arena.comm.Dup(), step.raw)
        else:
            part = Arena(self.arena.comm.Split(step.colors[self.rank], self.rank), step.raw)
        got: list[str] = []
        for calls in step.rounds:
            self._prepare(part, [calls[rank] for rank in part_of(step, self.rank)])
            got.append(self.calls.outcome(part, calls[self.rank]))
        part.free()
        return got

    def _do_turns(self, step: Step) -> list[str]:
        self._prepare(self.arena, [call for calls in step.rounds for call in calls])
        turns = [threading.Semaphore(1), threading.Semaphore(0)]
        got = [""] * len(step.rounds)

        def work(k: int) -> None:
            for number in range(k, len(step.rounds), 2):
                turns[k].acquire()
                got[number] = self.calls.outcome(self.arena, step.rounds[number][self.rank])
                turns[1 - k].release()

        _together(work)
        return got

    def _do_own(self, step: Step) -> list[str]:
        arenas = [Arena(self.arena.comm.Dup(), step.raw) for _ in range(2)]
        got = [""] * len(step.rounds)

        def work(k: int) -> None:
            for number in range(k, len(step.rounds), 2):
                self._prepare(arenas[k], step.rounds[number])
                got[number] = self.calls.outcome(arenas[k], step.rounds[number][self.rank])

        _together(work)
        for arena in arenas:
            arena.free()
        return got

    def _do_race(self, step: Step) -> list[str]:
        got: list[list[str]] = [[], []]

        def work(k: int) -> None:
            for _ in range(5):
                got[k].append(self.calls.outcome(self.arena, step.rounds[0][self.rank]))

        _together(work)
        return got[0] + got[1]

    def _do_collide(self, step: Step) -> list[str]:
        first, second = (calls[self.rank] for calls in step.rounds)
        self._prepare(self.arena, step.rounds[0])
        got = ["", ""]
        if self.rank in step.victims:

            def work() -> None:
                got[0] = self.calls.outcome(self.arena, first)

            worker = threading.Thread(target=work)
            worker.start()
            while not self._inside():
                time.sleep(1e-4)
            got[1] = self.calls.outcome(self.arena, second)
            self.side.send(None, step.late, 8)
            worker.join()
            return got
        if self.rank == step.late:
            for victim in step.victims:
                self.side.recv(source=victim, tag=8)
        return [self.calls.outcome(self.arena, call) for call in (first, second)]

    def _do_late(self, step: Step) -> list[str]:
        call = step.rounds[0][self.rank]
        self._prepare(self.arena, step.rounds[0])
        if self.rank == step.late:
            self.side.recv(source=step.victims[0], tag=9)
        if self.rank != step.victims[0]:
            return [self.calls.outcome(self.arena, call)]
        begun: list[Callable[[], str]] = []
        waits = threading.Event()

        def make() -> str:
            begun.append(self.calls.begin(self.arena, call, beside=True))
            if call.function in BESIDE:
                waits.set()
            return begun[0]()

        def strike() -> None:
            # What goes on beside its caller is interrupted in its wait: it has been begun by then.
            while not (waits.is_set() or (call.function not in BESIDE and self._inside())):
                time.sleep(1e-4)
            time.sleep(10 * step.seconds[self.rank])
            os.kill(os.getpid(), signal.SIGINT)

        got = [self._interrupted(make, strike)]
        self.side.send(None, step.late, 9)
        return [*got, outcome(begun[0] if call.function in BESIDE else make)]

    def _do_interrupt(self, step: Step) -> list[str]:
        call = step.rounds[0][self.rank]
        self._prepare(self.arena, step.rounds[0])
        if self.rank not in step.victims:
            return [self.calls.outcome(self.arena, call)]
        queue = self._queue()
        before = queue.count

        def strike() -> None:
            time.sleep(step.seconds[self.rank])
            os.kill(os.getpid(), signal.SIGINT)

        got = [self._interrupted(lambda: self.calls.make(self.arena, call), strike)]
        not_begun = queue.count == before and not queue.broken
        goes_on = call.function == "kept" and self.arena.plans[call.index][0].started
        if got[0].startswith("KeyboardInterrupt") and (not_begun or goes_on):
            got.append(self.calls.outcome(self.arena, call))
        return got

    def _interrupted(self, make: Callable[[], str], strike: Callable[[], None]) -> str:
        """What comes of ``make`` while ``strike`` runs beside it."""
        striker = threading.Thread(target=strike)
        try:
            self._armed = True
            striker.start()
            got = outcome(make)
            self._armed = False
        except KeyboardInterrupt as error:
            got = f"KeyboardInterrupt: {error}"
        striker.join()
        return got

    def _do_unequal(self, step: Step) -> list[str]:
        import numpy as np

        import bitring

        self._prepare(self.arena, step.rounds[0])
        w = np.zeros(10, np.float32)
        trainer = bitring.DataParallel({"w": w}, bitring.SGD(lr=1.0), comm=self.arena.comm)
        total = self.size * (self.size + 1) / 2

        def train(steps: int) -> str:
            trainer.step({"w": np.full(10, self.rank + 1, np.float32)})
            return "right" if np.allclose(-w * self.size, steps * total) else f"wrong: {w}"

        got = [outcome(lambda: train(1))]
        if self.rank in step.victims:
            got.append(self.calls.outcome(self.arena, step.rounds[0][self.rank]))
        else:
            got.append(outcome(lambda: train(2)))
        got.append(outcome(lambda: train(2)))
        trainer.free()
        return got

    def _queue(self) -> Any:
        from bitring.collectives.runtime.context import context_of

        return context_of(self.arena.raw).queue

    def _shared(self) -> bool:
        from bitring.collectives.runtime.context import context_of

        return context_of(self.arena.raw).common is not None

    def _inside(self) -> bool:
        """Whether a thread is inside a call of the communicator."""
        from bitring.collectives.runtime.context import context_of

        context = context_of(self.arena.raw)
        return bool(context._turns._thread or (context.queue.fast_path is not None and context.queue.fast_path.inside))


def _compile() -> None:
    import numpy as np
    from mpi4py import MPI

    import bitring

    for dtype in FLOATS[:2]:
        plan = bitring.plan_allreduce(np.ones(100, dtype), comm=MPI.COMM_SELF, compression="onebit")
        plan()
        plan.free()


def _together(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def work(asked: argparse.Namespace) -> int:
    """One rank."""
    from bitring.nodes import describe

    ranks = Ranks(asked.seed)
    machine = describe(ranks.aside)
    begun = said = time.monotonic()
    failures: list[str] = []
    number = asked.first
    for number in range(asked.first, asked.first + asked.calls):
        complaint = ranks.step(number)
        if complaint:
            failures.append(complaint)
            if ranks.rank == 0:
                print(f"\nfailed: {complaint}", flush=True)
            if "TimeoutError" in complaint or len(failures) >= 20:
                break
        if ranks.rank == 0 and time.monotonic() - said > 2:
            said = time.monotonic()
            done = number + 1 - asked.first
            print(f"\r{done} of {asked.calls}, {len(failures)} failed", end="", file=sys.stderr, flush=True)
    faulthandler.cancel_dump_traceback_later()
    if ranks.rank != 0:
        return 1 if failures else 0
    made = number + 1 - asked.first
    seconds = round(time.monotonic() - begun, 1)
    counted = dict(ranks.counted.most_common())
    print(f"\n{counted}\n{made} steps on {ranks.arenas} communicators in {seconds} s, {len(failures)} failed")
    if asked.json:
        kept = {
            "benchmark": "stress",
            "seed": asked.seed,
            "first": asked.first,
            "steps": made,
            "machine": machine,
            "native": os.environ.get("BITRING_NATIVE", ""),
            "seconds": seconds,
            "communicators": ranks.arenas,
            "outcomes": counted,
            "failures": failures,
        }
        asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A stress run.")
    parser.add_argument("--ranks", type=int, default=3, help="2 or more (%(default)s)")
    parser.add_argument("--calls", type=int, default=10_000, help="steps (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the steps (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep what was seen here")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.ranks < 2:
        parser.error("--ranks must be 2 or more")
    if asked.work:
        return work(asked)
    prefix, environment = launcher(asked.ranks)
    environment |= {"BITRING_TIMEOUT": f"{LIMIT_SECONDS / 3:g}"}
    command = [*prefix, sys.executable, __file__, *sys.argv[1:], "--work"]
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.run(command, env=os.environ | environment, check=False).returncode
    return 130


if __name__ == "__main__":
    sys.exit(main())
