"""Which service a rank of a store has: the native one where that serves, else the one in Python."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitring.collectives.runtime.context import Context, context_of
from bitring.training.store import native_service
from bitring.training.store.codec import Codec
from bitring.training.store.copied_service import CopiedService, keepers_of
from bitring.training.store.layout import Layout
from bitring.training.store.lines import Send
from bitring.training.store.native_service import NativeOwner, NativeService
from bitring.training.store.owner import Owner
from bitring.training.store.replay import Record
from bitring.training.store.rule import Rule
from bitring.training.store.service import PortableService, Service
from bitring.training.store.shard import Shard
from bitring.training.store.table import Setup


def service_of(
    setup: Setup,
    context: Context,
    owners: Sequence[int],
    layout: Layout,
    codec: Codec,
    rule: Rule,
    record: Record | None,
) -> Service:
    """This rank's. ``rule``: of the shard that it owns, if any, which has done nothing yet."""
    optimizer, rank, size = setup.optimizer, context.rank, context.size
    values = {name: np.ascontiguousarray(w) for name, w in setup.values.items()}

    def shard(number: int) -> Shard:
        return Shard(layout, number, values, optimizer)

    if native_service.serves(setup, layout, codec):
        native = None
        if rank in owners:
            native = NativeOwner(shard(rank), setup.terms, rule.clocks, codec, rank, optimizer)
        return NativeService(context, owners, native)
    if setup.copies and size > 1:

        def owner_of(number: int, send: Send) -> Owner:
            return Owner(shard(number), Rule(setup.terms, size, clocks), codec, number, size, optimizer, send)

        clocks = list(rule.clocks)
        return CopiedService(context, owners, keepers_of(owners, context_of(setup.comm).nodes), owner_of, setup.what)
    service = PortableService(context, owners)
    if rank in owners:
        service.owner = Owner(shard(rank), rule, codec, rank, size, optimizer, service.post, record)
    return service
