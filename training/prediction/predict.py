"""Seconds per step of synchronous data-parallel training, predicted for every way to exchange the gradients.

The exact exchange costs what ``collectives.schedules.cost`` finds for the schedules that run, the compressed one what
``compression.exchange.owner_schedule`` does; both bucket by bucket, as ``DataParallel`` packs them. With C seconds to
compute gradients, A to agree on the step, and for bucket k P_k to check and pack, T_k to exchange and U_k to update:

    packed_k  = max(packed_{k−1}, ready_k) + P_k
    there_k   = max(there_{k−1}, packed_k) + T_k         exchanges take turns on the wire
    updated_k = max(updated_{k−1}, there_k) + U_k        the first after all are packed; the last ends the step

where ready_k is C + A, or with ``overlap`` when back-propagation has made the bucket's gradients. With less than 8 MiB
of gradients, or 256 KiB between nodes, a bucket's exchange begins when all are packed and the one before is updated.
Where a rank has no second core, its processor's work does not overlap: a step takes at least C + A and all encoding,
decoding, packing, updating, and what its processor does to send, receive and sum through the node's memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bitring.compression.exchange.layout import lay_out, segment_length
from bitring.compression.exchange.owner_schedule import Times, encoders, flat_name, owner_seconds
from bitring.models.architecture import LayerTable
from bitring.training.prediction.cluster import Cluster, Machine
from bitring.training.prediction.network import ITEMSIZE, Network
from bitring.training.step.bucket_sizes import BucketSizes, Size, bucket_sizes, largest_bucket, overlaps

BUCKET_BYTES = 25 << 20
BACKWARD = 2.0  # times the operations of the way forward

CHECK, PACK, UPDATE = 4 / 32, 8 / 32, 20 / 32
"""Parts of what a step does beside exchanging: NaN check; scaling into the bucket; SGD with momentum. By the
bytes that they move."""

RANK = 4
"""Of PowerSGD's factors; 2 to 4 is what its paper recommends."""


@dataclass(frozen=True)
class Prediction:
    """A way to exchange, and what a step with it takes, in seconds.

    ``exchange``: ``"exact"``, ``"mpi"`` or a compressor's name; ``how``: by which algorithm. ``nbytes``: sent by a rank
    in a step, to its own node's ranks as well; ``leaving``: sent by a node to others. ``encode``, ``wire``, ``decode``:
    of one rank, which overlap; all that powersgd computes is ``encode``. ``exposed``: the time that the exchange adds
    to a step. ``seconds``: of a step. ``speedup``: over ``exact``. ``lossless``: the sum is exact up to rounding.
    ``measured``: the kernels' speeds are.
    """

    exchange: str
    how: str
    nbytes: float
    leaving: float
    encode: float
    wire: float
    decode: float
    exposed: float
    seconds: float
    speedup: float = 1.0
    lossless: bool = False
    measured: bool = True


def predict(
    layers: Sequence[LayerTable],
    cluster: Cluster,
    machine: Machine,
    *,
    batch: int = 32,
    compute: float | None = None,
    overlap: bool = False,
) -> list[Prediction]:
    """A prediction for each exchange that there is, ``exact`` first.

    ``batch``: samples per rank in a step. ``compute``: a rank's seconds for the gradients; by default, from the
    layers' multiply-adds and the machine's speed. ``overlap``: buckets are exchanged as back-propagation completes
    them; ``DataParallel.step`` begins when all gradients are there, which is the default. Raises ValueError for no
    layers, and numbers that are out of range.
    """
    if not layers or batch < 1 or (compute is not None and not 0 <= compute < math.inf):
        raise ValueError(
            f"predict: expected layers, batch >= 1 and compute >= 0; got {len(layers)} layers, batch {batch}, "
            f"compute {compute}"
        )
    step = _Step(layers, cluster, machine, batch, compute, overlap)
    found: list[Prediction] = []
    for name in ("exact", "mpi", *encoders.names(), "powersgd", "sufficient_factors"):
        predicted = step.predict(name)
        if predicted is not None:
            found.append(dataclasses.replace(predicted, speedup=(found or [predicted])[0].seconds / predicted.seconds))
    return found


