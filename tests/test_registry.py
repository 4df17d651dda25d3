"""Registered things are found by reading a folder."""

from pathlib import Path

import pytest

from bitring.collectives.algorithms.ring import Ring
from bitring.collectives.schedules.schedule import Algorithm, algorithms
from bitring.registry import Registry

pytestmark = pytest.mark.single

NAMES = {"binomial_tree", "double_binary_tree", "mpi", "rabenseifner", "recursive_doubling", "ring"}


def make(tmp_path: Path, **files: str) -> Registry[object]:
    for stem, text in files.items():
        (tmp_path / f"{stem}.py").write_text(text)
    return Registry("thing", "Thing", str(tmp_path))


def test_all_algorithms_are_found_by_their_files():
    assert set(algorithms.names()) >= NAMES
    assert algorithms.names() == sorted(algorithms.names())


# An id of "mpi" alone would be taken for pytest-mpi's marker.
@pytest.mark.parametrize("name", algorithms.names(), ids="name={}".format)
def test_a_name_gives_a_class_of_its_own_module(name: str):
    cls = algorithms.get(name)
    assert issubclass(cls, Algorithm)
    assert cls.__module__ == f"bitring.collectives.algorithms.{name}"
    assert cls.__doc__


def test_class_names_follow_file_names():
    for cls, name in algorithms.class_names().items():
        assert cls.lower() == name.replace("_", "")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown algorithm 'rign'; known: .*binomial_tree.*, ring"):
        algorithms.get("rign")


def test_a_name_is_registered_once(tmp_path: Path):
    registry = make(tmp_path, first="class First(Thing):\n    pass\n")
    with pytest.raises(ValueError, match=r"the thing 'first' is registered already"):
        registry.add("first", object)
    registry.add("second", object)
    with pytest.raises(ValueError, match=r"the thing 'second' is registered already"):
        registry.add("second", object)
    assert registry.names() == ["first", "second"]
    assert registry.get("second") is object


def test_the_algorithms_refuse_a_taken_name():
    with pytest.raises(ValueError, match=r"the algorithm 'ring' is registered already"):
        algorithms.add("ring", Ring)


def test_a_file_registers_only_direct_subclasses(tmp_path: Path):
    registry = make(
        tmp_path, one="class One(Thing):\n    pass\n\n\nclass Other(One):\n    pass\n", none="class Thing:\n    pass\n"
    )
    assert registry.names() == ["one"]
    assert registry.class_names() == {"One": "one"}


def test_a_file_with_two_is_refused(tmp_path: Path):
    registry = make(tmp_path, two="class A(Thing):\n    pass\n\n\nclass B(Thing):\n    pass\n")
    with pytest.raises(RuntimeError, match=r"two\.py registers 2 things \(A, B\); a file registers one"):
        registry.names()


def test_listing_imports_nothing(tmp_path: Path):
    assert make(tmp_path, broken="import no_such_module\n\n\nclass Broken(Thing):\n    pass\n").names() == ["broken"]
