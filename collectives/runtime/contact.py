"""What ranks tell each other when a collective does not go on, and how a death is noticed on another host.

None of it goes through the MPI library, which may crash when it sends to a process that has died (MPICH does). Every
process has two ports. Words come to the first, by UDP; whoever waits in a job reads them, and words to a rank that
sleeps wait there. To the second others connect, and nobody has to take the connection for it to stand: the process's
host closes it when the process dies, and not while it is merely slow. So nothing that is said or watched can block, or
harm the one who does it.

Before anything is sent through the library, what has come here must have been read: a job that goes on reads first, and
whoever is to send in the middle of one looks whether there is anything ``unread``, and waits for that (``read_news``).

Where this does not get through, nobody is taken for dead or silent: only what has been heard counts.
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
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bitring.collectives.interop.steps import Steps
from bitring.native import native

HELLO = 0
"""Nothing but that its sender can be heard."""
ASKS = 1
"""Its sender waits in the job named, and wants to know where the others are."""
WAITS = 2
"""The answer: its sender waits in the job named; number 0 when that is another communicator's."""
FAILED = 3
"""Its sender has given up in the middle of a job."""
GONE = 4
"""The rank numbered has died, or left when it was waited for."""
QUITS = 5
"""Its sender leaves in good order, with jobs undone."""

_HEAD = struct.Struct("!16sBii")  # the communicator's name, the kind, the sender, a number; then a text
_CARD = struct.Struct("!16s16sHHB24s")  # see Card
CARD_NBYTES = _CARD.size
_ADDRESSES = 6
_TEXT_NBYTES = 200

_HIGH_NUMBER = 1000
"""Of a file: the kernel closes a dying process's in descending order."""

_LATELY_SECONDS = 1e-4

_SIOCGIFADDR = 0x8915
_FAREWELL = b"L"


class Word(NamedTuple):
    """What a rank says."""

    kind: int
    sender: int
    number: int
    text: str


Process = tuple[bytes, int, int]
"""A process, for the others: its host and its ports."""


class Card(NamedTuple):
    """Where a process can be reached; ports are 0 where it cannot be. ``door`` is the one to connect to.

    ``host`` is equal for processes that share loopback addresses. ``secret``: rank 0's names the communicator.
    """

    host: bytes
    secret: bytes
    words: int
    door: int
    addresses: tuple[str, ...]

    def pack(self) -> bytes:
        """As bytes, CARD_NBYTES of them."""
        packed = b"".join(map(socket.inet_aton, self.addresses))
        return _CARD.pack(self.host, self.secret, self.words, self.door, len(self.addresses), packed)

    @staticmethod
    def unpack(data: bytes) -> Card:
        """The card that was packed."""
        host, secret, words, door, count, packed = _CARD.unpack(data)
        addresses = tuple(socket.inet_ntoa(packed[4 * k : 4 * k + 4]) for k in range(count))
        return Card(host, secret, words, door, addresses)

    @property
    def process(self) -> Process:
        """Whose it is."""
        return self.host, self.words, self.door


class Ports:
    """This process's two ports, and its connections to others'."""

    def __init__(self) -> None:
        self.contacts: dict[bytes, Contact] = {}
        self.dead: set[Process] = set()
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
        return Card(_host(), secrets.token_bytes(16), words, door, _addresses())

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
        """From now on, hear of its end."""
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
        module = native()
        if module is not None:  # which keeps the interpreter's lock: it may take long to get it back
            return bool(module.unread_news())
        return self._events is not None and bool(self._events.poll(0, 1))

    def read_lately(self) -> None:
        """Take what has come, unless that was done just now: jobs ask many times per millisecond."""
        now = time.monotonic()
        if now - self._read_at > _LATELY_SECONDS:
            self._read_at = now
            self.read()

    def read(self) -> None:
        """Take what has come."""
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
        """Which of the processes with these ranks in MPI.COMM_WORLD are dead, by their positions in ``places``.

        ``left``: or have left.
        """
        processes = self.dead | self.left if left else self.dead
        gone = {self.places[process] for process in processes if process in self.places}
        return [rank for rank, place in enumerate(places) if place in gone] if gone else []

    def _hear_the_end(self, number: int) -> None:
        line, process = self._watched[number]
        try:
            (self.left if line.recv(1) == _FAREWELL else self.dead).add(process)
        except BlockingIOError:
            return
        except ConnectionResetError:
            self.dead.add(process)
        except OSError:  # it could not be reached, which says nothing of the process
            self._connected.discard(process)
        del self._watched[number]
        line.close()

    def _take(self, data: bytes, address: str) -> None:
        contact = self.contacts.get(data[:16])
        if contact is None:
            self._early.append((data, address))
        elif len(data) >= _HEAD.size:
            _, kind, sender, number = _HEAD.unpack_from(data)
            contact.take(Word(kind, sender, number, data[_HEAD.size :].decode("utf-8", "replace")), address)

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
    module = native()
    if module is not None:
        module.news_comes_to(descriptor)


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


@functools.cache
def _host() -> bytes:
    """Equal for processes with the same loopback interface."""
    try:
        namespace = os.stat("/proc/self/ns/net")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
        return (int(boot, 16) ^ namespace.st_ino << 8 ^ namespace.st_dev).to_bytes(17, "big")[-16:]
    except (OSError, ValueError):
        return secrets.token_bytes(16)


@functools.cache
def _addresses() -> tuple[str, ...]:
    """The IPv4 addresses of this host's interfaces, but for the loopback's."""
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asker.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    return tuple(address for address in found if not address.startswith("127."))[:_ADDRESSES]