def exchange_seconds(
    layer: LayerTable, cluster: Cluster, machine: Machine, batch: int, exchanges: Iterable[str]
) -> dict[str, float]:
    """Seconds to exchange the first of a layer's parameters alone, by each of ``exchanges`` that would be used for it.

    A rank's own product of its factors is no part of them: it is back-propagation's, wherever it is made.
    Names are those of ``predict``: "exact", an encoder's, "sufficient_factors"; and "row_owners".
    ``batch``: samples per rank in a step.
    """
    alone = dataclasses.replace(layer, parameters=layer.parameters[:1])
    step = _Step([alone], cluster, machine, batch, None, False)
    (name, values) = next(iter(step.values.items()))
    found: dict[str, float] = {}
    for exchange in exchanges:
        costing = step._costing(exchange)
        if costing is None or (costing.block is not None and values < costing.block):
            continue
        kind = None if costing.block is None else exchange
        found[exchange] = step.alone(costing.exchange(BucketSizes((name,), kind)))
    return found


class _Exchange(NamedTuple):
    """Of one bucket: its times, the bytes that a rank sends, those that leave its node, and by what. ``moving``: what a
    rank's processor has to do with the bytes, in seconds.
    """

    times: Times
    nbytes: float
    leaving: float
    how: str
    moving: float


class _Costing(NamedTuple):
    """The costs of ``exchange`` for buckets; those with parameters of ``block`` values or more are compressed."""

    exchange: Callable[[BucketSizes], _Exchange]
    block: int | None = None
    lossless: bool = False
    measured: bool = True


