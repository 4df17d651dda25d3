"""Whether device buffers go to MPI directly: the library is asked, the environment has the last word."""

from __future__ import annotations

import logging

import pytest
from mpi4py import MPI

from bitring.collectives.interop import cuda_aware

pytestmark = pytest.mark.single


@pytest.fixture(autouse=True)
def _forget():
    cuda_aware.cuda_aware.cache_clear()
    yield
    cuda_aware.cuda_aware.cache_clear()


def test_the_loaded_library_is_found():
    path = cuda_aware.library_path()
    assert path is not None
    assert "libmpi" in path
    assert MPI.Is_initialized()


@pytest.mark.parametrize("setting", ["0", "1"])
def test_the_environment_decides_and_is_read_once(monkeypatch, caplog, setting: str):
    monkeypatch.setenv("BITRING_CUDA_AWARE", setting)
    with caplog.at_level(logging.INFO, logger="bitring"):
        assert cuda_aware.cuda_aware() is (setting == "1")
        assert cuda_aware.cuda_aware() is (setting == "1")
    how = "handed to MPI directly" if setting == "1" else "staged through pinned memory"
    assert [record.getMessage() for record in caplog.records] == [
        f"device buffers are {how}, as BITRING_CUDA_AWARE says"
    ]


@pytest.mark.parametrize("setting", [None, ""])
def test_otherwise_the_library_is_asked(monkeypatch, setting):
    monkeypatch.delenv("BITRING_CUDA_AWARE", raising=False)
    if setting is not None:
        monkeypatch.setenv("BITRING_CUDA_AWARE", setting)
    assert cuda_aware.cuda_aware() is cuda_aware._asked()
    monkeypatch.setattr(cuda_aware, "library_path", lambda: None)
    assert cuda_aware._asked() is False


def test_anything_else_is_refused(monkeypatch):
    monkeypatch.setenv("BITRING_CUDA_AWARE", "yes")
    with pytest.raises(ValueError, match="BITRING_CUDA_AWARE must be 0 or 1; got 'yes'"):
        cuda_aware.cuda_aware()
