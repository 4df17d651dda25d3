"""What travels encoded of a store: nothing is lost, and readers of one edition hold the same bits."""

from typing import Any

import numpy as np
import pytest

import bitring
from bitring.collectives.runtime.objects import allgather
from bitring.compression.compressor import compressors
from bitring.settings import make
from bitring.training.store.codec import Codec, Editions, Pushes
from bitring.training.store.layout import Layout
from bitring.training.store.packing import Form, Piece, pack, unpack


@pytest.mark.single
@pytest.mark.parametrize("name", ["onebit:block=64", "onebit:block=64,levels=row", "topk:density=0.1", "float16"])
def test_readers_of_an_edition_hold_the_same_bits_whatever_their_way(name: str):
    encoder: Any = make(name, compressors)
    rng = np.random.default_rng(0)
    w = {"w": rng.standard_normal((30, 8)).astype(np.float32), "small": np.zeros(3)}
    codec = Codec(Layout(w, 1, False), dict.fromkeys(w, encoder))
    shard = {0: w["w"].copy(), 1: w["small"].copy()}
    editions = Editions(codec, 0, shard)
    first = {number: x.copy() for number, x in shard.items()}
    readers = {step: ({n: x.copy() for n, x in first.items()}, 0) for step in (1, 2, 3, 20)}  # by how often they read
    for version in range(1, 41):
        shard[0] += rng.standard_normal((30, 8)).astype(np.float32)
        shard[1] += 1
        for often, (values, edition) in readers.items():
            if version % often and version < 40:
                continue
            pieces, changes = editions.answer(edition, version)
            for piece in unpack(pack(pieces)):
                if piece.form == Form.ENCODED:
                    codec.decode(piece, 0, values[piece.parameter].reshape(-1), accumulate=changes)
                else:
                    values[piece.parameter].reshape(-1)[...] = piece.data.view(values[piece.parameter].dtype)
            readers[often] = values, editions.number
            assert all((values[n] == editions.known[n]).all() for n in shard), f"version {version}, every {often}"
    assert (editions.known[1] == shard[1]).all()  # too small to be encoded
    assert np.abs(shard[0] - editions.known[0]).mean() < np.abs(shard[0] - first[0]).mean()


@pytest.mark.single
def test_what_a_dropped_push_took_from_the_residual_goes_back_and_its_gradient_is_dropped():
    rng = np.random.default_rng(1)
    w = {"w": np.zeros((32, 4))}
    layout = Layout(w, 2, False)
    codec = Codec(layout, {"w": bitring.OneBit(block=64)})
    pushes = Pushes(codec, layout)
    decoded, total = np.zeros((32, 4)), np.zeros((32, 4))
    for number in range(6):
        g = rng.standard_normal((32, 4))
        total += 0 if number % 2 else g
        for owner in (0, 1):
            for piece in pushes.pieces(owner, {0: g}, number, keep=True):
                if number % 2:
                    pushes.take_back(owner, number)
                else:
                    part = layout.parameters[0].part(owner)
                    codec.decode(piece, owner, decoded[part].reshape(-1), accumulate=True)
    assert np.allclose(decoded + pushes.residuals[0], total)
    pushes.settled(0, 5)
    pushes.settled(1, 5)
    before = pushes.residuals[0].copy()
    pushes.take_back(0, 4)  # it is not kept any more
    assert (pushes.residuals[0] == before).all()


@pytest.mark.single
def test_pieces_are_what_they_were():
    pieces = [
        Piece(3, None, np.arange(5, dtype=np.uint8), Form.ENCODED),
        Piece(0, np.array([4, 7]), np.arange(16, dtype=np.uint8)),
        Piece(1, np.array([], np.int64), np.arange(0, dtype=np.uint8)),
        Piece(2, None, np.arange(24, dtype=np.uint8), first=0),
        Piece(2, None, np.arange(12, dtype=np.uint8), first=7),
    ]
    for was, got in zip(pieces, unpack(pack(pieces)), strict=True):
        assert (was.parameter, was.form, was.first) == (got.parameter, got.form, got.first)
        assert (was.data == got.data).all()
        assert (was.rows is None and got.rows is None) or (was.rows == got.rows).all()
    assert unpack(pack([])) == []


@pytest.mark.single
@pytest.mark.parametrize("owners", [1, 2, 3, 7])
def test_shards_are_all_rows_once_and_about_equally_large(owners: int):
    w = {
        "a": np.zeros((100, 10)),
        "none": np.zeros((0, 5)),
        "b": np.zeros(40),
        "s": np.zeros(()),
        "c": np.zeros((9, 100)),
    }
    for whole in (False, True):
        layout = Layout(w, owners, whole)
        held = [0] * owners
        for owner in range(owners):
            for number, parameter, part in layout.of(owner):
                assert layout.parameters[number] is parameter
                held[owner] += (part.stop - part.start) * parameter.width
        assert sum(held) == sum(x.size for x in w.values())
        if not whole:
            assert max(held) - min(held) <= 2 * 100 + 2, held
        rows = np.array([0, 5, 50, 99])
        found = [rows[part] for _, part in layout.split(0, rows)]
        assert np.concatenate(found).tolist() == rows.tolist()


def test_encoded_updates_and_residuals_are_all_gradients(comm, agree):
    """SGD(lr=1) from 0: minus the shard is what was decoded; with what ranks still owe it is the sum of gradients."""
    w = {"w": np.zeros((64, 16))}
    mode = f"asynchronous:scale=none,servers={comm.size}"
    trainer = bitring.DataParallel(w, bitring.SGD(lr=1.0), comm=comm, mode=mode, compression=bitring.OneBit(block=64))
    total = np.zeros((64, 16))
    for step in range(9):
        g = np.random.default_rng((comm.rank, step)).standard_normal((64, 16))
        total += g
        trainer.step({"w": g})
    state = trainer.state_dict()
    owed = sum(allgather(comm, state["mode"]["residual"]["w"], "test"))
    agree(comm, np.allclose(owed - state["parameters"]["w"], sum(allgather(comm, total, "test"))))
    trainer.free()
