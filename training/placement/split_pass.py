"""A step's passes on one rank: forward and backward through what it has of the model, in the order of a schedule.

It is the work of one job: where a value comes from another rank it waits there, and everybody watches. An error in a
layer does not stop it: the rank goes on with zeros, so that none waits for it, and the error is raised when ranks meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitring.collectives.interop.steps import Progress, Steps, StepsTo
from bitring.models.graph import INPUT, apply
from bitring.models.layers import Backward, Workspace
from bitring.models.model import Model
from bitring.training.placement.assignment import Placed
from bitring.training.placement.layout import Layout, part
from bitring.training.placement.messages import Messages, shape_of
from bitring.training.placement.schedules import Task
from bitring.training.placement.wiring import Edge, Wiring


class SplitPass:
    """The passes of rank ``rank`` of a replica over its samples x, y, in ``microbatches`` parts.

    ``parameters``: what the layers here work with. Afterwards ``loss`` is this rank's share of the mean over the
    samples, ``gradients`` those of the parameters that were met, and ``error`` what went wrong.
    """

    def __init__(
        self,
        wiring: Wiring,
        model: Model,
        parameters: Mapping[str, Any],
        rank: int,
        workspaces: list[Workspace],
        microbatches: int,
    ) -> None:
        self._wiring, self._model, self._parameters, self._rank = wiring, model, parameters, rank
        self._free = workspaces  # memory for passes, from step to step
        self._parts = microbatches
        self._mine = [each for each in wiring.placed if rank in each.takes.ranks]
        self.loss = 0.0
        self.gradients: dict[str, Any] = {}
        self.error: Exception | None = None

    def run(self, x: Any, y: Any, tasks: Mapping[int, Sequence[Task]], messages: Messages, progress: Progress) -> Steps:
        """The work: ``tasks`` by stage, of which a rank has one."""
        self._x, self._y, self._messages = x, y, messages
        self._outputs: dict[Any, Any] = {}  # (micro-batch, value) -> what this rank has made
        self._taken: dict[Any, Any] = {}  # (micro-batch, edge) -> as its nodes take it
        self._backwards: dict[Any, Backward | None] = {}
        self._given: dict[Any, list[Any]] = {}  # (micro-batch, edge) -> gradients from its takers, the first ones
        self._back: dict[Any, Any] = {}  # (micro-batch, edge) -> this rank's gradient before the last hop back
        self._workspaces: dict[int, Workspace] = {}
        progress.exchanging = True
        stages = dict.fromkeys(each.stage for each in self._mine)
        for stage in stages:
            for task in tasks[stage]:
                nodes = [each for each in self._mine if each.stage == stage]
                if task.backward:
                    yield from self._backward(nodes, task.microbatch)
                else:
                    yield from self._forward(nodes, task.microbatch)
        yield from messages.finish()
        progress.exchanging = False

    def _slice(self, microbatch: int) -> slice:
        return part(len(self._y), self._parts, microbatch)

    def _rows(self, microbatch: int) -> int:
        mine = self._slice(microbatch)
        return int(mine.stop - mine.start)

    def _zeros(self, value: str, layout: Layout, rows: int) -> Any:
        inner = self._wiring.shapes[value]
        return np.zeros(shape_of(layout.region(self._rank, rows, inner[-1]), inner), self._model.dtype)

    def _computed(self, compute: Callable[[], Any], otherwise: Callable[[], Any], rows: int) -> Any:
        """What ``compute`` gives; where there are no samples, or something went wrong, what ``otherwise`` does."""
        if rows and self.error is None:
            try:
                return compute()
            except Exception as error:  # whatever it is, the other ranks must not wait
                self.error = error
        return otherwise()

    def _local_rows(self, layout: Layout, rows: int) -> int:
        region = layout.region(self._rank, rows, 1)
        return region.last_row - region.first_row

    def _number(self, microbatch: int, edge: Edge, hop: int, back: bool) -> int:
        """The number of a message, by which its receiver knows it."""
        return ((microbatch * len(self._wiring.edges) + edge.number) * 2 + back) * 2 + hop

    # Forward

    def _forward(self, nodes: Sequence[Placed], microbatch: int) -> Steps:
        rows = self._rows(microbatch)
        workspace = self._workspaces[microbatch] = self._free.pop() if self._free else Workspace(np)
        workspace.restart()
        for placed in nodes:
            node = placed.node
            xs: list[Any] = []
            for name in node.inputs:
                value = yield from self._take(microbatch, self._wiring.edges[name, placed.takes])
                xs.append(value)
            y, backward = self._computed(
                lambda node=node, xs=xs: apply(node, self._wiring.kept, workspace, self._parameters, xs),  # type: ignore[misc]
                lambda placed=placed: (self._zeros(placed.node.name, placed.gives, rows), None),  # type: ignore[misc]
                self._local_rows(placed.takes, rows),
            )
            self._outputs[microbatch, node.name], self._backwards[microbatch, node.name] = y, backward
            for edge in self._wiring.edges_of.get(node.name, ()):
                hops = self._wiring.hops(edge, rows)
                if hops:
                    self._messages.send(hops[0], self._number(microbatch, edge, 0, False), y)
        if self._rank in self._wiring.loss.takes.ranks and nodes[-1].node.name == self._wiring.loss.value:
            yield from self._measure(microbatch)

    def _take(self, microbatch: int, edge: Edge) -> StepsTo[Any]:
        """A value as the nodes of an edge take it."""
        key = microbatch, edge.number
        if key in self._taken:
            return self._taken[key]
        rows = self._rows(microbatch)
        hops = self._wiring.hops(edge, rows)
        if edge.value == INPUT:
            region = edge.takes.region(self._rank, rows, self._wiring.width(INPUT))
            first = self._slice(microbatch).start
            value = self._x[first + region.first_row : first + region.last_row, ..., region.first : region.last]
        else:
            value = self._outputs.get((microbatch, edge.value))
        for number, hop in enumerate(hops):
            value = yield from self._hop(edge, microbatch, number, hop, value, False, send=number > 0)
        self._taken[key] = value
        return value

    def _hop(
        self, edge: Edge, microbatch: int, number: int, hop: Any, value: Any, back: bool, send: bool = True
    ) -> StepsTo[Any]:
        """This rank's part after a hop, from its part before."""
        message = self._number(microbatch, edge, number, back)
        if send and value is not None:
            self._messages.send(hop, message, value)
        inner = self._wiring.shapes[edge.value]
        received = self._messages.receive(hop, message, value, inner, self._model.dtype)
        return (yield from self._messages.timed(edge.number, received))

    def _measure(self, microbatch: int) -> Steps:
        """The loss of this rank's samples in the micro-batch, and the gradient by its logits."""
        edge, rows = self._wiring.loss, self._rows(microbatch)
        logits = yield from self._take(microbatch, edge)
        region = edge.takes.region(self._rank, rows, logits.shape[-1])
        first = self._slice(microbatch).start
        y = self._y[first + region.first_row : first + region.last_row]

        def compute() -> Any:
            losses, d = self._model.cross_entropy(logits, y)
            self.loss += float(losses.sum()) / len(self._y)
            d /= len(self._y)
            return d

        d = self._computed(compute, lambda: np.zeros_like(logits), len(y))
        self._given[microbatch, edge.number] = [d]

    # Backward

    def _backward(self, nodes: Sequence[Placed], microbatch: int) -> Steps:
        rows = self._rows(microbatch)
        workspace = self._workspaces[microbatch]
        if (microbatch, self._wiring.loss.number) in self._given:
            yield from self._give_back(microbatch, self._wiring.loss)
        for placed in reversed(nodes):
            node = placed.node
            dy = yield from self._collect(microbatch, placed)
            backward = self._backwards.pop((microbatch, node.name))
            dx = self._computed(
                lambda backward=backward, dy=dy: backward(dy, self._emit),  # type: ignore[misc]
                lambda: None,
                0 if backward is None else self._local_rows(placed.takes, rows),
            )
            gradients = dx if isinstance(dx, tuple) else (dx,) * len(node.inputs)
            for name, gradient in zip(node.inputs, gradients, strict=True):
                edge = self._wiring.edges[name, placed.takes]
                if edge.gradient:
                    if gradient is None:
                        gradient = self._zeros(name, placed.takes, rows)
                    given = self._given.setdefault((microbatch, edge.number), [])
                    given.append(gradient)
                    if len(given) == len(edge.takers):
                        yield from self._give_back(microbatch, edge)
        for placed in nodes:
            self._outputs.pop((microbatch, placed.node.name), None)
            for name in placed.node.inputs:
                self._taken.pop((microbatch, self._wiring.edges[name, placed.takes].number), None)
        self._taken.pop((microbatch, self._wiring.loss.number), None)
        self._free.append(workspace)

    def _emit(self, name: str, gradient: Any) -> None:
        if name in self.gradients:
            self.gradients[name] += gradient
        else:
            self.gradients[name] = gradient

    def _give_back(self, microbatch: int, edge: Edge) -> Steps:
        """All nodes here have given their gradients of a value: send their sum to those who made it."""
        first, *others = self._given.pop((microbatch, edge.number))
        gradient = first
        for each in others:
            gradient = gradient + each
        hops = self._wiring.hops(edge, self._rows(microbatch))
        for number in range(len(hops) - 1, 0, -1):
            gradient = yield from self._hop(edge, microbatch, number, hops[number].adjoint, gradient, True)
        if hops and gradient is not None:
            self._messages.send(hops[0].adjoint, self._number(microbatch, edge, 0, True), gradient)
        self._back[microbatch, edge.number] = gradient

    def _collect(self, microbatch: int, placed: Placed) -> StepsTo[Any]:
        """The gradient by a node's output: what comes back by its edges, added up."""
        rows, total = self._rows(microbatch), None
        for edge in self._wiring.edges_of.get(placed.node.name, ()):
            if not edge.gradient:
                continue
            gradient = self._back.pop((microbatch, edge.number), None)
            hops = self._wiring.hops(edge, rows)
            if hops:
                gradient = yield from self._hop(edge, microbatch, 0, hops[0].adjoint, gradient, True, send=False)
            total = gradient if total is None else total + gradient
        return self._zeros(placed.node.name, placed.gives, rows) if total is None else total
