"""Where a store's values are to live: in shared memory where that serves, else in shards reached by messages."""

from __future__ import annotations

from bitring.collectives.runtime.context import context_of
from bitring.training.store.messages import MessageTable
from bitring.training.store.shared import SharedTable, serves
from bitring.training.store.table import Setup, Table


def make_table(setup: Setup) -> Table:
    """A table of one of both kinds; by messages with ``servers``, ``copies``, encoders or a journal. Collective."""
    context_of(setup.comm).prepare(setup.what)
    return SharedTable(setup) if serves(setup) else MessageTable(setup)
