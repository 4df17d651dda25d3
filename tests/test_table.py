"""The measured table: what is read from a file, what is kept of it, what it answers."""

from __future__ import annotations

import json
import logging
import re
import socket
from pathlib import Path

import pytest

from bitring.collectives.selection.table import (
    BUILT_IN,
    Rules,
    Table,
    crossovers,
    load_table,
    path_of_table,
    read_table,
    write_table,
)

pytestmark = pytest.mark.single


def rules(ranks=2, nodes=1, itemsize=4, resident=False, native=True, best=((0, "mpi"),), library="MPICH 5.0.2"):
    return Rules(library, ranks, nodes, itemsize, resident, native, best)


def test_a_table_comes_back_from_its_file(tmp_path: Path):
    path = tmp_path / "deep" / "table.json"
    table = Table((rules(), rules(4, 2, 8, True, False, ((0, "ring"), (7, "mpi"), (9, "ring")))))
    write_table(path, table)
    assert read_table(path) == table
    assert [each.name for each in path.parent.iterdir()] == ["table.json"]
    assert socket.gethostname() not in path.read_text()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.json"
    write_table(path, Table((rules(),)))

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_table(path, BUILT_IN)
    assert read_table(path) == Table((rules(),))
    assert [each.name for each in tmp_path.iterdir()] == ["table.json"]


GOOD = {"library": "x", "ranks": 2, "nodes": 1, "itemsize": 4, "resident": False, "native": True, "best": [[0, "mpi"]]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[1]", "it is not a table that bitring tune wrote"),
        ('{"learning_rate": 1}', "it is not a table that bitring tune wrote"),
        ('{"bitring table": 2, "rules": []}', "its version is 2, not 1"),
        ({**GOOD, "best": []}, r"the sizes in best must rise from 0; got \[\]"),
        ({**GOOD, "best": [[5, "mpi"]]}, r"must rise from 0; got \[5\]"),
        ({**GOOD, "best": [[0, "mpi"], [9, "ring"], [9, "mpi"]]}, r"must rise from 0; got \[0, 9, 9\]"),
        ({**GOOD, "best": [[0, "mpi"], ["9", "ring"]]}, "must rise from 0"),
        ({**GOOD, "best": [[0, "rign"]]}, "unknown algorithm 'rign'"),
        ({**GOOD, "best": 3}, "it is not a table"),
        ({**GOOD, "ranks": 0}, "ranks must be a whole number from 1 on; got 0"),
        ({**GOOD, "nodes": "1"}, "nodes must be a whole number from 1 on; got '1'"),
        ({**GOOD, "native": "no"}, "native must be true or false; got 'no'"),
        ({**GOOD, "colour": 1}, "it is not a table"),
        ({key: GOOD[key] for key in GOOD if key != "native"}, "it is not a table"),
    ],
)
def test_broken_files(tmp_path: Path, caplog: pytest.LogCaptureFixture, text, message: str):
    path = tmp_path / "table.json"
    path.write_text(text if isinstance(text, str) else json.dumps({"bitring table": 1, "rules": [text]}))
    with pytest.raises(ValueError, match=message):
        read_table(path)
    with caplog.at_level(logging.WARNING, "bitring"):
        assert load_table(path) == BUILT_IN
        assert load_table(path) == BUILT_IN
    (warning,) = caplog.messages
    assert str(path) in warning
    assert re.search(message, warning)


def test_no_file_is_nothing_to_warn_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert load_table(tmp_path / "none.json") == BUILT_IN
    (tmp_path / "folder.json").mkdir()
    assert not caplog.messages
    assert load_table(tmp_path / "folder.json") == BUILT_IN
    assert "folder.json is not used" in caplog.text


def test_merging_replaces_the_same_kind_alone():
    table = Table((rules(2), rules(4)))
    newer = [rules(4, best=((0, "ring"),)), rules(8), rules(4, resident=True)]
    assert table.merged(newer).rules == (rules(2), newer[0], newer[2], rules(8))
    other = rules(2, library="Open MPI 5.0.11")
    both = table.merged([other])
    assert both.of("MPICH 5.0.2") == table
    assert both.of("Open MPI 5.0.11") == Table((other,))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((2, 1, 4, False, True), (2, 1, 4, False)),
        ((3, 1, 4, False, True), (4, 1, 4, False)),  # by ratio
        ((1000, 1, 4, False, True), (4, 1, 4, False)),
        ((2, 1, 8, False, True), (2, 1, 4, False)),
        ((2, 1, 1, True, True), (2, 1, 2, False)),  # the width matters more than the place
        ((2, 1, 4, True, True), (2, 1, 4, True)),
        ((4, 2, 4, False, True), (16, 4, 4, False)),  # never one node for several
        ((2, 1, 4, False, False), None),
        ((4, 0, 4, False, True), None),
    ],
)
def test_the_nearest_that_was_measured(asked, found):
    kinds = [(2, 1, 4, False), (4, 1, 4, False), (2, 1, 4, True), (2, 1, 2, False), (16, 4, 4, False)]
    nearest = Table(tuple(rules(*kind) for kind in kinds)).nearest(*asked)
    assert nearest == (None if found is None else rules(*found))


def test_crossovers():
    assert crossovers({4: {"a": 1, "b": 2}}) == ((0, "a"),)
    measured = {
        4: {"a": 1.0, "b": 2.0},
        16: {"a": 1.1, "b": 1.0},
        64: {"a": 1.0, "b": 1.05},  # hardly better, and only for once: not worth a change
        256: {"a": 4.0, "b": 3.0},
        4096: {"a": 9.0, "b": 4.0, "c": 1.0},  # c was not measured everywhere
    }
    best = crossovers(measured)
    assert [name for _, name in best] == ["a", "b"]
    assert 4 < best[1][0] <= 256
    assert best[1][0] in (9, 33, 129)
    assert [start for start, _ in best] == sorted({start for start, _ in best})


def test_where_the_table_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("BITRING_TABLE", "here.json")
    assert path_of_table() == Path("here.json")
    monkeypatch.setenv("BITRING_TABLE", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert path_of_table() == tmp_path / "bitring" / "table.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of_table() == tmp_path / ".config" / "bitring" / "table.json"
