"""GradientAverager: the gradients of a module become their mean over all ranks, beside back-propagation or after it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.context import context_of, given_comm
from bitring.collectives.runtime.jointly import jointly, raise_everywhere
from bitring.collectives.runtime.objects import allgather
from bitring.compression.compressor import Compressor
from bitring.errors import MismatchError, uncopyable
from bitring.torch.broadcast import broadcast_tensors
from bitring.torch.bucket import Entry
from bitring.torch.buffers import Buffers
from bitring.torch.exchange import Exchange, overlap_pays
from bitring.torch.meeting import Meeting
from bitring.torch.options import BUCKET_BYTES, Options, describe
from bitring.torch.residuals import Kept, give, take
from bitring.torch.step import Step
from bitring.torch.sync_batchnorm import statistics_of
from bitring.torch.watched import Watched, sparse_names, state_tensors
from bitring.training.step.checks import difference
from bitring.training.step.meeting import hash_of


class GradientAverager:
    """Average the gradients of ``module``, a torch.nn.Module, over all ranks of ``comm``. Collective, as are its steps.

    All ranks' parameters and buffers take rank 0's values now. A step is ``with averager.batch(weight=len(x)):`` around
    the forward and backward pass: each rank's gradients are the mean over its ``weight`` samples; after it ``p.grad``
    is the mean over all ranks' samples, which any optimizer can use, and a view of the averager's memory.

    ``compression``: None for an exact exchange, a compressor's name such as "onebit" or "topk:density=0.001", or an
    instance. ``compression_for``: other compressors, by the parameters' names or patterns such as "*.bias"; a name goes
    before patterns, and of these the first that fits. Parameters with fewer values than one block of a compressor
    travel exactly.
    ``overlap``: whether gradients travel while back-propagation goes on; "auto" does so between nodes and from 8 MiB
    of gradients on. The gradients' bits do not depend on it.
    ``unused``: a gradient that is None on some ranks counts as zeros there, or with "error" raises. One that is None on
    all ranks stays None.
    ``sparse``: the sparse gradients of embeddings become dense, or with "gather" the rows of all ranks are gathered.
    ``buffers``: after each step buffers, such as the running statistics of batch normalisation, are rank 0's on all
    ranks ("broadcast"), the weighted mean ("mean"), or each rank's ("own").
    ``masters``: parameters' names -> float32 tensors, whose gradients are to be the means instead: gradients of 16 bits
    are converted before they are exchanged.
    ``scaler``: a GradScaler whose scale the losses are multiplied by. Only compressed exchanges need it: they are made
    in unscaled units. Where any rank has NaN or Inf all gradients become Inf then, so that all scalers skip the step.
    ``algorithm``: of the exact exchange. ``bucket_bytes``: the largest size of a bucket with several parameters.

    Raises on all ranks: a rank's bad arguments raise TypeError or ValueError there, and PeerError naming that rank on
    the others; MismatchError where the ranks' arguments differ.
    """

    def __init__(
        self,
        module: Any,
        *,
        comm: MPI.Intracomm | None = None,
        compression: Compressor | str | None = None,
        compression_for: Mapping[str, Compressor | str | None] | None = None,
        overlap: bool | str = "auto",
        unused: str = "zeros",
        sparse: str = "dense",
        buffers: str = "broadcast",
        masters: Mapping[str, Any] | None = None,
        scaler: Any = None,
        algorithm: str = "auto",
        bucket_bytes: int = BUCKET_BYTES,
        broadcast: bool = True,
    ) -> None:
        """``broadcast``: whether parameters and buffers take rank 0's values now."""
        self.step: Step | None = None
        """The step that is open."""
        self._ears = _Ears()
        self._opens = False
        self.passes = 1
        """So many backward() fill each gradient in a step."""
        self._hooks: list[Any] = []
        base = given_comm(comm, "GradientAverager")
        error: Exception | None = None
        watched: Any = None
        try:
            self._module = weakref.ref(_checked_module(module))
            self.options = Options(
                compression, compression_for, overlap, unused, sparse, buffers, algorithm, bucket_bytes
            )
            watched = Watched(module)
            self.options.require_known(watched.parameters)
            self.masters = _checked_masters(masters, watched)
            self.options.entries(watched, self.masters, set())
        except Exception as problem:  # whatever it is, the other ranks must not wait
            error = problem
        raise_everywhere(base, "GradientAverager", error)
        self.comm = Communicator(base).Dup()
        self.scaler = scaler
        self.steps = 0
        """Steps made, those without samples included."""
        self.means = 0
        """Steps that this object has made: a checkpoint does not change their number."""
        self.share = 0.0
        """This rank's part of the weight of the last step."""
        self._quiet = False  # in ``no_sync``
        self._watched: Watched | None = None
        self._kept = Kept()  # residuals, while there are no buckets
        self._absences: dict[tuple[float, ...], frozenset[str]] = {}
        self.meeting = Meeting(self.comm, "GradientAverager")
        self._lay_out(watched, *self._agreed(watched))
        if broadcast:
            broadcast_tensors(self.comm, list(state_tensors(self.module).values()), "GradientAverager", 0)

    def __reduce__(self) -> Any:
        raise uncopyable(self, "save_checkpoint keeps what it knows")

    # What it knows of the module

    @property
    def module(self) -> Any:
        """The module, while it lives."""
        return self._module()

    def _agreed(self, watched: Watched) -> tuple[list[Entry], dict[str, Any]]:
        """What is exchanged for what the module trains now, and the settings as plain data. Collective.

        Raises on all ranks, with nothing changed, where that is not the same, or cannot be exchanged.
        """
        left_out = sparse_names(self.module) if self.options.sparse == "gather" else set[str]()
        entries = jointly(self.comm, "GradientAverager", lambda: self.options.entries(watched, self.masters, left_out))
        mine = describe(entries, self.options, self.masters)
        everyone = allgather(self.comm, (mine, [entry.order for entry in entries]), "GradientAverager")
        for rank, (theirs, _) in enumerate(everyone):
            text = difference(theirs, everyone[0][0])
            if text is not None:
                raise MismatchError(f"GradientAverager: rank {rank} differs from rank 0: {text}")
        for i, orders in enumerate(zip(*(orders for _, orders in everyone), strict=True)):
            if len(set(orders)) > 1:  # views in memory's order would be of other values on other ranks
                entries[i] = entries[i]._replace(order=tuple(range(len(entries[i].shape))))
        return entries, mine

    def _lay_out(self, watched: Watched, entries: list[Entry], mine: dict[str, Any]) -> None:
        """Make the buckets for ``entries``, which all ranks have. Collective."""
        self.parameters = watched.trained
        exchanged = {entry.name for entry in entries}
        self.gathered = [name for name in watched.trained if name not in exchanged]
        self.exchange = Exchange(self.comm, entries, self.options.algorithm, self.options.bucket_bytes)
        self.buffers = (
            None
            if self.options.buffers == "own"
            else Buffers(self.comm, self.module, self.options.buffers, self.options.bucket_bytes)
        )
        self.statistics = statistics_of(self.module)
        nodes = context_of(self.comm).topology.nodes
        asked = self.options.overlap
        self.overlaps = self.comm.Get_size() > 1 and (
            overlap_pays(self.exchange, nodes) if asked == "auto" else bool(asked)
        )
        """Whether gradients travel while back-propagation goes on."""
        self.settings = hash_of(repr(mine))
        self.in_buckets = [[watched.trained[name] for name in bucket.names] for bucket in self.exchange.buckets]
        self.targets_in = [[self.target(name) for name in bucket.names] for bucket in self.exchange.buckets]
        self.targets = [*self.parameters.values(), *self.masters.values()]
        """The tensors whose gradients a step changes."""
        for hook in self._hooks:
            hook.remove()
        places = {name: number for number, bucket in enumerate(self.exchange.buckets) for name in bucket.names}
        self.names = list(self.parameters)
        self._hooks = [
            p.register_post_accumulate_grad_hook(_arrival(self._ears, number, places.get(name, -1)))
            for number, (name, p) in enumerate(self.parameters.items())
        ]
        self._watched = watched

    def listen(self) -> None:
        """Have back-propagation tell whom it concerns when a gradient is complete."""
        if self._quiet:
            self._ears.heard = None
        elif self.step is not None:
            self._ears.heard = self.step.arrived
        else:
            self._ears.heard = _opener(weakref.ref(self)) if self._opens else None

    def open_by_itself(self) -> None:
        """From now on the first gradient opens a step where none is, as in a loop without blocks."""
        self._opens = True
        self.listen()

    def refresh(self) -> None:
        """Follow what has become of the module: parameters frozen or not, of another dtype. Collective where it has.

        Raises on all ranks where they do not agree on it; once they do, training goes on.
        """
        if self._watched is not None and self._watched.unchanged:
            return
        watched = Watched(self.module)
        agreed = self._agreed(watched)
        if self._watched is not None:
            self._kept = take(self.comm, self.exchange)
            self._watched = None  # until all below has been made
            self._free_buckets()
        self._lay_out(watched, *agreed)
        give(self.exchange, self._kept)
        self._kept = Kept()

    def _free_buckets(self) -> None:
        self.exchange.free()
        if self.buffers:
            self.buffers.free()

    # Steps

    def batch(self, weight: float = 1.0) -> Step:
        """For ``with``: the forward and backward pass of this rank's batch of ``weight`` samples. Collective.

        The gradients of the batch, the mean over its samples, are added to those there are, as backward() does, and
        the sums averaged, weighted by all ranks' ``weight``, when the block ends. One backward() may fill each gradient
        in a block; others before it go into ``no_sync``. A batch without samples has weight 0: its gradients are not
        looked at. Where all have weight 0 all gradients are None.

        An exception in the block ends the step on all ranks: it goes on here, and the others raise PeerError with its
        text; gradients and residuals are as before the block then. A compressed step without ``scaler`` raises
        NonFiniteError on all ranks when a gradient holds NaN or Inf on any; an exact one passes them on.
        """
        return Step(self, weight, "batch", may_overlap=True)

    def average(self, weight: float = 1.0) -> None:
        """Average the gradients that there are, the mean over this rank's ``weight`` samples. Collective.

        What ``batch`` does at its end. Raises as it does.
        """
        with Step(self, weight, "average", may_overlap=False):
            pass

    @contextlib.contextmanager
    def no_sync(self) -> Generator[None]:
        """For ``with``: backward() adds to the gradients, and nothing is exchanged. Also inside ``batch``."""
        before, self._quiet = self._quiet, True
        self.listen()
        try:
            yield
        finally:
            self._quiet = before
            self.listen()

    def count(self, share: float) -> None:
        """A step is made, in which this rank had ``share`` of the weight."""
        self.steps += 1
        self.means += 1
        self.share = share

    @property
    def bytes_sent(self) -> int:
        """Payload bytes of gradients that this rank has sent to others."""
        return self.exchange.bytes_sent

    def residuals(self) -> Kept:
        """What compressed exchanges carry from step to step, by parameter; for ``give_residuals``. Collective."""
        self._require_no_step("residuals")
        return take(self.comm, self.exchange)

    def give_residuals(self, kept: Kept) -> None:
        """Go on with what ``residuals`` returned, of the same parameters, perhaps on other ranks."""
        self._require_no_step("give_residuals")
        give(self.exchange, kept)

    def free(self) -> None:
        """Free plans, memory and communicator. Collective; gradients that are views stay as they are."""
        self._require_no_step("free")
        if self.comm == MPI.COMM_NULL:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._free_buckets()
        self.meeting.free()
        self.comm.Free()

    def _require_no_step(self, call: str) -> None:
        if self.step is not None:
            raise RuntimeError(
                f"GradientAverager.{call}: called inside a step, which is under way; call it after its end"
            )

    def target(self, name: str) -> Any:
        """The tensor whose gradient becomes the mean."""
        return self.masters.get(name, self.parameters[name])

    def absent_everywhere(self, mine: list[str], hashes: tuple[float, ...]) -> frozenset[str]:
        """Names of the parameters that have no gradient on any rank. Collective where a rank lacks some."""
        if not any(hashes):
            return frozenset()
        if all(each == hashes[0] for each in hashes):
            return frozenset(mine)
        if hashes not in self._absences:
            everyone: list[list[str]] = allgather(self.comm, mine, "GradientAverager")
            self._absences[hashes] = frozenset.intersection(*map(frozenset, everyone))
        return self._absences[hashes]


