"""Addresses at which a process can be reached, which it tells the others."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import socket
import struct
from pathlib import Path
from typing import NamedTuple

_CARD = struct.Struct("!16s16sHHB24s")  # see Card
CARD_NBYTES = _CARD.size
_ADDRESSES = 6
_SIOCGIFADDR = 0x8915

Process = tuple[bytes, int, int]
"""A process, for the others: its host and its ports."""


class Card(NamedTuple):
    """Addresses and ports of a process; ports are 0 where it cannot be reached. ``door`` is the one to connect to.

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
        """The process that the card belongs to."""
        return self.host, self.words, self.door


@functools.cache
def host() -> bytes:
    """Equal for processes with the same loopback interface."""
    try:
        namespace = os.stat("/proc/self/ns/net")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
        return (int(boot, 16) ^ namespace.st_ino << 8 ^ namespace.st_dev).to_bytes(17, "big")[-16:]
    except (OSError, ValueError):
        return secrets.token_bytes(16)


@functools.cache
def addresses() -> tuple[str, ...]:
    """The IPv4 addresses of this host's interfaces, but for the loopback's."""
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asker.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    return tuple(address for address in found if not address.startswith("127."))[:_ADDRESSES]
