"""Training a model that is split between ranks, by layers, inside layers, or both; results do not depend on how.

What belongs together, in ``training/placement``:

- ``placement``, ``assignment``, ``stages``, ``parts``: which rank has what of each layer and parameter; ``split``:
  what this rank has of all that
- ``layout``, ``conversion``: how values lie on ranks, and what moves where; ``schedules``: pipelines as data
- ``wiring``, ``split_pass``: the passes of a step; ``step_hops``: what moves in it, ``native_messages`` and
  ``messages``: which carry it out; ``weight_gradients``: over micro-batches; ``shared_sums``: gradients of what several
  ranks have
- ``predicted``: what travels, in closed form; ``seconds``: how long a step takes; ``choosing``: what "auto" takes
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.interop.steps import Progress, Steps, within
from bitring.collectives.runtime.agreement import Request, agree
from bitring.collectives.runtime.context import context_of, given_comm, one_call
from bitring.collectives.runtime.jointly import jointly, raise_everywhere
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.collectives.runtime.tags import channel_of
from bitring.compression.compressor import Compressor
from bitring.compression.encoder import Encoder
from bitring.errors import MismatchError, NonFiniteError, uncopyable
from bitring.models.graph import INPUT, value_shapes
from bitring.models.model import Model
from bitring.settings import Range, checked
from bitring.training.choice import Choice
from bitring.training.mode import BaseMode, FreeMode, modes
from bitring.training.modes.sync import Sync
from bitring.training.optimizer import Elementwise, Optimizer, optimizers
from bitring.training.placement.assignment import assign
from bitring.training.placement.choosing import considered, links, seconds_of
from bitring.training.placement.explained import explained
from bitring.training.placement.layout import part
from bitring.training.placement.messages import Way, value_encoder
from bitring.training.placement.parts import parts_of
from bitring.training.placement.placement import Placement
from bitring.training.placement.predicted import Picture, Traffic
from bitring.training.placement.split import Replica, Split, predicted_of, refuse_mixing, wiring_of
from bitring.training.step.checks import chosen, text_of
from bitring.training.step.compression_for import chosen_compression
from bitring.training.whole_batch import digest


class ModelParallel:
    """Train ``model`` on all ranks of ``comm``, split as ``placement`` says. Making it is collective, as are all calls.

    model: a ``bitring.Model`` on the host, the same on all ranks; rank 0's parameters are taken. Each rank keeps its
    part of them; ``parameters`` puts them together, and gives them to the model too.
    optimizer: as for DataParallel; where parameters are cut it must work value by value, as SGD, AdaGrad and Adam do.
    placement: "data": every layer whole on all ranks, each with its samples. "hybrid": dense layers by columns and rows
    in turn, all else as "data"; "hybrid_in_turns": which take one rank's samples after the other's. A dict of layer ->
    "samples", "columns" or "rows" (dense layers), or a rank; layers are named as their parameters begin, or by a
    graph's names; those not named are as in "data", and layers without parameters follow the layer before. A
    ``Placement``: a pipeline. "auto": of "data", "hybrid" and pipelines the one that is predicted to take
    least time, by the first batch and by what the network between nodes was found to do.
    value_compression: an encoder of a fixed size that does not draw, such as "float16", by which values and their
    gradients travel inside a replica; what it leaves out is lost. None: as they are.
    replicas: so many groups of ranks, of one node where they can be, each with the whole model and its part of every
    batch. mode, compression: how gradients are averaged between replicas, see DataParallel; in "downpour" and the like
    each rank pushes and fetches its part alone. Inside a replica sums of gradients are exact.

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
        mode: BaseMode | str = "sync",
        compression: Compressor | Choice | str | None = None,
        value_compression: Encoder | str | None = None,
    ) -> None:
        self.comm = given_comm(comm, "ModelParallel")
        self.model, self.placement = model, placement
        self.steps = 0
        alike = (TypeError, ValueError)
        self._given = jointly(
            self.comm,
            "ModelParallel",
            lambda: self._checked(optimizer, replicas, mode, compression, value_compression),
            alike,
        )
        mine = repr([(name, w.shape, w.dtype) for name, w in model.parameters.items()])
        told = {"parameters": mine, "placement": repr(placement), "replicas": self.replicas, "mode": repr(mode)}
        told |= {"compression": repr(compression), "optimizer": repr(self._given)}
        told |= {"value_compression": repr(self.value_compression)}
        for rank, theirs in enumerate(allgather(self.comm, told, "ModelParallel")):
            for what, value in theirs.items():
                if value != told[what]:
                    text = f"{value} on rank {rank}, {told[what]} on rank {self.comm.Get_rank()}"
                    raise MismatchError(f"ModelParallel: {what} must be the same on all ranks; got {text}")
        context = context_of(self.comm)
        order = [rank for node in context.nodes for rank in node]  # replicas inside nodes, where they fit
        place = order.index(self.comm.Get_rank())
        self.replica, self.rank = divmod(place, self.ranks)
        numbers = tuple(order[self.replica * self.ranks : (self.replica + 1) * self.ranks])
        self._replica = Replica(self.comm, self.replica, self.replicas, numbers, self.rank)
        self._meets: MPI.Intracomm = self.comm
        """The ranks that make a step together: in modes in which each goes at its own pace, the replica's."""
        if self._free_mode:
            self._meets, numbers = Communicator(self.comm).Split(self.replica, self.rank), tuple(range(self.ranks))
            context = context_of(self._meets)
        channel, shapes, dtype = channel_of(context.new_plan()), self._shapes, model.dtype
        self._way = Way(context.comm, numbers, self.rank, channel, shapes, dtype, self.value_compression)
        self._nbytes_sent = 0
        self._waited: dict[int, float] = {}
        self._told = (0.0, 0)  # what telemetry had told of waits and bytes
        self._samples = 0
        self._considered: list[tuple[Any, float]] = []  # placements that "auto" chose from, with predicted seconds
        for w in model.parameters.values():
            Communicator(self.comm).Bcast(w, 0)
        self._undecided, self._freed = placement == "auto", False
        self._build("data" if placement == "auto" else placement)

    def _checked(self, optimizer: Any, replicas: Any, mode: Any, compression: Any, values: Any) -> Optimizer:
        """The optimizer; raises where an argument is wrong."""
        where = "ModelParallel"
        if not isinstance(self.model, Model):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{where}: model must be a bitring.Model; got {type(self.model).__name__}")
        if self.model.xp is not np:
            raise ValueError(f"{where}: model must be on the host (xp=numpy); arrays on a device are not split yet")
        self.mode: BaseMode = chosen("mode", mode, modes, BaseMode)
        self._free_mode = isinstance(self.mode, FreeMode)
        if isinstance(self.mode, FreeMode) and (self.mode.in_shared_memory or self.placement == "auto"):
            raise ValueError(
                f"{where}: placement='auto', and parameters in shared memory, need a mode in which all ranks make the "
                f"same steps; got {self.mode!r}"
            )
        self.compression: Compressor | Choice | None = chosen_compression(compression)
        self.value_compression = value_encoder(values)
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
        for placement in ("data", "hybrid") if self.placement == "auto" else (self.placement,):
            placed = assign(placement, self.model.nodes, self._shapes, self.ranks)
            cut = [name for name, each in parts_of(placed).items() if each.axis is not None and len(each.ranks) > 1]
            if cut and not isinstance(given, Elementwise):
                kind = type(given).__name__
                raise ValueError(f"{where}: optimizer must work value by value where {cut[0]} is cut; {kind} does not")
            refuse_mixing(wiring_of(placement, placed, self._shapes), 1 if self._free_mode else self.replicas)
        return given

    def _build(self, placement: Any) -> None:
        """Take this rank's part of the model's parameters, as placed. Collective."""
        settings = {"optimizer": self._given, "mode": self.mode, "compression": self.compression}
        self._split = Split(self._replica, self.model, self._way, placement, settings)

    def __reduce__(self) -> Any:
        raise uncopyable(self, "state_dict() has what it knows, as plain arrays and numbers, for load_state_dict")

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's settings. Others can be put here, the same on all ranks, which the next step checks."""
        return self._given

    @optimizer.setter
    def optimizer(self, given: Optimizer | str) -> None:
        made = chosen("optimizer", given, optimizers, Optimizer)
        if self._split.trainer is not None:
            self._split.trainer.optimizer = made
        self._given = made

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that this rank has sent to others so far, in steps."""
        between = 0 if self._split.trainer is None else self._split.trainer.bytes_sent
        return self._nbytes_sent + self._split.sums.nbytes_sent + between

    @one_call("ModelParallel.step")
    def step(self, x: Any, y: Any) -> float:
        """One training step on the batch x (N, *input_shape), y (N,): the same on all ranks. Returns its mean loss.

        The loss is the one before the update, on every rank. N may be 0, which changes nothing; parts may be empty. In
        modes such as "downpour" each replica makes steps of its own, with batches of its own.

        A rank's bad arguments raise TypeError or ValueError there and PeerError on the others, batches or settings that
        differ MismatchError, NaN or Inf in a gradient NonFiniteError on all. Parameters are then as before, and
        training may go on.
        """
        if self._freed:
            raise RuntimeError("ModelParallel.step: it has been freed")
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
        if self._undecided:
            self._agree(request)
            self._choose(count)
        self._samples = count
        mine = slice(0, count) if self._free_mode else part(count, self.replicas, self.replica)
        try:
            self._split.exchange(mine.stop - mine.start)
            if request.error is None:
                x, y = self._arranged(x[mine]), y[mine]
        except Exception as error:  # memory, or what the model's ``arrange`` raises
            request.error = request.error or error
        split = self._split
        self._split.passes.prepare(self.steps, mine.start)
        self._run(request, x, y)
        gradients = split.gradients()
        problem = split.passes.error
        if problem is None:
            bad = next((name for name, each in gradients.items() if not np.isfinite(each).all()), None)
            if bad is not None:
                problem = NonFiniteError(
                    f"{where}: the gradient of {bad} on rank {self.comm.Get_rank()} has NaN or Inf"
                )
        weight = mine.stop - mine.start
        everyone = allgather(self._meets, (split.passes.loss * weight, problem is not None), where)
        if any(wrong for _, wrong in everyone):
            raise_everywhere(self._meets, where, problem, alike=(NonFiniteError,))
        split.update(gradients, weight, where, self.compression is not None or self._given.may_raise)
        self.steps += 1
        return float(sum(loss for loss, _ in everyone) / max(count, 1))

    def _arranged(self, x: Any) -> Any:
        """This replica's samples as the first layer wants them."""
        if not len(x):
            return np.empty((0, *self._shapes[INPUT]), self.model.dtype)
        return self.model.arranged(x)

    def _agree(self, request: Request) -> None:
        context = context_of(self._meets)

        def steps(progress: Progress) -> Steps:
            yield from agree(context.comm, context.roll_call, request, progress)

        context.queue.call(steps, request.function)

    def _run(self, request: Request, x: Any, y: Any) -> None:
        """The passes, as one job of the communicator's."""
        context, split = context_of(self._meets), self._split
        context.prepare(request.function, request.error)

        def steps(progress: Progress) -> Steps:
            yield from agree(context.comm, context.roll_call, request, progress)
            hops, messages = split.exchange(len(y))
            passes = split.passes.run(x, y, hops, messages, progress)  # what overflows is found in the gradients
            yield from within(lambda: np.errstate(over="ignore", invalid="ignore"), passes)
            self._nbytes_sent += messages.nbytes_sent
            for number, seconds in messages.seconds.items():
                self._waited[number] = self._waited.get(number, 0.0) + seconds

        context.queue.call(steps, request.function)

    def _predicted(self, placement: Any, samples: int) -> Traffic:
        """What a step sends in a replica that gets so many samples."""
        return predicted_of(self.model, self._way, placement, self.replicas, samples)

    def _choose(self, samples: int) -> None:
        """Take the placement that is predicted to take the least time for such a batch. Collective."""
        each, places = -(-samples // self.replicas), considered(self.ranks)
        inside, between = links(self.comm, self._replica)
        arguments = self.replicas, each, inside, between
        seconds = [seconds_of(self.model, self._way, placement, *arguments) for placement in places]
        best = places[seconds.index(min(seconds))]
        self._considered = [(place, time) for place, time in zip(places, seconds, strict=True) if time < math.inf]
        if best != self._split.placement:
            loaded = self._split.whole.collected("ModelParallel.step") if self.steps else None
            self._split.free()
            self._build(best)
            if loaded is not None:
                self._split.whole.take(loaded, self.steps)
        self._undecided = False

    def telemetry(self) -> dict[str, Any]:
        """Times and losses of this rank's exchanges since the last call; empty where there were none.

        ``conversion_seconds``, which it waited for other ranks' values inside its replica, and ``conversion_bytes``,
        which it sent there; and of the exchange between replicas, what ``DataParallel.telemetry`` tells.
        """
        trainer = self._split.trainer
        between = {} if trainer is None else trainer.telemetry()
        waited, nbytes = sum(self._waited.values()), self._nbytes_sent
        before, self._told = self._told, (waited, nbytes)
        if (waited, nbytes) != before:
            between |= {"conversion_seconds": waited - before[0], "conversion_bytes": nbytes - before[1]}
        return between

    @one_call("ModelParallel.synchronize")
    def synchronize(self) -> None:
        """Make the replicas equal, as the mode does it. Collective, but for ``sync``."""
        self._split.synchronize()

    @one_call("ModelParallel.parameters")
    def parameters(self) -> dict[str, Any]:
        """The whole parameters: name -> new array, on every rank. The model has them, too, afterwards. Collective."""
        self.synchronize()
        whole: dict[str, Any] = self._split.whole.collected("ModelParallel.parameters", ("parameters",))["parameters"]
        for name, w in self.model.parameters.items():
            w[...] = whole[name]
        return whole

    def describe(self) -> dict[str, Any]:
        """The settings, as checkpoints keep them; ``placement`` and ``replicas`` may be others where it is loaded."""
        return {
            "parameters": {name: [w.dtype.name, list(w.shape)] for name, w in self.model.parameters.items()},
            "optimizer": text_of(self._given),
            "mode": text_of(self.mode),
            "compression": text_of(self.compression),
            "value_compression": text_of(self.value_compression),
            "placement": repr(self.placement),
            "replicas": self.replicas,
            "ranks": 1,  # of which a checkpoint has arrays: they are whole
        }

    @one_call("ModelParallel.state_dict")
    def state_dict(self) -> dict[str, Any]:
        """All that a trainer of the same model and optimizer needs to go on, under any placement. Collective.

        ``parameters``, ``optimizer`` and ``mode`` are trees of whole arrays, by name at their leaves, and of numbers,
        ``residuals`` what compressed exchanges between replicas still owe, by name; ``steps``. The same on all ranks.
        Replicas are made equal first, see ``synchronize``. Where each makes steps of its own, they are rank 0's.
        """
        where = "ModelParallel.state_dict"
        self.synchronize()
        self._split.whole.meet("state_dict")
        steps = broadcast(self.comm, self.steps, where)
        return {**self._split.whole.collected(where), "steps": steps}

    @one_call("ModelParallel.load_state_dict")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``, of the same model, optimizer and mode; the placement may be another. Collective.

        Raises on all ranks, before anything is changed: ValueError where names, shapes or slots are others; TypeError
        where it is no ``state_dict``, and PeerError on the other ranks.
        """
        where = "ModelParallel.load_state_dict"
        self._split.whole.meet("load_state_dict")
        jointly(self.comm, where, lambda: self._split.whole.require(state, where), (ValueError,))
        for name, w in self.model.parameters.items():
            w[...] = state["parameters"][name]
        self.steps = int(state["steps"])
        self._split.take(state, self.steps)

    def explain(self) -> str:
        """Who has what, and for each conversion its bytes and this rank's waits; see ``bitring.explain``.

        Bytes are those out of the rank that sends most, for the last batch; before the first step, for one of 64.
        """
        samples, traffic = self._traffic()
        waits = {number: seconds / max(self.steps, 1) for number, seconds in self._waited.items()}
        words = f"{self._split.placement!r}, {self.ranks} ranks, {self.replicas} replicas, {samples} samples each"
        for place, seconds in self._considered:
            words += f"\n  considered {place!r}: predicted {1e3 * seconds:.3g} ms a step"
        usual, split = (Sync(), None), self._split
        other = " and ".join(text_of(x) for x in (self.mode, self.compression) if x not in usual)
        return explained(words, split.wiring, split.parts, traffic, waits, split.by(samples), other)

    def _traffic(self) -> tuple[int, Traffic]:
        """The samples of a replica in the last batch, or in one of 64, and what a step of these sends."""
        samples = -(-(self._samples or 64) // (1 if self._free_mode else self.replicas))
        return samples, self._predicted(self._split.placement, samples)

    def picture(self) -> Picture:
        """What a picture of the placement shows, for the last batch."""
        samples, traffic = self._traffic()
        placed, wiring = self._split.placed, self._split.wiring
        words = {edge.number: wiring.in_words(edge) for edge, _, _ in traffic.edges}
        return Picture(placed, [self._shapes[each.node.name][-1] for each in placed], samples, traffic, words)

    def free(self) -> None:
        """Free plans and communicators. Collective, once; the parameters stay as they are."""
        if self._freed:
            return
        self._freed = True
        self._split.free()
        if self._meets is not self.comm:
            self._meets.Free()