class _Ears:
    """Whom the hooks of parameters tell: a function of the parameter's number and its bucket's, or nobody."""

    __slots__ = ("heard",)

    def __init__(self) -> None:
        self.heard: Callable[[int, int], None] | None = None


def _arrival(ears: _Ears, number: int, bucket: int) -> Callable[[Any], None]:
    def arrival(_: Any) -> None:
        heard = ears.heard
        if heard is not None:
            heard(number, bucket)

    return arrival


def _opener(averager: weakref.ref[GradientAverager]) -> Callable[[int, int], None]:
    def opened(number: int, bucket: int) -> None:
        me = averager()
        if me is not None:
            step = Step(me, 1.0, "backward", may_overlap=True)
            step.__enter__()
            step.arrived(number, bucket)

    return opened


def _checked_module(module: Any) -> Any:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"GradientAverager: module must be a torch.nn.Module; got {type(module).__name__}")
    return module


def _checked_masters(masters: Mapping[str, Any] | None, watched: Watched) -> dict[str, Any]:
    taken = dict(masters or {})
    for name, master in taken.items():
        p = watched.parameters.get(name)
        if p is None:
            raise ValueError(f"GradientAverager: masters: no parameter is named {name!r}")
        if master.shape != p.shape or master.device != p.device:
            raise ValueError(
                f"GradientAverager: masters: {name!r} must be of shape {tuple(p.shape)} on {p.device}, as the "
                f"parameter is; got {tuple(master.shape)} on {master.device}"
            )
    return taken
