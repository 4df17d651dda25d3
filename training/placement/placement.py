"""What a user says about a placement: a pipeline of stages; a name or a dict says the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bitring.settings import Range, checked
from bitring.training.placement.schedules import SCHEDULES


@dataclass(frozen=True)
class Placement:
    """Stages of a pipeline, one rank each (in every replica), through which micro-batches go one after another.

    stages: the names of each stage's layers, or a number of stages, of about equal computing. Layers without
    parameters follow the layer before. microbatches: so many parts a batch is cut into, as equal as can be. schedule:
    "gpipe" or "one_forward_one_backward", which holds fewer micro-batches. Loss and gradients are the whole batch's.
    """

    stages: int | tuple[tuple[str, ...], ...]
    microbatches: int = 1
    schedule: str = "one_forward_one_backward"

    def __init__(
        self,
        *,
        stages: int | Sequence[Iterable[str]],
        microbatches: int = 1,
        schedule: str = "one_forward_one_backward",
    ) -> None:
        given: int | tuple[tuple[str, ...], ...]
        if isinstance(stages, Sequence) and not isinstance(stages, str):
            given = tuple((each,) if isinstance(each, str) else tuple(each) for each in stages)
            if not given or not all(given):
                raise ValueError(f"Placement: stages must be one or more, of one layer or more each; got {stages!r}")
        else:
            given = checked("Placement", "stages", stages, int, Range(least=1))
        object.__setattr__(self, "stages", given)
        object.__setattr__(
            self, "microbatches", checked("Placement", "microbatches", microbatches, int, Range(least=1))
        )
        known = Range(one_of=tuple(SCHEDULES))
        object.__setattr__(self, "schedule", checked("Placement", "schedule", schedule, str, known))

    @property
    def count(self) -> int:
        """How many stages there are."""
        return self.stages if isinstance(self.stages, int) else len(self.stages)
