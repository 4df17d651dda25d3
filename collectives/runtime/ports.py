"""This process's two ports, by which ranks tell each other what happens when a collective does not go on.

None of it goes through the MPI library, which may crash when it sends to a process that has died (MPICH does). Words
come to the first port, by UDP; whoever waits in a job reads them, and words to a rank that sleeps wait there. To the
second others connect, and nobody has to take the connection for it to stand: the process's host closes it when the
process dies, and not while it is merely slow. So nothing that is said or watched can block, or harm who does it.

Before anything is sent through the library, what has come here must have been read: a job that goes on reads first, and
whoever is to send in the middle of one looks whether there is anything ``unread``, and waits for that (``read_news``).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import resource
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from bitring.collectives.interop.steps import Steps
from bitring.collectives.runtime.card import Card, Process, addresses, host
from bitring.native import extension, native

if TYPE_CHECKING:
    from bitring.collectives.runtime.contact import Contact

NAME_NBYTES = 16
"""Words begin with the communicator's name."""

_HIGH_NUMBER = 1000
"""Of a file: the kernel closes a dying process's in descending order."""

_LATELY_SECONDS = 1e-4

_FAREWELL = b"L"

at_death: list[Callable[[], object]] = []
"""What is called as soon as a process is found to have died."""


class Ports:
    """This process's two ports, and its connections to others'."""

    def __init__(self) -> None:
        self.contacts: dict[bytes, Contact] = {}
        self.dead: set[Process] = set()  # as ``bury`` has been told
        self.left: set[Process] = set()  # in good order; what they had to do before may be done
        self.places: dict[Process, int] = {}  # ranks in MPI.COMM_WORLD
        self._early: deque[tuple[bytes, str]] = deque(maxlen=1024)  # for communicators not made yet
        self._watched: dict[int, tuple[socket.socket, Process]] = {}  # by file number
        self._connected: set[Process] = set()
        self._reading = threading.Lock()
        self._read_at = 0.0
        self._words = self._door = self._events = None
        with contextlib.suppress(OSError):  # nobody can be reached, then
            self._words, self._door = _port(socket.SOCK_DGRAM), _closed_early(_port(socket.SOCK_STREAM))
            self._door.listen(4096)
            self._events = select.epoll()
            self._events.register(self._words.fileno(), select.EPOLLIN)
            _look_at(self._events.fileno())

    def card(self) -> Card:
        """This process's."""
        if self._words is None or self._door is None:
            return Card(bytes(16), secrets.token_bytes(16), 0, 0, ())
        words, door = self._words.getsockname()[1], self._door.getsockname()[1]
        return Card(host(), secrets.token_bytes(16), words, door, addresses())

    def register(self, contact: Contact) -> None:
        """Give the contact what was said before it was there, and what comes from now on."""
        self.contacts[contact.name] = contact
        early, self._early = list(self._early), deque(maxlen=self._early.maxlen)
        for data, address in early:
            self._take(data, address)

    def say(self, data: bytes, to: Iterable[tuple[str, int]]) -> None:
        """Send words; what cannot be sent is lost."""
        if self._words is not None:
            for address in to:
                with contextlib.suppress(OSError):
                    self._words.sendto(data, address)

    def watch(self, process: Process, address: str) -> None:
        """Watch another process: hear of its end from now on."""
        if self._events is None or process in self._connected:
            return
        with contextlib.suppress(OSError):
            line = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            line.setblocking(False)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # whatever is between must not forget it
            line.connect_ex((address, process[2]))
            self._watched[line.fileno()] = line, process
            self._connected.add(process)
            self._events.register(line.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def unread(self) -> bool:
        """Whether something has come that is to be read."""
        if native() is not None:  # which keeps the interpreter's lock: it may take long to get it back
            return extension.unread_news()
        return self._events is not None and bool(self._events.poll(0, 1))

    def read_lately(self) -> None:
        """Take what has come, unless that was done just now: jobs ask many times per millisecond."""
        now = time.monotonic()
        if now - self._read_at > _LATELY_SECONDS:
            self._read_at = now
            self.read()

    def read(self) -> None:
        """Read all words that have come."""
        if self._events is None or self._words is None or not self.unread():
            return
        with self._reading:
            for number, _ in self._events.poll(0):
                if number in self._watched:
                    self._hear_the_end(number)
                    continue
                with contextlib.suppress(OSError):  # there is no more
                    while True:
                        data, (address, _) = self._words.recvfrom(2048)
                        self._take(data, address)

    def gone(self, places: Sequence[int], left: bool) -> list[int]:
        """Positions in ``places``, ranks of MPI.COMM_WORLD, of the processes that are dead.

        ``left``: also of those that have left the job.
        """
        processes = self.dead | self.left if left else self.dead
        gone = {self.places[process] for process in processes if process in self.places}
        return [rank for rank, place in enumerate(places) if place in gone] if gone else []

    def bury(self, process: Process) -> None:
        """Note that a process takes part in nothing any more: no thread sends before it has seen who is dead."""
        if process in self.dead:
            return
        self.dead.add(process)
        for call in at_death:
            call()
        if native() is not None:
            extension.tell_death()

    def _hear_the_end(self, number: int) -> None:
        line, process = self._watched[number]
        try:
            if line.recv(1) == _FAREWELL:
                self.left.add(process)
            else:
                self.bury(process)
        except BlockingIOError:
            return
        except ConnectionResetError:
            self.bury(process)
        except OSError:  # it could not be reached, which says nothing of the process
            self._connected.discard(process)
        del self._watched[number]
        line.close()

    def _take(self, data: bytes, address: str) -> None:
        contact = self.contacts.get(data[:NAME_NBYTES])
        if contact is None:
            self._early.append((data, address))
        else:
            contact.hear(data, address)

    def leave(self) -> None:
        """Let the others know that this process takes part in nothing any more."""
        if self._door is not None:
            with contextlib.suppress(OSError):
                while True:
                    line, _ = self._door.accept()
                    line.send(_FAREWELL)
                    line.close()
        self.close()

    def close(self) -> None:
        """Keep nothing open."""
        for line, _ in self._watched.values():
            line.close()
        _look_at(-1)
        for each in (self._words, self._door, self._events):
            if each is not None:
                each.close()
        self._watched.clear()
        self._words = self._door = self._events = None


def _port(kind: socket.SocketKind) -> socket.socket:
    port = socket.socket(socket.AF_INET, kind)
    port.setblocking(False)
    port.bind(("", 0))
    return port


def _closed_early(port: socket.socket) -> socket.socket:
    """The port as a file that the kernel closes early when the process dies: before the MPI library's connections.

    So nobody sees those closed who could not know of the death.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):  # there is no such number
        again = socket.socket(fileno=fcntl.fcntl(port, fcntl.F_DUPFD_CLOEXEC, min(_HIGH_NUMBER, limit - 16)))
        again.setblocking(False)
        port.close()
        return again
    return port


def _look_at(descriptor: int) -> None:
    """Let native operations look whether there is anything unread."""
    if native() is not None:
        extension.news_comes_to(descriptor)


def heed_deaths() -> None:
    """Say that this thread looks who is dead before it sends anything."""
    if native() is not None:
        extension.heed_deaths()


def read_news() -> Steps:
    """Steps of a job that end when what has come is read: whoever drives it reads, and ends it where it must not go on.

    To be taken before anything is sent in the middle of a step.
    """
    while ports().unread():
        yield


@functools.cache
def ports() -> Ports:
    """This process's, made when first asked for."""
    made = Ports()
    os.register_at_fork(after_in_child=made.close)  # a child that outlives its parent must not pass for it
    return made


def leave() -> None:
    """Let the others know that this process takes part in nothing any more."""
    if ports.cache_info().currsize:
        ports().leave()
