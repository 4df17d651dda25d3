"""Schedules of pipelines, as data: in which order a stage runs its micro-batches, forward and backward.

A stage's forward pass of a micro-batch needs that of the stage before, its backward pass that of the stage after, and
its own forward pass. ``check`` runs a schedule on paper: it proves that it comes to its end, and counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Task(NamedTuple):
    """One pass of a micro-batch through a stage."""

    backward: bool
    microbatch: int


class StageTask(NamedTuple):
    """A stage's."""

    stage: int
    task: Task


Schedule = Callable[[int, int, int], list[Task]]
"""Takes a stage, the number of stages, and that of micro-batches; gives the stage's tasks in order."""


def gpipe(stage: int, stages: int, microbatches: int) -> list[Task]:
    """All forward, then all backward (Huang et al., GPipe, 2019). A stage holds all micro-batches."""
    return [Task(backward, each) for backward in (False, True) for each in range(microbatches)]


def one_forward_one_backward(stage: int, stages: int, microbatches: int) -> list[Task]:
    """Backward as soon as can be (Narayanan et al., PipeDream, 2019); it takes as long as GPipe's.

    Stage k holds at most ``stages`` − k micro-batches.
    """
    ahead = min(stages - stage, microbatches)
    tasks = [Task(False, each) for each in range(ahead)]
    for each in range(microbatches):
        tasks.append(Task(True, each))
        if each + ahead < microbatches:
            tasks.append(Task(False, each + ahead))
    return tasks


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "one_forward_one_backward": one_forward_one_backward}


def in_turns(turns: int) -> list[StageTask]:
    """Of all ranks: stage 0 all at once, stage 1 in turns, forward and backward; then stage 0 backward.

    Krizhevsky's scheme (b) of hybrid parallelism ("One weird trick", 2014): each rank's samples in turn.
    """
    ahead = [StageTask(0, Task(False, 0))]
    for turn in range(turns):
        ahead += [StageTask(1, Task(False, turn)), StageTask(1, Task(True, turn))]
    return [*ahead, StageTask(0, Task(True, 0))]


class Course(NamedTuple):
    """What ``check`` finds: how many passes one after the other it takes, each as long as any other; and how many
    micro-batches each stage holds at most, between their forward and their backward pass.
    """

    passes: int
    held: list[int]


def check(schedule: Schedule, stages: int, microbatches: int) -> Course:
    """Run it on paper. Raises ValueError where a task is missing or twice, or tasks wait for each other for ever."""
    todo = [schedule(stage, stages, microbatches) for stage in range(stages)]
    wanted = {Task(backward, each) for backward in (False, True) for each in range(microbatches)}
    for stage, tasks in enumerate(todo):
        if len(tasks) != len(wanted) or set(tasks) != wanted:
            raise ValueError(f"stage {stage} must run each micro-batch once forward and once backward; it runs {tasks}")
    done: set[tuple[int, Task]] = set()
    at, held, most, passes = [0] * stages, [0] * stages, [0] * stages, 0
    while len(done) < stages * len(wanted):
        ran: list[tuple[int, Task]] = []
        for stage in range(stages):
            if at[stage] < len(todo[stage]):
                task = todo[stage][at[stage]]
                if all(each in done for each in _needs(stage, task, stages)):
                    ran.append((stage, task))
        if not ran:
            waits = {stage: todo[stage][at[stage]] for stage in range(stages) if at[stage] < len(todo[stage])}
            raise ValueError(f"tasks wait for each other for ever: {waits}")
        for stage, task in ran:
            done.add((stage, task))
            at[stage] += 1
            held[stage] += -1 if task.backward else 1
            most[stage] = max(most[stage], held[stage])
        passes += 1
    return Course(passes, most)


def _needs(stage: int, task: Task, stages: int) -> list[tuple[int, Task]]:
    if not task.backward:
        return [(stage - 1, task)] if stage else []
    before = [(stage, Task(False, task.microbatch))]
    return before if stage == stages - 1 else [*before, (stage + 1, task)]
