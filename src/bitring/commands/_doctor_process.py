"""The checks of ``bitring doctor`` that each rank makes by itself: its limits, memory, caches and packages."""

from __future__ import annotations

import functools
import importlib.util
import os
import resource
from collections.abc import Callable
from pathlib import Path

from bitring.commands._findings import FAIL, NOTE, OK, Finding
from bitring.machine import package_version
from bitring.native import extension, native

_SHM_NBYTES = 256 << 20
"""Below this a container's default of 64 MiB is likely."""

_OPEN_FILES = 1024


def native_engine() -> Finding:
    """Whether the extension is there and used."""
    what = "native engine"
    if native() is not None:
        return Finding(what, OK, f"reduces with {extension.instruction_set()} instructions")
    if os.environ.get("BITRING_NATIVE") == "0":
        return Finding(what, NOTE, "left out, as BITRING_NATIVE=0 says", "unset it: Python moves every message now")
    return Finding(what, NOTE, "not built", "install bitring with a C++ compiler: Python moves every message now")


def shared_memory() -> Finding:
    """The size of /dev/shm, and what is free there."""
    what = "/dev/shm"
    try:
        found = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding(what, NOTE, str(error), "MPI libraries exchange through it inside a node: mount a tmpfs there")
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    if size < _SHM_NBYTES:
        return Finding(
            what,
            NOTE,
            f"{_nbytes(size)}, too small for large buffers",
            "in a container: docker run --shm-size=1g or --ipc=host",
        )
    if free < _SHM_NBYTES:
        return Finding(
            what,
            FAIL,
            f"less than {_nbytes(_SHM_NBYTES)} of {_nbytes(size)} are free",
            "remove what jobs that were killed have left there, such as mpich_shm_*",
        )
    return Finding(what, OK, f"{_nbytes(size)}, at least {_nbytes(_floor(free))} free")


def open_files() -> Finding:
    """The limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = _limit(soft, "")
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        return Finding("open files", NOTE, text, f"each connection takes one or more: ulimit -n {_limit(hard, '')}")
    return Finding("open files", OK, text)


def locked_memory() -> Finding:
    """The limit of locked memory, where there is InfiniBand."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = _limit(soft, _nbytes(soft))
    if soft != resource.RLIM_INFINITY and any(Path("/sys/class/infiniband").glob("*")):
        return Finding(
            "locked memory", NOTE, text, "InfiniBand wants it unlimited: memlock in limits.conf, or the batch system"
        )
    return Finding("locked memory", OK, text)


def kernel_cache() -> Finding:
    """Whether compiled kernels can be kept, and who else can write there."""
    from bitring.compression.kernels import onebit_numba
    from bitring.kernel_cache import KernelCache, open_to

    what = "kernel cache"
    advice = "every process compiles for itself, some seconds: point NUMBA_CACHE_DIR to a folder that can be written"
    try:
        folder = Path(KernelCache(onebit_numba.encode).cache_path)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"doctor.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (RuntimeError, OSError) as error:
        return Finding(what, NOTE, f"cannot be written: {error}", advice)
    others = open_to(folder)
    if others is not None:
        return Finding(
            what,
            NOTE,
            f"{folder}: open to {others}",
            "its files are executed: point NUMBA_CACHE_DIR to a folder of your own, made by mkdir -m 700",
        )
    return Finding(what, OK, f"{folder}")


def packages() -> list[Callable[[], Finding]]:
    """A check for each package that some part of bitring wants."""
    packages = {
        "cupy": ("cupy", "gpu", "device buffers"),
        "scikit-learn": ("sklearn", "demo", "the data set digits"),
        "matplotlib": ("matplotlib", "demo", "pictures"),
        "rich": ("rich", "demo", "the progress bar"),
    }
    return [functools.partial(_package, name, *rest) for name, rest in packages.items()]


def _package(name: str, module: str, extra: str, use: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(name, OK, f"not installed; {use} would want it: pip install 'bitring[{extra}]'")
    return Finding(name, OK, package_version(name) or "installed")


def _nbytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.4g} {unit}"
        number /= 1024
    raise AssertionError


def _floor(nbytes: int) -> int:
    """Down to a power of two: ranks of a node see it change while they look."""
    return 1 << (max(nbytes, 1).bit_length() - 1)


def _limit(value: int, text: str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else text or str(value)
