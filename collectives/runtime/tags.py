"""The tags of messages: collectives that run at once never take each other's."""

from __future__ import annotations

CHANNELS = 16
"""Collectives with different channels never take each other's messages; channel 0 is for calls without a plan."""


_TAGS = 32768 // CHANNELS


PIECE_TAG = _TAGS - 1
"""The last tag of a channel is one that no message of a program has."""


WORDS_TAG = 2 * _TAGS - 1
"""Tag of the words of ranks that do not agree; the last one of another channel."""


ROLL_CALL_TAG = 3 * _TAGS - 1
"""Tag of the messages by which the ranks of several nodes find out whether they mean the same."""


PACKED_TAG = 4 * _TAGS - 1
"""Tag of what the library copies from and to memory that it alone can read, in a message of a rank to itself."""


def channel_of(number: int) -> int:
    """The channel of plan ``number``, counted from 1; of a call without a plan for 0."""
    return 1 + (number - 1) % (CHANNELS - 1) if number else 0


def message_tag(channel: int, sequence: int) -> int:
    """The tag of a channel's message number ``sequence`` between two ranks."""
    return channel * _TAGS + sequence % (_TAGS - 1)
