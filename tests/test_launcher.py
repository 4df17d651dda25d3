"""Processes that were started together and do not know each other: told what is wrong and what to type."""

from __future__ import annotations

import pytest

from bitring import launcher
from bitring.launcher import alone_by_mistake, launched_size

pytestmark = pytest.mark.single

# What Slurm sets: for a job's script, for an interactive shell, for two tasks of srun.
SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_JOB_NUM_NODES": "2"}
SHELL = SCRIPT | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"}
TASK = SCRIPT | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    for name in (*launcher.RANK_VARIABLES, *launcher.SIZE_VARIABLES, "BITRING_ALONE"):
        monkeypatch.delenv(name, raising=False)

    def started(variables: dict[str, str], size: int = 1, library: str = "MPICH 5.0.2") -> str | None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return alone_by_mistake(size, library)

    return started


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SCRIPT,
        SHELL,
        {"SLURM_STEP_NUM_TASKS": "2"},
        TASK | {"PMI_SIZE": "1", "PMI_RANK": "0"},
        TASK | {"BITRING_ALONE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_process_that_is_rightly_alone_is_left_alone(started, variables: dict[str, str]):
    assert started(variables) is None


def test_ranks_that_know_each_other_are_well(started):
    assert started(TASK, size=2) is None
    assert started({"OMPI_COMM_WORLD_SIZE": "3"}, size=3) is None


@pytest.mark.parametrize(("library", "way"), [("MPICH 5.0.2", "pmi2"), ("Open MPI 5.0.11", "pmix")])
def test_srun_that_offers_nothing(started, library: str, way: str):
    said = started(TASK, library=library)
    assert launched_size() == 2
    assert said.startswith(
        "2 processes were started, and each takes itself for the only one; "
        f"srun offered nothing that {library} knows: type srun --mpi={way}, or start them by "
    )
    assert said.endswith("Where each is meant to be alone, set BITRING_ALONE=1")


@pytest.mark.parametrize("variables", [{"OMPI_COMM_WORLD_SIZE": "4"}, {"PMI_SIZE": "4"}, TASK | {"PMI_SIZE": "4"}])
def test_another_library_s_mpirun(started, variables: dict[str, str]):
    assert started(variables).startswith(
        "4 processes were started, and each takes itself for the only one; "
        "the launcher belongs to another MPI library than MPICH 5.0.2: start them by "
    )


STEP = "import numpy as np, bitring; bitring.allreduce(np.ones(3)); bitring.allreduce(np.ones(3))"


def test_one_of_them_warns_and_train_refuses(on_ranks, tmp_path):
    first = on_ranks(1, "-c", STEP, env=TASK | {"SLURM_PROCID": "0"})
    assert first.returncode == 0
    assert first.stderr.count("2 processes were started, and each takes itself for the only one") == 1
    assert on_ranks(1, "-c", STEP, env=TASK).stderr == ""
    training = ("-m", "bitring", "train", "--model", "softmax", "--epochs", 1, "--output", tmp_path / "run")
    refused = on_ranks(1, *training, env=TASK | {"SLURM_PROCID": "0"})
    assert refused.returncode == 1
    assert "Error: 2 processes were started" in refused.stderr
    assert not (tmp_path / "run").exists()
    meant = on_ranks(1, *training, env=TASK | {"BITRING_ALONE": "1"})
    assert (meant.returncode, meant.stderr) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()
