"""Messages between the ranks of a communicator when a collective does not go on, and the notice of a death.

Words travel between the processes' ports (``ports``). Where they do not get through, no rank is taken for dead or
silent.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence

from bitring.collectives.runtime.card import Card, Process
from bitring.collectives.runtime.ports import NAME_NBYTES, ports

HELLO = 0
"""Nothing but that its sender can be heard."""
ASKS = 1
"""Its sender waits in the job named, and wants to know where the others are."""
WAITS = 2
"""The answer: its sender waits in the job named; number 0 when that is another communicator's."""
FAILED = 3
"""Its sender has given up in the middle of a job; the text says why, where that is an error of all ranks."""
GONE = 4
"""The rank numbered has died, or left when it was waited for."""
QUITS = 5
"""Its sender leaves in good order, with jobs undone."""
INQUIRES = 6
"""Its sender waits in the call that the text tells of, and wants to hear of ranks that do something else."""
LEAVES_OFF = 7
"""Its sender has waited for too long, and takes part in nothing any more; others may be waiting still."""

_HEAD = struct.Struct(f"!{NAME_NBYTES}sBii")  # the communicator's name, the kind, the sender, a number; then a text
_TEXT_NBYTES = 400


class Contact:
    """One communicator's ranks, as far as this one has heard of them.

    ``cards``: one for each rank, in order; ``places``: their ranks in MPI.COMM_WORLD. ``answer`` says where this rank
    is: a job's number, and its name. ``compare`` is handed a rank that waits, and what it says of its call;
    ``differs`` is called when some have found that ranks' calls differ.
    """

    def __init__(
        self,
        rank: int,
        cards: list[Card],
        places: Sequence[int],
        answer: Callable[[], tuple[int, str] | None],
        compare: Callable[[int, str], None],
        differs: Callable[[], object],
    ) -> None:
        self.name = cards[0].secret
        self.rank = rank
        self.failed: set[int] = set()  # ranks that said that they have given up in the middle of a job
        self.quitters: set[int] = set()  # ranks that said that they leave with jobs undone
        self.impatient: set[int] = set()  # ranks that said that they have waited for too long
        self.difference = ""  # between ranks' calls, for which some have failed: which call that was, and the error
        self._answer = answer
        self._compare = compare
        self._differs = differs
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

    def hear(self, data: bytes, address: str) -> None:
        """Handle words that came from an address."""
        if len(data) < _HEAD.size:
            return
        _, kind, sender, number = _HEAD.unpack_from(data)
        if not 0 <= sender < len(self._cards) or sender == self.rank or address not in self._reach(sender):
            return
        if sender not in self._heard:
            self._heard[sender] = address
            if sender in self._neighbours:
                ports().watch(self._cards[sender].process, address)
        text = data[_HEAD.size :].decode("utf-8", "replace")
        if kind in (ASKS, WAITS):
            self._waits[sender] = text
            self._reached[sender] = max(number, self._reached.get(sender, 0))
        if kind == ASKS:
            self._reply(sender)
        elif kind == FAILED:
            if text:
                self.difference = self.difference or text
                self._differs()
            else:
                self.failed.add(sender)
        elif kind == INQUIRES:
            if self.rank in self.failed:
                self._tell([sender], FAILED, text=self.difference)
            else:
                self._compare(sender, text)
        elif kind == LEAVES_OFF:
            self.impatient.add(sender)
        elif kind == QUITS:
            self.quitters.add(sender)
        elif kind == GONE and 0 <= number < len(self._cards):
            self._bury(number)

    def _reply(self, sender: int) -> None:
        if self.rank in self.failed:
            self._tell([sender], FAILED, text=self.difference)
        for rank in self.dead:
            self._tell([sender], GONE, rank)
        answer = self._answer()
        if answer is not None:
            self._tell([sender], WAITS, *answer)

    def _bury(self, rank: int) -> None:
        """Note that a rank's process takes part in nothing any more, in any communicator."""
        if self._cards[rank].words:
            ports().bury(self._cards[rank].process)

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
        """Watch these ranks for their end, too; neighbours are always watched."""
        for rank in awaited:
            if rank in self._heard:
                ports().watch(self._cards[rank].process, self._heard[rank])

    def tell_failed(self, difference: str = "") -> None:
        """Tell the others that this rank has given up in the middle of a job; for a ``difference`` they raise, too."""
        self.failed.add(self.rank)
        self.difference = self.difference or difference
        self._tell(self._others, FAILED, text=difference)

    def tell_impatient(self) -> None:
        """Tell the others that this rank has waited for too long, and takes part in nothing any more."""
        self._tell(self._others, LEAVES_OFF)

    def inquire(self, call: str) -> None:
        """Tell the others which call this rank waits in; who has made another one in its place will say so."""
        self._tell(self._others, INQUIRES, text=call)

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
        """Stop listening."""
        ports().contacts.pop(self.name, None)
