"""What saving a checkpoint costs: its seconds on two ranks, phase by phase, and their share of 30 s of training.

    python benchmarks/checkpoints.py --json FILE

Two trainings whose file has 256 MiB: exact, where ranks keep the same and rank 0's arrays are written, and onebit,
where each rank has a residual of its own. Rank 0's seconds are divided by what it does: ``digest``, by which equal
arrays are found; ``crc`` and ``write`` into the file; ``sync``, waiting for the disk; ``place``, putting the file in
the place of the old one; ``exchange`` is the rest, waiting for the other rank included. On a machine that is busy with
other things CPU seconds tell more than seconds; ``load`` says whether it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 30.0
"""Of training, in which one checkpoint is saved."""

MOST = 0.05
"""The share of it that saving may take."""

ARRAYS = 8


class Phases:
    """The seconds of some functions, each without what it spends in another of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def time(self, owner: Any, name: str, phase: str) -> None:
        """From now on ``owner.name`` counts to ``phase``."""
        does: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            self._inner.append(0.0)
            try:
                return does(*arguments, **named)
            finally:
                seconds = time.perf_counter() - begin
                self.seconds[phase] += seconds - self._inner.pop()
                if self._inner:
                    self._inner[-1] += seconds

        setattr(owner, name, timed)


def measure(compression: str | None, nbytes: int, repeats: int, folder: Path) -> dict[str, Any]:
    """This rank's saves of a trainer whose file has about ``nbytes`` bytes, without the first, of new memory."""
    import zipfile

    import numpy as np
    from mpi4py import MPI

    import bitring
    from bitring.training.checkpoints import file, saving

    comm = MPI.COMM_WORLD
    copies = 2 if compression is None else 3 + comm.size  # parameters, velocity; the owners' residuals, and each rank's
    n = nbytes // 4 // copies // ARRAYS
    rng = np.random.default_rng(0)
    parameters = [rng.standard_normal(n, dtype=np.float32) for _ in range(ARRAYS)]
    trainer = bitring.DataParallel(
        parameters, bitring.SGD(lr=0.01, momentum=0.9), comm=comm, compression=compression, warmup_steps=0
    )
    rng = np.random.default_rng(comm.rank)
    trainer.step([rng.standard_normal(n, dtype=np.float32) for _ in range(ARRAYS)])

    phases = Phases()
    phases.time(saving, "_digest", "digest")
    phases.time(zipfile, "crc32", "crc")
    phases.time(file.CheckpointWriter, "write", "write")
    phases.time(file.CheckpointWriter, "_await_sync", "sync")
    phases.time(file.CheckpointWriter, "finish", "sync")  # the last bytes' way to the disk
    phases.time(file, "_put_in_place", "place")
    saves: list[dict[str, Any]] = []
    for _ in range(repeats + 1):
        phases.seconds.clear()
        comm.Barrier()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        bitring.save_checkpoint(folder / "run.npz", trainer)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        parts = {**phases.seconds, "exchange": seconds - sum(phases.seconds.values())}
        saves.append({"seconds": seconds, "cpu_seconds": cpu, "phases": parts, "load": os.getloadavg()[0]})
    trainer.free()
    return {"nbytes": (folder / "run.npz").stat().st_size, "saves": saves[1:]}


def report(case: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Print what all ranks measured; the median save, and the quickest one's share of the interval."""
    saves = ranks[0]["saves"]
    order = sorted(range(len(saves)), key=lambda i: saves[i]["seconds"])
    quickest, median = saves[order[0]], saves[order[len(order) // 2]]
    cpu = sum(rank["saves"][order[0]]["cpu_seconds"] for rank in ranks)
    print(f"{case}: {ranks[0]['nbytes'] / 2**20:.0f} MiB, {len(saves)} saves, load {quickest['load']:.1f}")
    print(f"  median {median['seconds']:.2f} s, quickest {quickest['seconds']:.2f} s, {cpu:.2f} s of CPU on all ranks")
    print("  " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in quickest["phases"].items()))
    share = quickest["seconds"] / INTERVAL_SECONDS
    print(f"  {share:.1%} of {INTERVAL_SECONDS:.0f} s, median {median['seconds'] / INTERVAL_SECONDS:.1%}")
    return {"case": case, "share": share, "ranks": ranks}


def main() -> int:
    """Measure on two ranks, print, and fail where the quickest save takes more than its share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the file")
    parser.add_argument("--repeats", type=int, default=5, help="saves that are measured")
    parser.add_argument("--folder", type=Path, help="where to save: the disk that is measured")
    parser.add_argument("--json", type=Path, help="keep the results there")
    options = parser.parse_args()
    if "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
        from mpi4py import MPI

        found = {}
        for compression in (None, "onebit"):
            mine = measure(compression, options.mib << 20, options.repeats, options.folder)
            found[compression or "exact"] = MPI.COMM_WORLD.allgather(mine)
        if MPI.COMM_WORLD.rank == 0:
            results = [report(case, ranks) for case, ranks in found.items()]
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            return int(any(result["share"] > MOST for result in results))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [Path(sys.executable).with_name("mpirun"), "-n", "2", sys.executable, *sys.argv, "--folder", folder]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
