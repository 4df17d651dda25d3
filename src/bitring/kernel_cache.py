"""Machine code on disk: Numba's cache, made so that nothing in it can harm the run that reads it.

What Numba keeps is pickled, and what it finds it believes: a file that a full disk or a dying node has cut short fails
every run from then on, one with a hole crashes it, and two processes that compile at once may each end up with the
other's code. Here each file carries a digest, and the key that it is for. What cannot be read, is damaged or is
another's is compiled again and replaced, and the log says so.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import hashlib
import logging
import os
import pickle
import pwd
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile

from bitring.launcher import launched_rank

logger = logging.getLogger("bitring.kernels")


def with_cache(made: Any, function: Callable[..., Any], *, parts: str = "") -> Any:
    """``made``, Numba's dispatcher or C function of ``function``, with a cache where a folder for it can be written.

    The folder is NUMBA_CACHE_DIR, else beside the source, else the user's cache folder. ``parts`` is a digest of what
    the function uses beyond its own file.
    """
    with contextlib.suppress(RuntimeError):  # Numba found no writable folder
        made._cache = KernelCache(function, parts)
    return made


def open_to(folder: Path) -> str | None:
    """Others who can put files into ``folder``, whose files this process executes; None when nobody can."""
    for place in (folder, *folder.parents):
        with contextlib.suppress(FileNotFoundError):
            found = place.stat()
            if found.st_uid not in (0, os.geteuid()):
                return f"user {_user(found.st_uid)}, who owns {place}"
            # In a folder like /tmp nobody replaces what is another's; but anybody adds to it.
            if place != folder and found.st_mode & stat.S_ISVTX:
                continue
            if found.st_mode & stat.S_IWOTH:
                return f"every user, who can write to {place}"
            if found.st_mode & stat.S_IWGRP and not _private(found.st_gid):
                return f"group {_group(found.st_gid)}, which can write to {place}"
    return None


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _private(group: int) -> bool:
    """Whether a group is root's, or the one that many systems give each user, with nobody else in it."""
    return group == 0 or (group == os.getegid() and _group(group) == _user(os.geteuid()))


class KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function. A disk that is full, or was taken away, loses what would have been saved."""

    def __init__(self, function: Callable[..., Any], parts: str = "") -> None:
        super().__init__(function)
        self._parts = parts
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), self._parts)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for ``sig``, or None: then Numba compiles it, and has it saved."""
        code = None
        try:
            code = super().load_overload(sig, target_context)
        except Exception as error:  # it was made for another installation, which may show in any way
            _tell_damage(self._cache_path, error)
        if code is None:
            _tell_compiling()
        return code

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save what was compiled, if that can be done."""
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """Numba's index and data files, named as no others, so that those that Numba wrote itself are left alone."""

    def __init__(self, folder: str, name: str, source_stamp: Any) -> None:
        super().__init__(folder, f"{name}.sealed", source_stamp)

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (repr(key), data))

    def load(self, key: Any) -> Any:
        found = super().load(key)
        # Two processes that compile different kernels at once may number their files alike.
        return found[1] if found is not None and found[0] == repr(key) else None

    def _load_index(self) -> Any:
        try:
            sealed: Any = super()._load_index()
            return _opened(sealed) if sealed else {}
        except Exception as error:  # a damaged pickle may raise anything
            _tell_damage(self._index_path, error)
            return {}

    def _save_index(self, overloads: Any) -> None:
        super()._save_index(self._sealed(overloads))

    def _load_data(self, name: str) -> Any:
        try:
            return _opened(super()._load_data(name))
        except FileNotFoundError:  # cleaned away
            raise
        except Exception as error:
            _tell_damage(self._data_path(name), error)
            raise OSError(f"{name}: {error}") from error  # by which Numba knows that there is nothing to load

    def _save_data(self, name: str, data: Any) -> None:
        super()._save_data(name, self._sealed(data))

    def _sealed(self, what: Any) -> tuple[bytes, bytes]:
        dumped = self._dump(what)
        return hashlib.sha256(dumped).digest(), dumped


def _opened(sealed: tuple[bytes, bytes]) -> Any:
    digest, dumped = sealed
    if hashlib.sha256(dumped).digest() != digest:
        raise ValueError("its digest is another's")
    return pickle.loads(dumped)


@functools.cache
def _tell_compiling() -> None:
    logger.info("compiling kernels: up to a minute, once for each machine; the next run loads them")


_damage_told: list[str] = []


def _tell_damage(path: str, error: Exception) -> None:
    """Once in a run: the other ranks meet the same files."""
    level = logging.DEBUG if _damage_told or launched_rank() else logging.WARNING
    _damage_told.append(path)
    reason = f"{type(error).__name__}: {error}"
    logger.log(level, "kernels in Numba's cache are damaged: compiling again, and replacing %s (%s)", path, reason)
