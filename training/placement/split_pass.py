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
from bitring.models.layers import Backward, Draw, Emit, Workspace
from bitring.models.model import Model
from bitring.training.placement.assignment import Placed
from bitring.training.placement.layout import Layout
from bitring.training.placement.messages import Messages, shape_of
from bitring.training.placement.native_messages import NativeMessages
from bitring.training.placement.schedules import StageTask
from bitring.training.placement.step_hops import StepHops
from bitring.training.placement.weight_gradients import Product, WeightGradients
from bitring.training.placement.wiring import Edge, Wiring


class SplitPass:
    """The passes of rank ``rank`` of a replica, in the order of ``tasks``; ``parameters``: what the layers work with.

    After a run ``loss`` is this rank's share of the mean over the samples, ``gradients`` those of the parameters that
    were met, and ``error`` what went wrong.
    """

    def __init__(
        self,
        wiring: Wiring,
        model: Model,
        parameters: Mapping[str, Any],
        rank: int,
        tasks: Sequence[StageTask],
    ) -> None:
        self._wiring, self._model, self._parameters, self._rank = wiring, model, parameters, rank
        self._free: list[Workspace] = []  # memory for passes, from step to step
        self._weights = WeightGradients()
        self._tasks = tasks
        self._mine = [each for each in wiring.placed if rank in each.takes.ranks]
        self.prepare(0, 0)

    def prepare(self, step: int, first: int) -> None:
        """Before the run of ``step``, in which sample ``first`` of the whole batch is the replica's first."""
        self._step, self._first = step, first
        self.loss = 0.0
        self.gradients: dict[str, Any] = {}
        self.error: Exception | None = None

    def run(self, x: Any, y: Any, hops: StepHops, messages: Messages | NativeMessages, progress: Progress) -> Steps:
        """The work on the replica's samples x, y, of which ``hops`` and ``messages`` know."""
        self._weights.begin(self.gradients)
        self._x, self._y, self._hops, self._messages = x, y, hops, messages
        self._outputs: dict[Any, Any] = {}  # (micro-batch, value) -> what this rank has made
        self._taken: dict[Any, Any] = {}  # (micro-batch, edge) -> as its nodes take it
        self._backwards: dict[Any, Backward | None] = {}
        self._given: dict[Any, list[Any]] = {}  # (micro-batch, edge) -> gradients from its takers, the first ones
        self._back: dict[Any, Any] = {}  # (micro-batch, edge) -> this rank's gradient before the last hop back
        self._workspaces: dict[Any, Workspace] = {}
        progress.exchanging = True
        messages.begin(progress)
        for stage, task in self._tasks:
            nodes = [each for each in self._mine if each.stage == stage]
            if not nodes:
                continue
            if task.backward:
                yield from self._backward(nodes, task.microbatch)
            else:
                yield from self._forward(nodes, task.microbatch)
        self._computed(self._weights.finish, lambda: None, 1)
        yield from messages.finish()
        progress.exchanging = False

    def _cut(self, stage: int, microbatch: int) -> slice:
        return self._wiring.cut(stage, microbatch, len(self._y))

    def _rows(self, stage: int, microbatch: int) -> int:
        cut = self._cut(stage, microbatch)
        return int(cut.stop - cut.start)

    def _zeros(self, value: str, layout: Layout, rows: int) -> Any:
        return np.zeros(self._shape(value, layout, rows), self._model.dtype)

    def _shape(self, value: str, layout: Layout, rows: int) -> tuple[int, ...]:
        """That of this rank's part of a value."""
        inner = self._wiring.shapes[value]
        return shape_of(layout.region(self._rank, rows, inner[-1]), inner)

    def _computed(self, compute: Callable[[], Any], otherwise: Callable[[], Any], rows: int) -> Any:
        """What ``compute`` gives; where there are no samples, or something went wrong, what ``otherwise`` does."""
        self._messages.advance()
        if rows and self.error is None:
            try:
                return compute()
            except Exception as error:  # whatever it is, the other ranks must not wait
                self.error = error
        return otherwise()

    def _local_rows(self, layout: Layout, rows: int) -> int:
        region = layout.region(self._rank, rows, 1)
        return region.last_row - region.first_row

    # Forward

    def _forward(self, nodes: Sequence[Placed], microbatch: int) -> Steps:
        stage = nodes[0].stage
        rows, microbatches = self._rows(stage, microbatch), self._wiring.microbatches[stage]
        workspace = self._workspaces[stage, microbatch] = self._free.pop() if self._free else Workspace(np)
        workspace.restart()
        workspace.make_product = Product if microbatches > 1 else None
        self._send_ahead(nodes, microbatch + 1)
        for placed in nodes:
            node = placed.node
            xs: list[Any] = []
            for name in node.inputs:
                value = yield from self._take(microbatch, self._wiring.edge(name, placed))
                xs.append(value)
            workspace.draw = self._draw(microbatch, placed)
            y, backward = self._computed(
                lambda placed=placed, xs=xs: self._applied(placed, workspace, xs, rows),  # type: ignore[misc]
                lambda placed=placed: (self._zeros(placed.node.name, placed.gives, rows), None),  # type: ignore[misc]
                self._local_rows(placed.takes, rows),
            )
            self._outputs[microbatch, node.name], self._backwards[microbatch, node.name] = y, backward
            for edge in self._wiring.edges_of.get(node.name, ()):
                hops = self._hops.there(edge, 0 if edge.crosses else microbatch)
                if hops:
                    self._messages.send(hops[0], y)
        if self._rank in self._wiring.loss.takes.ranks and nodes[-1].node.name == self._wiring.loss.value:
            yield from self._measure(microbatch)

    def _applied(self, placed: Placed, workspace: Workspace, xs: Sequence[Any], rows: int) -> tuple[Any, Backward]:
        """A node's output and the way back, of the shapes that are sent: a message reads what it was made for."""
        node = placed.node
        y, backward = apply(node, self._wiring.kept, workspace, self._parameters, xs)
        _require_shape(node.name, "gives values", y, self._shape(node.name, placed.gives, rows))

        def checked(dy: Any, emit: Emit) -> Any:
            dx = backward(dy, emit)
            gradients = dx if isinstance(dx, tuple) else (dx,) * len(node.inputs)
            for name, gradient in zip(node.inputs, gradients, strict=True):
                if gradient is not None:
                    _require_shape(node.name, "gives back", gradient, self._shape(name, placed.takes, rows))
            return dx

        return y, checked

    def _draw(self, microbatch: int, placed: Placed) -> Draw:
        """What a node's layer draws by: as if it had the whole batch."""
        cut, width = self._cut(placed.stage, microbatch), self._wiring.width(placed.node.inputs[0])
        region = placed.takes.region(self._rank, cut.stop - cut.start, width)
        return Draw(self._step, self._first + cut.start + region.first_row, region.first, width)

    def _send_ahead(self, nodes: Sequence[Placed], microbatch: int) -> None:
        """Send what the next micro-batch takes of values that were made all at once, while this one computes."""
        if microbatch == self._wiring.microbatches[nodes[0].stage]:
            return
        edges = {
            edge.number: edge for each in nodes for name in each.node.inputs for edge in [self._wiring.edge(name, each)]
        }
        for edge in edges.values():
            if edge.crosses:
                for number in self._hops.there(edge, microbatch)[:1]:
                    self._messages.send(number, self._outputs.get((0, edge.value)))

    def _take(self, microbatch: int, edge: Edge) -> StepsTo[Any]:
        """A value as the nodes of an edge take it."""
        key = microbatch, edge.number
        if key in self._taken:
            return self._taken[key]
        hops = self._hops.there(edge, microbatch)
        if edge.value == INPUT:
            region = edge.takes.region(self._rank, self._rows(edge.stage, microbatch), self._wiring.width(INPUT))
            first = self._cut(edge.stage, microbatch).start
            value = self._x[first + region.first_row : first + region.last_row, ..., region.first : region.last]
        else:
            value = self._outputs.get((0 if edge.crosses else microbatch, edge.value))
        for place, number in enumerate(hops):
            value = yield from self._hop(number, value, send=place > 0)
        self._taken[key] = value
        return value

    def _hop(self, number: int, value: Any, send: bool = True) -> StepsTo[Any]:
        """This rank's part after a hop, from its part before."""
        if send and value is not None:
            self._messages.send(number, value)
        return (yield from self._messages.receive(number, value, self._meanwhile))

    def _meanwhile(self) -> bool:
        """Do something that is needed later, where there is any. Returns whether there was."""
        return bool(self._computed(self._weights.make_one, lambda: False, 1))

    def _measure(self, microbatch: int) -> Steps:
        """The loss of this rank's samples in the micro-batch, and the gradient by its logits."""
        edge = self._wiring.loss
        logits = yield from self._take(microbatch, edge)
        cut = self._cut(edge.stage, microbatch)
        region = edge.takes.region(self._rank, cut.stop - cut.start, logits.shape[-1])
        y = self._y[cut.start + region.first_row : cut.start + region.last_row]

        def compute() -> Any:
            losses, d = self._model.cross_entropy(logits, y)
            self.loss += float(losses.sum()) / len(self._y)
            d /= len(self._y)
            return d

        d = self._computed(compute, lambda: np.zeros_like(logits), len(y))
        self._given[microbatch, edge.number] = [d]

    # Backward

    def _backward(self, nodes: Sequence[Placed], microbatch: int) -> Steps:
        stage = nodes[0].stage
        rows = self._rows(stage, microbatch)
        workspace = self._workspaces.pop((stage, microbatch))
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
                edge = self._wiring.edge(name, placed)
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
                self._taken.pop((microbatch, self._wiring.edge(name, placed).number), None)
        self._taken.pop((microbatch, self._wiring.loss.number), None)
        self._free.append(workspace)

    def _emit(self, name: str, gradient: Any) -> None:
        if isinstance(gradient, Product):
            self._weights.add(name, gradient)
        elif name in self.gradients:
            self.gradients[name] += gradient
        else:
            self.gradients[name] = gradient

    def _give_back(self, microbatch: int, edge: Edge) -> Steps:
        """All nodes here have given their gradients of a value: send their sum to those who made it."""
        first, *others = self._given.pop((microbatch, edge.number))
        gradient = first
        for each in others:
            gradient = gradient + each
        hops = self._hops.back(edge, microbatch)
        for number in hops[:0:-1]:
            gradient = yield from self._hop(number, gradient)
        if hops and gradient is not None:
            self._messages.send(hops[0], gradient)
        if edge.crosses and gradient is not None:  # it is in memory that the next micro-batch works in
            gradient = gradient.copy() if self._wiring.gives[edge.value].ranks[microbatch] == self._rank else None
        self._back[microbatch, edge.number] = gradient

    def _collect(self, microbatch: int, placed: Placed) -> StepsTo[Any]:
        """The gradient by a node's output: what comes back by its edges, added up."""
        total = None
        for edge in self._wiring.edges_of.get(placed.node.name, ()):
            if not edge.gradient:
                continue
            mine = placed.gives.ranks.index(self._rank) if edge.crosses else microbatch
            gradient = self._back.pop((mine, edge.number), None)
            hops = self._hops.back(edge, mine)
            if hops:
                gradient = yield from self._hop(hops[0], gradient, send=False)
            total = gradient if total is None else total + gradient
        rows = self._rows(placed.stage, microbatch)
        return self._zeros(placed.node.name, placed.gives, rows) if total is None else total


def _require_shape(node: str, gives: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError where what a node's layer has computed is of another shape."""
    if np.shape(value) != shape:
        raise ValueError(f"ModelParallel.step: {node} {gives} of shape {np.shape(value)}, where {shape} is due")
