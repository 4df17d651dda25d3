"""mpi4py's own test modules with a bitring.Communicator as their communicator, for test_mpi4py_conformance.py.

python mpi4py_conformance.py FOLDER --algorithm NAME [--only SUBSTRING] MODULE ...

FOLDER is test/ of mpi4py's source distribution. Exit status 0 when every test passed on every rank.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
import unittest
from pathlib import Path
from typing import Any

from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.state import state_of


def with_communicators(module: types.ModuleType, world: Communicator, own: Communicator) -> unittest.TestSuite:
    """The module's tests, with ``world`` and ``own`` for MPI.COMM_WORLD and MPI.COMM_SELF wherever they name them."""
    names = {**vars(MPI), "COMM_WORLD": world, "COMM_SELF": own}
    vars(module)["MPI"] = types.SimpleNamespace(**names)  # setUp duplicates what it finds there
    for case in vars(module).values():
        if isinstance(case, type) and issubclass(case, unittest.TestCase) and "COMM" in vars(case):
            case.COMM = world if case.COMM == MPI.COMM_WORLD else own
    return unittest.defaultTestLoader.loadTestsFromModule(module)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--algorithm", required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()

    sys.path.insert(0, str(options.folder))
    # As mpi4py's own runner does: no device arrays. Its fake ones over host memory stay in.
    sys.modules["cupy"] = sys.modules["numba"] = None  # type: ignore[assignment]
    keep_dlpack_alive()
    world = Communicator(MPI.COMM_WORLD, algorithm=options.algorithm)
    own = Communicator(MPI.COMM_SELF, algorithm=options.algorithm)
    suite = unittest.TestSuite()
    for name in options.modules:
        for test in flattened(with_communicators(importlib.import_module(name), world, own)):
            if options.only in test.id():
                suite.addTest(test)

    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=0).run(suite)
    ran, skipped = result.testsRun, len(result.skipped)
    broken = [f"{test.id()}\n{text}" for test, text in (*result.failures, *result.errors)]
    everyone = MPI.COMM_WORLD.allgather(broken)
    calls = state_of(world).lane.count
    if MPI.COMM_WORLD.Get_rank() == 0:
        for rank, texts in enumerate(everyone):
            print(*(f"rank {rank}: {text}" for text in texts), sep="\n")
        print(f"ran {ran}, skipped {skipped}, calls through bitring on the world communicator {calls}")
    return 1 if any(everyone) or ran == skipped or calls == 0 else 0


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
