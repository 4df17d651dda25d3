"""Which service a rank of a store has: the native one where that serves, else the one in Python."""

from __future__ import annotations

from collections.abc import Sequence

from bitring.collectives.runtime.context import Context
from bitring.training.store import native_service
from bitring.training.store.codec import Codec
from bitring.training.store.layout import Layout
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
    shard: Shard | None,
    rule: Rule,
    record: Record | None,
) -> Service:
    """This rank's; ``shard``: the one that it owns, if any, by ``rule``, which has done nothing yet."""
    optimizer = setup.optimizer
    if native_service.serves(setup, layout):
        owner = None if shard is None else NativeOwner(shard, setup.terms, rule.clocks, optimizer)
        return NativeService(context, owners, owner)
    service = PortableService(context, owners)
    if shard is not None:
        post = service.post
        service.owner = Owner(shard, rule, codec, context.rank, context.size, optimizer, post, record)
    return service
