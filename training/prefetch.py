"""Batches prepared ahead, in a thread: while one is computed the next are read and transformed."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from bitring.settings import Range, checked

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()
_LOOK_SECONDS = 0.1


def prefetch(
    batches: Iterable[Any], transform: Callable[..., Any] | None = None, depth: int = 2, seed: int | None = None
) -> Iterator[Any]:
    """Iterate over ``batches``, with up to ``depth`` of them prepared ahead by a thread; in their order.

    transform: called in that thread as ``transform(batch)``; its result takes the batch's place. seed: with it the call
    is ``transform(batch, random)``, with a list of one ``numpy.random.Generator`` per sample, made of the seed and the
    sample's number, counted through all batches from 0: a sample gets the same numbers however batches are cut. An
    exception of ``batches`` or ``transform`` is raised when its batch is asked for. The thread ends with the last
    batch, or when the iterator is closed or forgotten. Raises TypeError and ValueError for bad arguments.
    """
    depth = checked("prefetch", "depth", depth, int, Range(least=1))
    if seed is not None:
        seed = checked("prefetch", "seed", seed, int, Range(least=0))
        if transform is None:
            raise ValueError("prefetch: seed is for transform, which is None")
    if transform is not None and not callable(transform):
        raise TypeError(f"prefetch: transform must be callable; got {type(transform).__name__}")
    if not hasattr(batches, "__iter__"):
        raise TypeError(f"prefetch: batches must be an iterable; got {type(batches).__name__}")
    return Prefetched(batches, transform, depth, seed)


class Prefetched(Generic[T]):
    """See ``prefetch``. ``close`` ends it before its end."""

    def __init__(
        self, batches: Iterable[Any], transform: Callable[..., T] | None, depth: int, seed: int | None
    ) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(depth)
        stop = self._stop = threading.Event()
        # The thread holds no reference to this object: that it is forgotten ends the thread.
        arguments = batches, transform, seed, self._ready, stop
        self._thread = threading.Thread(target=_fill, args=arguments, name="bitring-prefetch", daemon=True)
        self._thread.start()
        weakref.finalize(self, stop.set)

    def __iter__(self) -> Prefetched[T]:
        return self

    def __next__(self) -> T:
        while True:
            if self._stop.is_set():
                raise StopIteration
            try:
                ready = self._ready.get(timeout=_LOOK_SECONDS)
                break
            except queue.Empty:
                continue
        if ready is _END:
            self.close()
            raise StopIteration
        if isinstance(ready, _Failure):
            self.close()
            raise ready.error
        return ready  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the thread; what is prepared is dropped."""
        self._stop.set()


def _fill(
    batches: Iterable[Any],
    transform: Callable[..., Any] | None,
    seed: int | None,
    ready: queue.Queue[Any],
    stop: threading.Event,
) -> None:
    """Prepare batches until there are no more, or nobody wants them."""

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    samples = 0
    try:
        for batch in batches:
            prepared = batch
            if transform is not None and seed is not None:
                numbers = range(samples, samples + len(batch[0] if isinstance(batch, tuple) else batch))
                prepared = transform(batch, [np.random.default_rng([seed, number]) for number in numbers])
                samples = numbers.stop
            elif transform is not None:
                prepared = transform(batch)
            if not put(prepared):
                return
        put(_END)
    except BaseException as error:
        put(_Failure(error))
