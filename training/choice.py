"""The base of choices: what picks a compressor for each parameter, where one for all is not the best.

A class ``class Name(Choice):`` in ``training/choices/NAME.py`` is registered as ``NAME``; ``compression=`` takes its
name and its instances as it does a compressor's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from bitring.compression.compressor import Compressor
from bitring.registry import Registry
from bitring.settings import Settings
from bitring.training.prediction.cluster import Cluster


class Picked(NamedTuple):
    """What a parameter travels by, None for exact sums, and the predicted ``seconds`` of everything considered."""

    compressor: Compressor | None
    seconds: dict[str, float]

    @property
    def words(self) -> str:
        """The considered exchanges and their milliseconds, the quickest first."""
        ordered = sorted(self.seconds.items(), key=lambda item: item[1])
        return ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in ordered)


class Choice(Settings, ABC):
    """Base of every choice; instances are settings."""

    takes_factors = True
    """Whether gradients given as ``bitring.Factors`` may travel as such."""

    @abstractmethod
    def pick(
        self, shapes: Mapping[str, tuple[int, ...]], cluster: Cluster, by_owners: bool = False
    ) -> dict[str, Picked]:
        """What each parameter is to travel by; called on one rank, for all.

        ``by_owners``: all goes to the owners of shards, and back, as in a parameter server.
        """

    @abstractmethod
    def given_network(self) -> tuple[float, float] | None:
        """Seconds per message and bytes per second between nodes; None: they are to be measured."""


choices: Registry[Choice] = Registry("choice", Choice, "training/choices")
