"""A soak: very many operations of all kinds, after which a process must be as large as before.

    python benchmarks/soak.py --json FILE

First small AllReduces, through a plan and through ``comm.Allreduce`` in turns; then a mix drawn by a seed: exact plans,
1-bit and started ones, calls without a plan, nonblocking and other collectives, ``Dup``, ``Split`` and ``Free``, and
arrays of ``comm.empty``; 0 bytes to 1 MiB, several dtypes and operations. Then parameter stores, and trainers in the
modes that have one, each made, used and freed, in every way to serve it. Results are checked now and then. At regular
points each rank looks at its resident memory, file descriptors, threads, mapped memory areas, and at /dev/shm; a
phase's first fifth is for warming up, and after it nothing may grow.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from run import launcher  # how this environment's mpirun is called

POINTS = 25
"""Looks in each phase."""

MAX_NBYTES = 1 << 20

# UCX, which an MPI library may use, follows each mmap and munmap of the process, and keeps some 150 bytes of each for
# ever: a process that only maps and unmaps memory, without bitring, grows as much.
_NO_MEMORY_EVENTS = {"UCX_MEM_EVENTS": "n", "UCX_MEM_MMAP_HOOK_MODE": "none"}

STORES = (
    ("store", None),
    ("asynchronous:scale=none", None),
    ("asynchronous:scale=none", "onebit"),
    ("ssp:staleness=1", None),
    ("project_adam", "float16"),
    ("hogwild:locks=true", None),
    ("peers", None),
)
"""Modes, and what compresses: the ways in which a store is served."""

GROWTH = {"resident_mib": 4.0, "descriptors": 0, "threads": 0, "mappings": 16, "dev_shm": 0}
"""By how much a process may grow: the allocators' caches still shift a little."""


def look() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_mib": round(pages * os.sysconf("SC_PAGESIZE") / 2**20, 2),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
        "dev_shm": sum(name.startswith("bitring") for name in os.listdir("/dev/shm")),
    }


