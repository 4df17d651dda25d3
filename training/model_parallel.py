"""Training a model that is split between ranks, by layers, inside layers, or both; results do not depend on how.

What belongs together, in ``training/placement``:

- ``placement``, ``assignment``, ``stages``, ``parts``: which rank has what of each layer and parameter
- ``layout``, ``conversion``: how values lie on ranks, and what moves where; ``schedules``: pipelines as data
- ``wiring``, ``split_pass``, ``messages``: the passes of a step; ``shared_sums``: gradients of what several ranks have
- ``predicted``: what travels, in closed form
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.agreement import Request, agree
from bitring.collectives.runtime.context import context_of, given_comm, one_call
from bitring.collectives.runtime.jointly import jointly, raise_everywhere
from bitring.collectives.runtime.objects import allgather
from bitring.collectives.runtime.tags import channel_of
from bitring.compression.compressor import Compressor
from bitring.errors import MismatchError, NonFiniteError, uncopyable
from bitring.models.graph import INPUT, value_shapes
from bitring.models.layers import Workspace
from bitring.models.model import Model
from bitring.settings import Range, checked
from bitring.training.choice import Choice
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import Mode
from bitring.training.optimizer import Elementwise, Optimizer, optimizers
from bitring.training.placement.assignment import Placed, assign
from bitring.training.placement.explained import explained
from bitring.training.placement.layout import part
from bitring.training.placement.messages import Messages
from bitring.training.placement.parts import Part, local_parameters, parts_of
from bitring.training.placement.placement import Placement
from bitring.training.placement.predicted import Picture, Traffic, predicted
from bitring.training.placement.schedules import SCHEDULES, Task
from bitring.training.placement.shared_sums import SharedSums
from bitring.training.placement.split_pass import SplitPass
from bitring.training.placement.wiring import Wiring
from bitring.training.step.checks import chosen
from bitring.training.whole_batch import digest

_AUTO = ("data", "hybrid")
"""What ``placement="auto"`` chooses from; the first among equals."""


class ModelParallel:
    """Train ``model`` on all ranks of ``comm``, split as ``placement`` says. Making it is collective, as are all calls.

    model: a ``bitring.Model`` on the host, the same on all ranks; rank 0's parameters are taken. Each rank keeps its
    part of them; ``parameters`` puts them together, and gives them to the model too.
    optimizer: as for DataParallel; where parameters are cut it must work value by value, as SGD and AdaGrad do.
    placement: "data": every layer whole on all ranks, each with its samples. "hybrid": dense layers by columns and rows
    in turn, all else as "data". A dict of layer -> "samples", "columns" or "rows" (dense layers), or a rank; layers are
    named as their parameters begin, or by a graph's names; those not named are as in "data", and layers without
    parameters follow the layer before. A ``Placement``: a pipeline. "auto": of "data" and "hybrid" the one that sends
    less, by the first batch.
    replicas: so many groups of ranks, of one node where they can be, each with the whole model and its part of every
    batch. mode, compression: how gradients are averaged between replicas, see DataParallel. Inside a replica all is
    exact.

    Raises TypeError or ValueError on all ranks alike, MismatchError where their arguments differ.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer | str,
        *,
        comm: MPI.Intracomm | None = None,
        placement: str | Mapping[str, str | int] | Placement = "data",
        replicas: int = 1,
        mode: Mode | str = "sync",
        compression: Compressor | Choice | str | None = None,
    ) -> None:
        self.comm = given_comm(comm, "ModelParallel")
        self.model, self.placement = model, placement
        self.mode, self.compression = mode, compression
        self.steps = 0
        alike = (TypeError, ValueError)
        self._given = jointly(self.comm, "ModelParallel", lambda: self._checked(optimizer, replicas), alike)
        mine = repr([(name, w.shape, w.dtype) for name, w in model.parameters.items()])
        told = {"parameters": mine, "placement": repr(placement), "replicas": self.replicas, "mode": repr(mode)}
        told |= {"compression": repr(compression), "optimizer": repr(self._given)}
        for rank, theirs in enumerate(allgather(self.comm, told, "ModelParallel")):
            for what, value in theirs.items():
                if value != told[what]:
                    text = f"{value} on rank {rank}, {told[what]} on rank {self.comm.Get_rank()}"
                    raise MismatchError(f"ModelParallel: {what} must be the same on all ranks; got {text}")
        context = context_of(self.comm)
        order = [rank for node in context.nodes for rank in node]  # replicas inside nodes, where they fit
        place = order.index(self.comm.Get_rank())
        self.replica, self.rank = divmod(place, self.ranks)
        self._numbers = order[self.replica * self.ranks : (self.replica + 1) * self.ranks]
        self._channel = channel_of(context.new_plan())
        self._workspaces: list[Workspace] = []
        self._nbytes_sent = 0
        self._waited: dict[int, float] = {}
        self._samples = 0
        self._trainer: DataParallel | None = None
        self._sums: SharedSums | None = None
        for w in model.parameters.values():
            Communicator(self.comm).Bcast(w, 0)
        self._build("data" if placement == "auto" else placement)

    def _checked(self, optimizer: Any, replicas: Any) -> Optimizer:
        """The optimizer; raises where an argument is wrong."""
        where = "ModelParallel"
        if not isinstance(self.model, Model):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{where}: model must be a bitring.Model; got {type(self.model).__name__}")
        if self.model.xp is not np:
            raise ValueError(f"{where}: model must be on the host (xp=numpy); arrays on a device are not split yet")
        self.replicas = checked(where, "replicas", replicas, int, Range(least=1))
        size = self.comm.Get_size()
        if size % self.replicas:
            raise ValueError(f"{where}: replicas must divide the {size} ranks; got {self.replicas}")
        self.ranks = size // self.replicas
        x = np.zeros((1, *self.model.input_shape), self.model.dtype)
        arranged = self.model.arranged(x)
        self._shapes = value_shapes(self.model.nodes, self.model.parameters, arranged, np)
        self._shapes[INPUT] = tuple(arranged.shape[1:])
        given: Optimizer = chosen("optimizer", optimizer, optimizers, Optimizer)
        for placement in _AUTO if self.placement == "auto" else (self.placement,):
            placed = assign(placement, self.model.nodes, self._shapes, self.ranks)
            cut = [name for name, each in parts_of(placed).items() if each.axis is not None and len(each.ranks) > 1]
            if cut and not isinstance(given, Elementwise):
                kind = type(given).__name__
                raise ValueError(f"{where}: optimizer must work value by value where {cut[0]} is cut; {kind} does not")
        return given

    def _build(self, placement: Any) -> None:
        """Take this rank's part of the model's parameters, as placed. Collective."""
        self.placed: list[Placed] = assign(placement, self.model.nodes, self._shapes, self.ranks)
        self._wiring = Wiring(self.placed, self._shapes)
        self._parts: dict[str, Part] = parts_of(self.placed)
        self.microbatches = placement.microbatches if isinstance(placement, Placement) else 1
        schedule = SCHEDULES[placement.schedule if isinstance(placement, Placement) else "gpipe"]
        stages = self._wiring.stages
        self._tasks: dict[int, list[Task]] = {
            stage: schedule(stage, stages, self.microbatches) for stage in range(stages)
        }
        mine = {
            name: np.ascontiguousarray(each.of(self.model.parameters[name], self.rank)).copy()
            for name, each in self._parts.items()
            if self.rank in each.ranks
        }
        self._local = local_parameters(self.placed, mine, self.model.parameters, self.rank)
        self._mine = {name: w for name, w in mine.items() if w.size}
        self._sums = SharedSums(self.comm, self.replica, self.rank, self._parts, mine)
        self._across = Communicator(self.comm).Split(self.rank, self.replica)
        if self._mine:
            self._trainer = DataParallel(
                self._mine, self._given, comm=self._across, mode=self.mode, compression=self.compression
            )
        self._chosen = placement

    def __reduce__(self) -> Any:
        raise uncopyable(self, "state_dict() has what it knows, as plain arrays and numbers, for load_state_dict")

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's settings. Others can be put here, the same on all ranks, which the next step checks."""
        return self._given

    @optimizer.setter
    def optimizer(self, given: Optimizer | str) -> None:
        made = chosen("optimizer", given, optimizers, Optimizer)
        if self._trainer is not None:
            self._trainer.optimizer = made
        self._given = made

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others so far, in steps."""
        sums = 0 if self._sums is None else self._sums.nbytes_sent
        return self._nbytes_sent + sums + (0 if self._trainer is None else self._trainer.bytes_sent)

    @one_call("ModelParallel.step")
    def step(self, x: Any, y: Any) -> float:
        """One training step on the batch x (N, *input_shape), y (N,): the same on all ranks. Returns its mean loss.

        The loss is the one before the update, on every rank. N may be 0, which changes nothing; parts may be empty.

        A rank's bad arguments raise TypeError or ValueError there and PeerError on the others, batches or settings that
        differ MismatchError, NaN or Inf in a gradient NonFiniteError on all. Parameters are then as before, and
        training may go on.
        """
        where = f"ModelParallel.step (step {self.steps})"
        request = Request("ModelParallel.step")
        count = 0
        try:
            x, y = self.model.checked("loss_and_gradients", x, y)
            count = len(y)
            request.terms = {
                "step": self.steps,
                "samples": count,
                "batch": str(digest([(x, y)])),
                "optimizer": repr(self._given),
            }
        except Exception as error:  # whatever it is, the other ranks must not wait
            request.error = error
        if self.placement == "auto" and self.steps == 0:
            self._agree(request)
            self._choose(count)
        self._samples = count
        mine = part(count, self.replicas, self.replica)
        passes = SplitPass(self._wiring, self.model, self._local, self.rank, self._workspaces, self.microbatches)
        if request.error is None:
            x, y = self._arranged(x[mine]), y[mine]
        self._run(passes, request, x, y)
        gradients = {
            name: passes.gradients[name] if name in passes.gradients else np.zeros_like(w)
            for name, w in self._mine.items()
        }
        assert self._sums is not None
        self._sums.add(gradients)
        problem = passes.error
        if problem is None:
            bad = next((name for name, each in gradients.items() if not np.isfinite(each).all()), None)
            if bad is not None:
                problem = NonFiniteError(f"{where}: the gradient of {bad} on rank {self.comm.Get_rank()}")
        weight = mine.stop - mine.start
        everyone = allgather(self.comm, (passes.loss * weight, problem is not None), where)
        if any(wrong for _, wrong in everyone):
            raise_everywhere(self.comm, where, problem, alike=(NonFiniteError,))
        if self._trainer is not None:
            self._trainer.step(gradients, weight=weight)
        self.steps += 1
        return float(sum(loss for loss, _ in everyone) / max(count, 1))

    def _arranged(self, x: Any) -> Any:
        """This replica's samples as the first layer wants them."""
        if not len(x):
            return np.empty((0, *self._shapes[INPUT]), self.model.dtype)
        return self.model.arranged(x)

    def _agree(self, request: Request) -> None:
        context = context_of(self.comm)

        def steps(progress: Progress) -> Steps:
            yield from agree(context.comm, context.roll_call, request, progress)

        context.queue.call(steps, request.function)

    def _run(self, passes: SplitPass, request: Request, x: Any, y: Any) -> None:
        """The passes, as one job of the communicator's."""
        context = context_of(self.comm)
        context.prepare(request.function, request.error)

        def steps(progress: Progress) -> Steps:
            yield from agree(context.comm, context.roll_call, request, progress)
            messages = Messages(context.comm, self._numbers, self.rank, self._channel, progress)
            with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is found in the gradients
                yield from passes.run(x, y, self._tasks, messages, progress)
            self._nbytes_sent += messages.nbytes_sent
            for number, seconds in messages.seconds.items():
                self._waited[number] = self._waited.get(number, 0.0) + seconds

        context.queue.call(steps, request.function)

    def _predicted(self, placement: Any, samples: int) -> Traffic:
        """What a step sends in a replica that gets so many samples."""
        placed = assign(placement, self.model.nodes, self._shapes, self.ranks)
        shapes = {name: w.shape for name, w in self.model.parameters.items()}
        return predicted(
            Wiring(placed, self._shapes),
            parts_of(placed),
            shapes,
            self.ranks,
            self.replicas,
            samples,
            placement.microbatches if isinstance(placement, Placement) else 1,
            self.model.dtype.itemsize,
        )

    def _choose(self, samples: int) -> None:
        """Take the placement that sends the least for such a batch. Collective."""
        each = -(-samples // self.replicas)
        best = min(_AUTO, key=lambda placement: max(self._predicted(placement, each).total))
        if best != self._chosen:
            self._free()
            self._build(best)

    @one_call("ModelParallel.synchronize")
    def synchronize(self) -> None:
        """Make the replicas equal, as the mode does it. Collective, but for ``sync``."""
        if self._trainer is not None:
            self._trainer.synchronize()

    @one_call("ModelParallel.parameters")
    def parameters(self) -> dict[str, Any]:
        """The whole parameters: name -> new array, on every rank. The model has them, too, afterwards. Collective."""
        self.synchronize()
        whole = self._joined(self._mine, "ModelParallel.parameters")
        for name, w in self.model.parameters.items():
            w[...] = whole[name]
        return whole

    def _joined(self, arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Whole arrays, of every rank's parts in the first replica."""
        kept = self.replica == 0
        mine = {name: w for name, w in arrays.items() if kept and self.rank in self._parts[name].keepers}
        everyone = allgather(self.comm, (self.rank, mine), where)
        by_rank: dict[int, dict[str, Any]] = {}
        for rank, theirs in everyone:
            by_rank.setdefault(rank, {}).update(theirs)
        whole: dict[str, Any] = {}
        for name, w in self.model.parameters.items():
            each = self._parts[name]
            parts = [by_rank[rank].get(name, np.empty_like(each.of(w, rank))) for rank in each.keepers]  # empty parts
            whole[name] = np.array(each.join(parts))
        return whole

    def state_dict(self) -> dict[str, Any]:
        """All that a trainer of the same model and optimizer needs to go on, under any placement. Collective.

        ``parameters`` and ``optimizer`` (slot -> name -> array) are whole, the same on all ranks; ``steps``.
        Residuals of a compression between replicas are not in it.
        """
        where = "ModelParallel.state_dict"
        parameters = self.parameters()
        slots = {} if self._trainer is None else self._trainer.live()["optimizer"]
        return {
            "parameters": parameters,
            "optimizer": {slot: self._joined(slots.get(slot, {}), where) for slot in self._given.slots},
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``, of the same model and optimizer; the placement may be another. Collective.

        Raises ValueError on all ranks, before anything is changed, where names, shapes or slots are others.
        """
        where = "ModelParallel.load_state_dict"
        jointly(self.comm, where, lambda: self._check_state(state, where), (ValueError,))
        for name, w in self.model.parameters.items():
            w[...] = state["parameters"][name]
        live = {} if self._trainer is None else self._trainer.live()["optimizer"]
        for name, w in self._mine.items():
            w[...] = self._parts[name].of(state["parameters"][name], self.rank)
            for slot in self._given.slots:
                live[slot][name][...] = self._parts[name].of(state["optimizer"][slot][name], self.rank)
        self.steps = int(state["steps"])

    def _check_state(self, state: Mapping[str, Any], where: str) -> None:
        wanted = {name: w.shape for name, w in self.model.parameters.items()}
        if set(state["optimizer"]) != set(self._given.slots):
            raise ValueError(
                f"{where}: the optimizer keeps {sorted(self._given.slots)}; state has {sorted(state['optimizer'])}"
            )
        for what, arrays in (("parameters", state["parameters"]), *state["optimizer"].items()):
            shapes = {name: np.shape(w) for name, w in arrays.items()}
            if shapes != wanted:
                raise ValueError(f"{where}: {what} must be of shapes {wanted}; got {shapes}")

    def explain(self) -> str:
        """Who has what, and for each conversion its bytes and this rank's waits; see ``bitring.explain``.

        Bytes are those out of the rank that sends most, for the last batch; before the first step, for one of 64.
        """
        samples, traffic = self._traffic()
        waits = {number: seconds / max(self.steps, 1) for number, seconds in self._waited.items()}
        words = f"{self._chosen!r}, {self.ranks} ranks, {self.replicas} replicas, {samples} samples each"
        return explained(words, self.placed, self._parts, traffic, waits)

    def _traffic(self) -> tuple[int, Traffic]:
        """The samples of a replica in the last batch, or in one of 64, and what a step of these sends."""
        samples = -(-(self._samples or 64) // self.replicas)
        return samples, self._predicted(self._chosen, samples)

    def picture(self) -> Picture:
        """What a picture of the placement shows, for the last batch."""
        samples, traffic = self._traffic()
        return Picture(self.placed, [self._shapes[each.node.name][-1] for each in self.placed], samples, traffic)

    def free(self) -> None:
        """Free plans and communicators. Collective; the parameters stay as they are."""
        self._free()

    def _free(self) -> None:
        if self._trainer is not None:
            self._trainer.free()
        self._trainer = None
        assert self._sums is not None
        self._sums.free()
        self._across.Free()
