"""Watching for the dead and the silent: what a job waits for, and when that wait is in vain."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from mpi4py import MPI

from bitring.collectives.runtime.death import died
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.ports import ports
from bitring.errors import DeadRankError, MismatchError, PeerError
from bitring.waited import AWAY_SECONDS, Waited

if TYPE_CHECKING:
    from bitring.collectives.runtime.job import Job

logger = logging.getLogger("bitring")

SILENCE_SECONDS = 60.0
"""A wait without any progress for so long is worth one warning."""

ADVICE = "all ranks can go on with a new one (comm.Dup()), or begin again from the last checkpoint"

_LOOK_SECONDS = 0.25
"""A wait of this length is worth a look whether the ranks of this node are still there."""

_NEWS_SECONDS = 2.0
"""An error of the library may be that of a death of which word comes so much later: the dying are taken apart bit by
bit, and may have to wait for a processor meanwhile."""

_ANSWER_SECONDS = 2.0
"""So long before it warns, a rank asks the others where they are; it does not warn before they could answer."""


@functools.cache
def timeout() -> float:
    """Seconds without progress after which a wait is an error; infinite unless BITRING_TIMEOUT is set."""
    text = os.environ.get("BITRING_TIMEOUT", "")
    try:
        seconds = float(text) if text else float("inf")
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # NaN is not, either
        raise ValueError(f"BITRING_TIMEOUT must be a number of seconds above 0; got {text!r}")
    return seconds


class Watch:
    """Progress of one job when last looked at, and the warnings given of its wait.

    What this process misses while it is away (``AWAY_SECONDS``) moves all times that the wait is measured from.
    """

    __slots__ = ("_asked", "_found", "_inquire_at", "_look_at", "_looked_at", "_moves", "_seen_at", "_warned")

    def __init__(self) -> None:
        self._moves = -1
        self._seen_at = 0.0  # when they were first counted
        self._warned = 0.0  # when
        self._asked = 0.0  # when
        self._look_at = 0.0
        self._looked_at = 0.0
        self._inquire_at = 0.0
        self._found: set[int] = set()  # ranks that had left in good order, or failed, when it was last looked

    def has_moved(self, moves: int, now: float) -> bool:
        """Whether the job, which has made so many moves by ``now``, has moved since the last look."""
        away, self._looked_at = now - self._looked_at - AWAY_SECONDS, now
        if moves != self._moves:
            self._moves, self._seen_at = moves, now
            self._found.clear()
            return True
        if away > 0:
            self._seen_at += away
            self._asked += away
            self._warned += away if self._warned else 0.0
        return False

    def mind_silence(self, job: Job, now: float) -> None:
        """End a job that waits in vain, or warn of it when it has waited for long."""
        seconds = now - self._seen_at
        if seconds < _LOOK_SECONDS:
            return
        if now > self._look_at:
            self._look_at = now + _LOOK_SECONDS
            ports().read()
            if self.bereaved(job, seconds):
                return
            if now >= self._inquire_at:
                self._inquire_at = now + max(seconds, _LOOK_SECONDS)
                job.queue.inquire()
        most = max(timeout(), job.progress.patience)
        limit = most if self._warned else min(SILENCE_SECONDS, most)
        answer = min(_ANSWER_SECONDS, limit / 2)
        if seconds >= limit - answer and self._asked <= max(self._seen_at, self._warned):
            self._asked = now
            job.queue.ask(job)
        if seconds < limit or now - self._asked < answer:
            return
        ports().read()
        who = job.queue.missing(job.number)
        if not who and job.progress.peers:
            who = f"messages due from ranks {sorted(job.progress.peers)}"
        complaint = f"rank {job.queue.rank} has waited {seconds:.0f} s in {job.what}; "
        complaint += who or "some rank has not come to it"
        if not self._warned:
            self._warned = now
            logger.warning("%s", complaint)
        if seconds >= most:
            engine.bereaved = True
            job.queue.breaks(f"{job.what} timed out", job)
            if job.queue.contact is not None:
                job.queue.contact.tell_impatient()
            job.end(TimeoutError(f"{complaint} (BITRING_TIMEOUT={timeout():g})"))

    def bereaved(self, job: Job, seconds: float) -> bool:
        """End the job with an error when its wait, of ``seconds`` by now, is for ranks that are gone or have failed.

        Returns whether it is.
        """
        gone = job.queue.gone(job.progress.peers, seconds)
        if gone and not job.queue.gone((), 0.0) and not self._again(gone):
            gone = []
        if gone and job.progress.outlives is not None and job.progress.outlives(gone):
            job.queue.loses(gone, goes_on=True)
        elif gone and job is job.queue.last_word and not job.queue.gone((), 0.0):
            job.queue.breaks(job.what, job)
            job.end(None)  # they have left in good order, and need not hear it
        elif gone:
            job.end(_death(job, gone))
        elif difference := job.queue.difference():
            job.queue.breaks(difference, job)
            job.end(job.progress.mistake or MismatchError(f"{difference}; found in {job.what}"))
        elif job.queue.failed and (not seconds or self._again(job.queue.failed)):
            failed = f"rank {min(job.queue.failed)} has failed in it, or in what came before"
            job.queue.breaks(failed, job)
            job.end(PeerError(f"{job.what}: {failed}; {ADVICE}"))
        return job.done

    def _again(self, ranks: Collection[int]) -> bool:
        """Whether all of ``ranks``, who do nothing any more, were found before the job was last taken further.

        They may have done their parts in it since then; if so, it moves when it is taken further once more, as it is
        before the next look.
        """
        again = self._found.issuperset(ranks)
        self._found.update(ranks)
        if not again:
            self._look_at = 0.0
        return again


def as_death(job: Job, error: MPI.Exception) -> BaseException:
    """The library's error; a DeadRankError when a rank has died."""
    # The library may see that a process died before its lock is given back, or its port is closed.
    waited = Waited()
    while not (seen := job.queue.gone(job.progress.peers, float("inf"))) and waited.look() < _NEWS_SECONDS:
        time.sleep(0.01)
        ports().read()
    gone = seen or died(error, job.queue.comm)
    return error if gone is None else _death(job, gone)


def _death(job: Job, gone: Sequence[int]) -> DeadRankError:
    job.queue.loses(gone, job)
    return DeadRankError(f"{job.what}: {gone_in_words(gone)}", gone)


def gone_in_words(ranks: Sequence[int]) -> str:
    """Words that say that these ranks are gone, and what that may mean."""
    return f"{are(ranks)} gone: the process has ended or left the job"


def are(ranks: Sequence[int]) -> str:
    """The beginning of a sentence about them."""
    if not ranks:
        return "a rank is"
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {list(ranks)} are"