class Soak:
    """One rank's part. The same seed makes the same operations on all ranks."""

    def __init__(self, seed: int) -> None:
        import numpy as np
        from mpi4py import MPI

        import bitring

        self.np, self.MPI, self.bitring = np, MPI, bitring
        self.comm = bitring.Communicator(MPI.COMM_WORLD)
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        self.rng = random.Random(seed)
        self.dtypes = [np.dtype(name) for name in ("float32", "float64", "float16", "int32", "int64", "uint8")]
        self.kinds = [name for name in dir(self) if name.startswith("_do_")]
        # Compiling is rare, and mixed operations of short runs are few.
        weights = {"_do_dup": 1, "_do_split": 1, "_do_empty": 4, "_do_onebit": 6, "_do_new_plan": 6}
        self.weights = [weights.get(name, 12) for name in self.kinds]
        self.plans: list[tuple[Any, Any, Any]] = []
        self.onebit = np.empty(5000, np.float32)
        self.onebit_plan = bitring.plan_allreduce(self.onebit, comm=self.comm, compression=bitring.OneBit(block=256))
        self.checks = 0

    def array(self) -> Any:
        """Private memory, filled so that a result can be told."""
        dtype = self.rng.choice(self.dtypes)
        nbytes = self.rng.choice((0, 4, int(2 ** self.rng.uniform(0, 20)), MAX_NBYTES))
        nbytes = nbytes if self.rng.random() < 0.1 else min(nbytes, int(2 ** self.rng.uniform(2, 17)))
        return self.np.full(nbytes // dtype.itemsize, self.rank + 1, dtype)

    def op(self) -> tuple[Any, int]:
        """An operation, and what it makes of 1, ..., p."""
        MPI, p = self.MPI, self.size
        return self.rng.choice(((MPI.SUM, p * (p + 1) // 2), (MPI.MAX, p), (MPI.MIN, 1)))

    def check(self, x: Any, expected: float) -> None:
        """Now and then."""
        if self.rng.random() < 0.1:
            self.checks += 1
            if not (x == expected).all():
                raise AssertionError(f"rank {self.rank}: {expected} expected, got {x}")

    def _do_allreduce(self) -> None:
        x, (op, expected) = self.array(), self.op()
        self.comm.Allreduce(self.MPI.IN_PLACE, x, op)
        self.check(x, expected)

    def _do_allreduce_to(self) -> None:
        x, (op, expected) = self.array(), self.op()
        y = self.np.empty_like(x)
        self.comm.Allreduce(x, y, op)
        self.check(y, expected)

    def _do_function(self) -> None:
        x, (op, expected) = self.array(), self.op()
        names = [name for name in self.bitring.algorithms() if name != "multilane"]
        self.check(self.bitring.allreduce(x, op=op, algorithm=self.rng.choice(names)), expected)

    def _do_nonblocking(self) -> None:
        x, (op, expected) = self.array(), self.op()
        self.comm.Iallreduce(self.MPI.IN_PLACE, x, op).Wait()
        self.check(x, expected)

    def _do_others(self) -> None:
        x = self.array()
        root = self.rng.randrange(self.size)
        self.comm.Bcast(x, root)
        self.check(x, root + 1)
        x[:] = self.rank + 1
        y = self.np.empty((self.size, x.size), x.dtype)
        self.comm.Allgather(x, y)
        self.check(y, self.np.arange(1, self.size + 1)[:, None])
        z = self.np.zeros_like(x)
        self.comm.Reduce(x, z, root=root)
        self.check(z, self.size * (self.size + 1) // 2 if self.rank == root else 0)

    def _do_new_plan(self) -> None:
        x, (op, expected) = self.array(), self.op()
        names = [name for name in self.bitring.algorithms() if name != "multilane"]
        plan = self.bitring.plan_allreduce(x, comm=self.comm, op=op, algorithm=self.rng.choice(["auto", *names]))
        self.plans.append((plan, x, expected))
        if len(self.plans) > 8:
            self.plans.pop(self.rng.randrange(len(self.plans)))[0].free()

    def _do_plan(self) -> None:
        if self.plans:
            plan, x, expected = self.rng.choice(self.plans)
            x[:] = self.rank + 1
            plan()
            self.check(x, expected)

    def _do_started(self) -> None:
        several = self.rng.sample(self.plans, min(3, len(self.plans)))
        for plan, x, _ in several:
            x[:] = self.rank + 1
            plan.start()
        for plan, x, expected in several:
            plan.wait()
            self.check(x, expected)

    def _do_started_together(self) -> None:
        several = self.rng.sample(self.plans, min(4, len(self.plans)))
        for _, x, _ in several:
            x[:] = self.rank + 1
        if several:
            self.bitring.start([plan for plan, _, _ in several])
        for plan, x, expected in several:
            plan.wait()
            self.check(x, expected)

    def _do_onebit(self) -> None:
        self.onebit[:] = self.rank + 1
        self.onebit_plan.start()
        self.onebit_plan.wait()
        self.check(self.onebit.round(3), self.size * (self.size + 1) // 2)

    def _do_empty(self) -> None:
        x = self.comm.empty(self.rng.randrange(1, MAX_NBYTES // 4))
        x[:] = self.rank + 1
        self.comm.Allreduce(self.MPI.IN_PLACE, x)
        self.check(x, self.size * (self.size + 1) // 2)

    def _do_dup(self) -> None:
        self.use(self.comm.Dup())

    def _do_split(self) -> None:
        self.use(self.comm.Split(self.rank % 2 if self.rng.random() < 0.5 else 0, -self.rank))

    def use(self, comm: Any) -> None:
        """A communicator of its own, for a while."""
        x = self.np.full(self.rng.choice((3, 3000)), 1, self.np.float32)
        comm.Allreduce(self.MPI.IN_PLACE, x)
        self.check(x, comm.Get_size())
        plan = self.bitring.plan_allreduce(x, comm=comm)
        plan()
        plan.free()
        comm.Free()

    def small(self) -> Callable[[], None]:
        """One small operation."""
        x = self.np.zeros(16, self.np.float32)
        y = self.np.zeros(16, self.np.float32)
        plan = self.bitring.plan_allreduce(x, comm=self.comm)
        turn = False

        def one() -> None:
            nonlocal turn
            turn = not turn
            if turn:
                plan()
            else:
                self.comm.Allreduce(self.MPI.IN_PLACE, y)

        return one

    def mixed(self) -> Callable[[], None]:
        """One operation of any kind."""

        def one() -> None:
            getattr(self, self.rng.choices(self.kinds, self.weights)[0])()

        return one

    def stores(self) -> Callable[[], None]:
        """One store or trainer, made, used and freed, in turn of each kind."""
        np, bitring, p = self.np, self.bitring, self.size
        kinds = itertools.cycle(itertools.product(STORES, (None, 1, p), (17, 20_000)))

        def one() -> None:
            (mode, compression), servers, values = next(kinds)
            if mode in ("hogwild:locks=true", "peers"):
                servers = None
            w = self.comm.empty(values) if mode.startswith("hogwild") else np.empty(values, np.float32)
            w[:], ones = 0, np.ones(values, np.float32)
            name = mode if servers is None else f"{mode}{',' if ':' in mode else ':'}servers={servers}"
            if mode == "store":
                store = bitring.ParameterStore({"w": w}, bitring.SGD(lr=1.0), comm=self.comm, servers=servers)
                store.inc({"w": -ones})
                store.clock()
                w = store.synchronize()["w"]
                store.free()
            else:
                options = {"comm": self.comm, "mode": name, "compression": compression}
                trainer = bitring.DataParallel({"w": w}, bitring.SGD(lr=1.0), **options)
                trainer.step({"w": -ones})
                trainer.synchronize()
                trainer.free()
            if compression is None and mode != "peers" and (w != p).any():
                raise AssertionError(f"rank {self.rank}: {p} expected of {name}, got {w}")

        return one

    def phase(self, name: str, count: int, one: Callable[[], None]) -> dict[str, Any]:
        """Do it ``count`` times, and look at regular points; what every rank saw."""
        begun = time.monotonic()
        seen = [{"operations": 0, **look()}]
        for point in range(1, POINTS + 1):
            for _ in range(count * (point - 1) // POINTS, count * point // POINTS):
                one()
            self.comm.Barrier()
            seen.append({"operations": count * point // POINTS, **look()})
            self.comm.Barrier()  # nobody makes anything while another looks
        everyone = self.comm.gather(seen)
        return {"phase": name, "seconds": round(time.monotonic() - begun, 1), "ranks": everyone}


def grown(ranks: list[list[dict[str, float]]]) -> list[str]:
    """What grew on which rank after the phase's first fifth."""
    complaints: list[str] = []
    for rank, seen in enumerate(ranks):
        warm = seen[POINTS // 5 :]
        third = len(warm) // 3
        for name, allowed in GROWTH.items():
            # What is alive at one look, such as eight plans and their arrays, says nothing.
            before, after = (statistics.median(e[name] for e in part) for part in (warm[:third], warm[-third:]))
            if after > before + allowed:
                complaints.append(f"rank {rank}: {name} from {before} to {after}")
    return complaints


def table(phase: dict[str, Any]) -> str:
    """The phase as rank 0 saw it."""
    seen = phase["ranks"][0]
    names = list(seen[0])
    lines = [f"{phase['phase']}: {phase['seconds']} s", "".join(f"{name:>14}" for name in names)]
    lines += ["".join(f"{each[name]:>14}" for name in names) for each in seen[:: POINTS // 5]]
    return "\n".join(lines)


def work(asked: argparse.Namespace) -> int:
    """One rank."""
    from bitring.nodes import describe

    soak = Soak(asked.seed)
    machine = describe(soak.comm)
    phases = [
        soak.phase(f"{asked.small} small operations", asked.small, soak.small()),
        soak.phase(f"{asked.mixed} mixed operations", asked.mixed, soak.mixed()),
        soak.phase(f"{asked.stores} stores", asked.stores, soak.stores()),
    ]
    checks = soak.comm.gather(soak.checks)
    if soak.rank != 0:
        return 0
    complaints = [f"{phase['phase']}: {text}" for phase in phases for text in grown(phase["ranks"])]
    print("\n".join(table(phase) for phase in phases))
    print(f"{checks} results checked by the ranks; " + ("nothing grew" if not complaints else "; ".join(complaints)))
    if asked.json:
        kept = {"benchmark": "soak", "seed": asked.seed, "machine": machine, "checks": checks, "grown": complaints}
        text = json.dumps(kept, indent=1)[:-2] + ',\n "phases": ['
        for k, phase in enumerate(phases):
            text += ("," if k else "") + f'\n  {{"phase": "{phase["phase"]}", "seconds": {phase["seconds"]}, "ranks": ['
            text += ",".join(
                "\n   [" + ",\n    ".join(json.dumps(each) for each in seen) + "]" for seen in phase["ranks"]
            )
            text += "]}"
        asked.json.write_text(text + "\n ]\n}\n", encoding="utf-8")
    return 1 if complaints else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A soak.")
    parser.add_argument("--ranks", type=int, default=2, help="%(default)s")
    parser.add_argument("--small", type=int, default=1_000_000, help="small operations (%(default)s)")
    parser.add_argument("--mixed", type=int, default=100_000, help="mixed operations (%(default)s)")
    parser.add_argument("--stores", type=int, default=10_000, help="stores made and freed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mix (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep what was seen here")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        return work(asked)
    prefix, environment = launcher(asked.ranks)
    return subprocess.run(
        [*prefix, sys.executable, __file__, *sys.argv[1:], "--work"],
        env=os.environ | environment | _NO_MEMORY_EVENTS,
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
