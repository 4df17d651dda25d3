"""mpi4py's own test modules with a bitring.Communicator as their communicator, for test_mpi4py_conformance.py.

python mpi4py_conformance.py FOLDER --algorithms NAME ... [--quick]

FOLDER is test/ of mpi4py's source distribution. ``--quick`` leaves out what bitring does not answer itself, all
arrays but NumPy's, and most dtypes. Exit status 0 when every test passed on every rank.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import types
import unittest
from pathlib import Path
from typing import Any

from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.context import context_of

MODULES = ["test_cco_buf", "test_cco_nb_buf", "test_cco_pr_buf"]

OURS = {"testAllreduce", "testReduce", "testBcast", "testAllgather", "testReduceScatterBlock"}
"""The calls that bitring answers; of the others mpi4py answers all, and of these some."""


def with_communicators(module: types.ModuleType, world: Communicator, own: Communicator) -> unittest.TestSuite:
    """The module's tests, with ``world`` and ``own`` for MPI.COMM_WORLD and MPI.COMM_SELF wherever they name them."""
    names = {**vars(MPI), "COMM_WORLD": world, "COMM_SELF": own}
    vars(module)["MPI"] = types.SimpleNamespace(**names)  # setUp duplicates what it finds there
    for case in vars(module).values():
        if isinstance(case, type) and issubclass(case, unittest.TestCase) and "COMM" in vars(case):
            setattr(case, "COMM", world if "World" in case.__name__ else own)  # noqa: B010
    return unittest.defaultTestLoader.loadTestsFromModule(module)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--algorithms", nargs="+", required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()

    sys.path.insert(0, str(options.folder))
    # As mpi4py's own runner does: no device arrays. Its fake ones over host memory stay in.
    sys.modules["cupy"] = sys.modules["numba"] = None  # type: ignore[assignment]
    keep_dlpack_alive()
    if options.quick:
        arrays: Any = importlib.import_module("arrayimpl")
        arrays.ArrayBackends[:] = [backend for backend in arrays.ArrayBackends if backend.backend == "numpy"]
        arrays.ArrayBackends[0].TypeMap = {code: arrays.ArrayBackends[0].TypeMap[code] for code in "?bifD"}
    wrong = False
    for algorithm in options.algorithms:
        wrong |= run(algorithm, options.quick)
    return int(wrong)


def run(algorithm: str, quick: bool) -> bool:
    """Run the tests with ``algorithm`` and print the result on rank 0. Whether anything is wrong, on any rank."""
    world, own = (Communicator(comm.Dup(), algorithm=algorithm) for comm in (MPI.COMM_WORLD, MPI.COMM_SELF))
    suite = unittest.TestSuite()
    for name in MODULES:
        module = importlib.reload(importlib.import_module(name))
        for test in flattened(with_communicators(module, world, own)):
            if not quick or (test.id().rpartition(".")[2] in OURS and "Dup" not in test.id()):
                suite.addTest(test)
    result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    ran = result.testsRun - len(result.skipped)
    broken = [f"{test.id()}\n{text}" for test, text in (*result.failures, *result.errors)]
    everyone = MPI.COMM_WORLD.allgather(broken)
    calls = context_of(world).queue.count
    if MPI.COMM_WORLD.Get_rank() == 0:
        for rank, texts in enumerate(everyone):
            for text in texts:
                print(f"rank {rank}: {text}")
        print(f"{algorithm}: ran {ran} tests, {calls} calls through bitring", flush=True)
    world.Free()
    own.Free()
    return any(everyone) or ran == 0 or calls == 0


def keep_dlpack_alive() -> None:
    """mpi4py's fake DLPack producer frees a tensor with its capsule; NumPy may use it until it calls the deleter."""
    module: Any = importlib.import_module("dlpackimpl")
    make, kept = module.make_dl_managed_tensor, []

    def make_and_keep(*args: Any) -> Any:
        kept.append(make(*args))
        return kept[-1]

    module.make_dl_managed_tensor = make_and_keep


def flattened(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    found: list[unittest.TestCase] = []
    for part in suite:
        found.extend(flattened(part) if isinstance(part, unittest.TestSuite) else [part])
    return found


if __name__ == "__main__":
    sys.exit(main())
