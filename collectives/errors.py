"""The errors that ranks raise together, so that no rank waits for one that has given up."""

from __future__ import annotations


class MismatchError(ValueError):
    """Ranks asked for different things in one collective call; the text names the ranks that differ."""


class PeerError(RuntimeError):
    """Another rank could not take part in a collective call (its arguments were bad, or it failed); names the rank."""


class NonFiniteError(FloatingPointError):
    """A gradient holds NaN or Inf on some rank. Raised on all ranks, before anything is changed."""