class _Step:
    """A step's parts, for any exchange."""

    def __init__(
        self,
        layers: Sequence[LayerTable],
        cluster: Cluster,
        machine: Machine,
        batch: int,
        compute: float | None,
        overlap: bool,
    ) -> None:
        self.layers, self.cluster, self.machine = layers, cluster, machine
        self.batch, self.overlap = batch, overlap
        self.network = Network(cluster, machine)
        self.shapes = {name: shape for layer in layers for name, shape in layer.parameters}
        self.values = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.layer_of = {name: i for i, layer in enumerate(layers) for name, _ in layer.parameters}
        operations = 2 * (1 + BACKWARD) * batch * sum(layer.multiply_adds for layer in layers)
        self.compute = operations / machine.flops if compute is None else compute
        self.sharing = cluster.ranks if machine.emulated else cluster.ranks_per_node
        alone = self.sharing == 1
        self.step, self.powersgd = (
            (machine.step, machine.powersgd) if alone else (machine.step_together, machine.powersgd_together)
        )
        self.second_core = machine.cores >= 2 * self.sharing

    def predict(self, name: str) -> Prediction | None:
        """The prediction for one exchange; None where it would not be used at all."""
        costing = self._costing(name)
        if costing is None:
            return None
        sizes = {name: Size("", count, count * ITEMSIZE) for name, count in self.values.items()}
        nbytes = largest_bucket(BUCKET_BYTES, self._nbytes(sizes), self.cluster.nodes)
        compressed = {each: costing.block is not None and count >= costing.block for each, count in self.values.items()}
        buckets = bucket_sizes(sizes, {each: name if yes else None for each, yes in compressed.items()}, nbytes)
        exchanges = [costing.exchange(bucket) for bucket in buckets]
        alone = self._timeline(buckets, [_Exchange(Times(0.0, 0.0, 0.0, 0.0), 0.0, 0.0, "", 0.0)] * len(buckets), 0.0)
        seconds = self._timeline(buckets, exchanges, self.meeting)
        largest = max(range(len(buckets)), key=lambda k: self._nbytes(buckets[k].names))
        return Prediction(
            name,
            exchanges[largest].how,
            sum(each.nbytes for each in exchanges),
            sum(each.leaving for each in exchanges),
            sum(each.times.encode for each in exchanges),
            sum(each.times.wire for each in exchanges),
            sum(each.times.decode for each in exchanges),
            seconds - alone,
            seconds,
            lossless=costing.lossless,
            measured=costing.measured,
        )

    @property
    def meeting(self) -> float:
        """Seconds of an AllReduce of some bytes."""
        return 2 * math.ceil(math.log2(self.cluster.ranks)) * self.network.alpha

    def alone(self, exchange: _Exchange) -> float:
        """Seconds of an exchange with nothing beside it."""
        times = exchange.times
        if self.second_core:
            return times.total
        return max(times.total, times.encode + times.decode + exchange.moving)

    def _costing(self, name: str) -> _Costing | None:
        if name == "exact":
            return _Costing(self._exactly, lossless=True)
        if name == "mpi":
            return _Costing(self._library, lossless=True)
        if name == "powersgd":
            return _Costing(self._powersgd)
        if name == "sufficient_factors":
            used = self.cluster.ranks > 1 and any(self._factored(layer) for layer in self.layers)
            return _Costing(self._sufficient_factors, lossless=True) if used else None
        if name == "row_owners":
            return _Costing(self._row_owners, lossless=True) if any(layer.factors for layer in self.layers) else None
        return self._owners(name)

    def _timeline(self, buckets: Sequence[BucketSizes], exchanges: Sequence[_Exchange], agree: float) -> float:
        """The module's recursion: from the step's begin to its last update."""
        seconds = [
            self.step * sum(self.values[name] for name in bucket.names) + self.machine.step_array * len(bucket.names)
            for bucket in buckets
        ]
        packed = 0.0 if self.overlap else self.compute + agree + CHECK * sum(seconds)
        starts: list[float] = []
        for bucket, second in zip(buckets, seconds, strict=True):
            if self.overlap:
                packed = max(packed, self._ready(bucket) + agree) + CHECK * second
            packed += PACK * second
            starts.append(packed)
        beside = overlaps(self._nbytes(self.values), self.cluster.nodes)
        there, updated = 0.0, packed
        for start, exchange, second in zip(starts, exchanges, seconds, strict=True):
            there = max(there, start if beside else updated) + exchange.times.total
            updated = max(updated, there) + UPDATE * second
        if self.second_core:
            return updated
        work = sum(each.times.encode + each.times.decode + each.moving for each in exchanges)
        return max(updated, self.compute + agree + sum(seconds) + work)

    def _ready(self, bucket: BucketSizes) -> float:
        """Seconds until back-propagation, last layer first, has made the bucket's gradients."""
        first = min(self.layer_of[name] for name in bucket.names)
        work = sum(layer.multiply_adds for layer in self.layers) or 1
        done = sum(layer.multiply_adds for layer in self.layers[first:])
        return self.compute * (1 + BACKWARD * done / work) / (1 + BACKWARD)

    def _nbytes(self, names: Iterable[str]) -> int:
        return ITEMSIZE * sum(self.values[name] for name in names)

    def _share(self, size: int) -> float:
        return 2 * (size - 1) / size

    def _wire_work(self, leaving: float) -> float:
        """A rank's processor time for its part of the bytes that leave its node."""
        return self.machine.wire_work * leaving / self.cluster.ranks_per_node

    # Exchanges of a bucket

    def _exact(self, nbytes: int) -> _Exchange:
        return self._all_reduced(nbytes, *self.network.exact(nbytes))

    def _exactly(self, bucket: BucketSizes) -> _Exchange:
        return self._exact(self._nbytes(bucket.names))

    def _library(self, bucket: BucketSizes) -> _Exchange:
        nbytes = self._nbytes(bucket.names)
        return self._all_reduced(nbytes, *self.network.library(nbytes))

    def _all_reduced(self, nbytes: int, seconds: float, how: str) -> _Exchange:
        cluster, network = self.cluster, self.network
        leaving = network.sent(how, cluster.nodes) * nbytes
        # Ranks that share a node send each other as much as lanes do, whatever goes on between nodes.
        sent = leaving if cluster.ranks == cluster.nodes else self._share(cluster.ranks) * nbytes
        moving = seconds if network.inside else network.node_seconds(nbytes) + self._wire_work(leaving)
        return _Exchange(Times(0, seconds, 0, seconds), sent, leaving, how, moving)

    def _owners(self, name: str) -> _Costing:
        """An encoder's. On several nodes the ranks of each first sum exactly, and each exchanges a lane of the sum."""
        encoder, machine, network = encoders.get(name)(), self.machine, self.network
        between = not network.inside and self.cluster.ranks_per_node > 1
        among, lanes = (self.cluster.nodes, self.cluster.ranks_per_node) if between else (self.cluster.ranks, 1)
        some = 1 << 20
        (kernel, measured), (of_flat, found) = (
            machine.kernel(each, encoder.expected_nbytes(some) / some, self.sharing, self.overlap)
            for each in (name, flat_name(name, encoder))
        )
        if not found:
            of_flat = kernel

        def exchange(bucket: BucketSizes) -> _Exchange:
            if not bucket.compressed:
                return self._exactly(bucket)
            n = sum(self.values[each] for each in bucket.names)
            layout = lay_out(encoder, [self.shapes[each] for each in bucket.names], among)
            flat = sum(piece.stop - piece.start for piece in layout.pieces if piece.encoder == encoder)
            payload = layout.expected_nbytes
            chunk = -(-n // (lanes * among))
            encode, decode = (
                (n - flat) * each + flat * each_flat for each, each_flat in zip(kernel, of_flat, strict=True)
            )
            times = owner_seconds(
                among,
                encode / lanes,
                decode / lanes,
                payload,  # of all lanes, which share the node's wire
                alpha=network.alpha,
                beta=network.beta,
                pieces=-(-chunk // segment_length(chunk, among, encoder.block)),
            )
            times = times._replace(total=times.total + self.meeting)  # before it, ranks tell each other how it goes
            sent = self._share(among) * payload / lanes
            if network.inside:
                return _Exchange(times, sent, 0.0, "owners", times.wire)
            leaving = sent * lanes
            moving = self._wire_work(leaving)
            if not between:
                return _Exchange(times, sent, leaving, "owners", moving)
            inside = network.node_seconds(ITEMSIZE * n)
            times = times._replace(wire=times.wire + inside, total=times.total + inside)
            sent += self._share(lanes) * ITEMSIZE * n
            return _Exchange(times, sent, leaving, "node sums, owners", moving + inside)

        return _Costing(exchange, encoder.block, measured=measured)

    def _powersgd(self, bucket: BucketSizes) -> _Exchange:
        """Two exact sums, of the factors P (rows × rank) and Q (columns × rank) of all matrices; the rest exactly."""
        shapes = {name: self.shapes[name] for name in bucket.names}
        sides = {name: (shape[0], self.values[name] // shape[0]) for name, shape in shapes.items() if len(shape) > 1}
        sides = {name: side for name, side in sides.items() if RANK * sum(side) < self.values[name]}
        first, second = (ITEMSIZE * RANK * sum(side[i] for side in sides.values()) for i in (0, 1))
        first += self._nbytes(name for name in bucket.names if name not in sides)
        sums = [self._exact(first), self._exact(second)]
        work = self.powersgd * sum(self.values[name] for name in sides) + self.machine.powersgd_array * len(sides)
        wire = sum(each.times.total for each in sums)
        return _Exchange(
            Times(work, wire, 0.0, work + wire),
            sum(each.nbytes for each in sums),
            sum(each.leaving for each in sums),
            f"rank {RANK}, {sums[0].how}",
            sum(each.moving for each in sums),
        )

    def _factored(self, layer: LayerTable) -> int:
        """Bytes of a rank's u and v, where all ranks' are fewer to send than the gradient; else 0."""
        if not layer.factors:
            return 0
        rows, columns = layer.parameters[0][1]
        nbytes = ITEMSIZE * self.batch * layer.factors * (rows + columns)
        p = self.cluster.ranks
        return nbytes if (p - 1) * nbytes < self._share(p) * ITEMSIZE * rows * columns else 0

    def _sufficient_factors(self, bucket: BucketSizes) -> _Exchange:
        """Each rank's factors to all, which multiply them; layers with none, or too many, exactly."""
        p = self.cluster.ranks
        mine = {self.layers[self.layer_of[name]].parameters[0][0]: self.layer_of[name] for name in bucket.names}
        factored = {name: self.layers[i] for name, i in mine.items() if name in bucket.names}
        factored = {name: layer for name, layer in factored.items() if self._factored(layer)}
        rest = self._exact(self._nbytes(name for name in bucket.names if name not in factored))
        nbytes = sum(self._factored(layer) for layer in factored.values())
        gathering = self.network.allgather(nbytes) if factored else 0.0
        wire = rest.times.total + gathering
        leaving = 0.0 if self.network.inside else float((p - 1) * nbytes)
        moving = rest.moving + (gathering if self.network.inside else self._wire_work(leaving))
        # A rank's own product is part of its back-propagation, wherever it is made.
        products = sum(2 * (p - 1) * self.batch * layer.factors * self.values[name] for name, layer in factored.items())
        decode = products / self.machine.flops
        count = sum(1 for layer in self.layers if self._factored(layer))
        how = f"factors of {count} layer{'s' * (count > 1)}"
        return _Exchange(
            Times(0, wire, decode, wire + decode),
            rest.nbytes + (p - 1) * nbytes,
            rest.leaving + leaving,
            how,
            moving,
        )

    def _row_owners(self, bucket: BucketSizes) -> _Exchange:
        """One weight: v to all, columns of u to the owners of the rows, and the rows to all.

        An owner multiplies a p-th of all products, as much as its own product in back-propagation would have been.
        """
        p, (name,) = self.cluster.ranks, bucket.names
        rows, columns = self.shapes[name]
        samples = self.batch * self.layers[self.layer_of[name]].factors
        v, u, product = (ITEMSIZE * count for count in (samples * columns, samples * rows / p, rows * columns / p))
        wire = (
            self.network.allgather(round(v)) + self.network.allgather(round(u)) + self.network.allgather(round(product))
        )
        sent = (p - 1) * (v + u + product)
        leaving = 0.0 if self.network.inside else sent
        moving = wire if self.network.inside else self._wire_work(leaving)
        return _Exchange(Times(0, wire, 0.0, wire), sent, leaving, "row owners", moving)