class Contact:
    """One communicator's ranks, as far as this one has heard of them.

    ``cards``: one for each rank, in order; ``places``: their ranks in MPI.COMM_WORLD. ``answer`` says where this rank
    is: a job's number, and its name.
    """

    def __init__(
        self, rank: int, cards: list[Card], places: Sequence[int], answer: Callable[[], tuple[int, str] | None]
    ) -> None:
        self.name = cards[0].secret
        self.rank = rank
        self.failed: set[int] = set()  # ranks that said that they have given up in the middle of a job
        self.quitters: set[int] = set()  # ranks that said that they leave with jobs undone
        self._answer = answer
        self._cards = cards
        self._heard: dict[int, str] = {}  # the address that a rank was heard from
        self._reached: dict[int, int] = {}  # the last job that a rank said it waits in
        self._waits: dict[int, str] = {}  # where the ranks are that have answered since the last question
        self._ranks = {card.process: rank for rank, card in enumerate(cards) if card.words}
        for card, place in zip(cards, places, strict=True):
            if card.words and place >= 0:
                ports().places[card.process] = place
        size = len(cards)
        steps = [1 << k for k in range((size - 1).bit_length())]
        self._neighbours = {(rank + step) % size for step in steps} | {(rank - step) % size for step in steps}
        self._neighbours.discard(rank)
        ports().register(self)
        self._tell(self._neighbours, HELLO)

    def _reach(self, rank: int) -> list[str]:
        """The addresses at which a rank may be."""
        card, own = self._cards[rank], self._cards[self.rank]
        if not card.words:
            return []
        if rank in self._heard:
            return [self._heard[rank]]
        if card.host == own.host:
            return ["127.0.0.1"]
        return [address for address in card.addresses if address not in own.addresses]

    def _tell(self, ranks: Collection[int], kind: int, number: int = 0, text: str = "") -> None:
        data = _HEAD.pack(self.name, kind, self.rank, number) + text.encode(errors="replace")[:_TEXT_NBYTES]
        ports().say(data, [(address, self._cards[rank].words) for rank in ranks for address in self._reach(rank)])

    @property
    def _others(self) -> set[int]:
        return set(range(len(self._cards))) - {self.rank} - self.dead

    def take(self, word: Word, address: str) -> None:
        """Hear a word that came from an address."""
        sender = word.sender
        if not 0 <= sender < len(self._cards) or sender == self.rank or address not in self._reach(sender):
            return
        if sender not in self._heard:
            self._heard[sender] = address
            if sender in self._neighbours:
                ports().watch(self._cards[sender].process, address)
        if word.kind in (ASKS, WAITS):
            self._waits[sender] = word.text
            self._reached[sender] = max(word.number, self._reached.get(sender, 0))
        if word.kind == ASKS:
            self._reply(sender)
        elif word.kind == FAILED:
            self.failed.add(sender)
        elif word.kind == QUITS:
            self.quitters.add(sender)
        elif word.kind == GONE and 0 <= word.number < len(self._cards):
            self._bury(word.number)

    def _reply(self, sender: int) -> None:
        if self.rank in self.failed:
            self._tell([sender], FAILED)
        for rank in self.dead:
            self._tell([sender], GONE, rank)
        answer = self._answer()
        if answer is not None:
            self._tell([sender], WAITS, *answer)

    def _bury(self, rank: int) -> None:
        """Its process takes part in nothing any more, in whatever communicator."""
        if self._cards[rank].words:
            ports().dead.add(self._cards[rank].process)

    def _among(self, processes: set[Process]) -> set[int]:
        return {self._ranks[process] for process in processes if process in self._ranks} - {self.rank}

    @property
    def dead(self) -> set[int]:
        """Other ranks whose processes have died, or will take part in nothing any more, as far as it is known."""
        dead = ports().dead
        return self._among(dead) if dead else set()

    @property
    def left(self) -> set[int]:
        """Other ranks whose processes have left the job; they may have done their part before."""
        return self._among(ports().left)

    def meet(self, ranks: Collection[int]) -> None:
        """Hear of the ends of these ranks, too, which do the same: they exchange messages."""
        new = set(ranks) - self._neighbours - {self.rank}
        self._neighbours |= new
        self._tell(new, HELLO)
        self.watch(new)

    def watch(self, awaited: Collection[int]) -> None:
        """Hear of the end of these ranks, too; of the neighbours' it is heard anyway."""
        for rank in awaited:
            if rank in self._heard:
                ports().watch(self._cards[rank].process, self._heard[rank])

    def tell_failed(self) -> None:
        """Tell the others that this rank has given up in the middle of a job."""
        self.failed.add(self.rank)
        self._tell(self._others, FAILED)

    def tell_gone(self, gone: Collection[int]) -> None:
        """Tell the others that these are gone: they may wait for this rank, which will not do its part now."""
        for rank in gone:
            self._bury(rank)
        for rank in gone:
            self._tell(self._others, GONE, rank)

    def tell_quit(self) -> None:
        """Tell the others that this rank leaves with jobs undone."""
        self._tell(self._others, QUITS)

    def ask(self, number: int, what: str) -> None:
        """Ask the others where they are; this rank waits in job ``number``."""
        self._waits.clear()
        self._tell(self._others, ASKS, number, what)

    def silent(self, number: int) -> tuple[list[int], dict[int, str]]:
        """The ranks that are not known to have come to job ``number``: those that said nothing since ``ask``, and what
        the others wait in. Empty where nobody was ever heard: words do not get through, then.
        """
        late = [rank for rank in sorted(self._others) if self._reached.get(rank, 0) < number and self._heard]
        return [rank for rank in late if rank not in self._waits], {r: self._waits[r] for r in late if r in self._waits}

    def close(self) -> None:
        """Hear nothing more."""
        ports().contacts.pop(self.name, None)
