"""Registered things are found by looking into a folder, and in the entry points of packages outside."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import bitring.registry
from bitring.collectives.algorithms.ring import Ring
from bitring.collectives.schedules.schedule import Algorithm, algorithms
from bitring.compression.compressor import compressors
from bitring.models.architecture import architectures
from bitring.models.dataset import datasets
from bitring.models.model import models
from bitring.registry import Registry
from bitring.training.mode import modes
from bitring.training.optimizer import optimizers

pytestmark = pytest.mark.single

REGISTRIES: list[Registry[Any]] = [algorithms, compressors, models, architectures, datasets, modes, optimizers]
REGISTERED = [(registry, name) for registry in REGISTRIES for name in registry.names()]


class Thing:
    pass


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A registry of files in a room of a library of its own."""

    def make(*rooms: str, group: str | None = None, **files: str) -> Registry[Thing]:
        for room in rooms or ("room",):
            for stem, text in files.items():
                folder = tmp_path / "bitring" / room
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{stem}.py").write_text(f"from {__name__} import Thing\n{text}")
        monkeypatch.setattr(bitring.registry, "_LIBRARY", tmp_path / "bitring")
        monkeypatch.setattr(bitring, "__path__", [*bitring.__path__, str(tmp_path / "bitring")])
        monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__))
        return Registry("thing", Thing, *(rooms or ("room",)), group=group)

    yield make
    for name in [name for name in sys.modules if name.startswith("bitring.room")]:
        del sys.modules[name]


def test_all_algorithms_are_found_by_their_files():
    assert {"mpi", "ring"} <= set(algorithms.names())
    assert algorithms.names() == sorted(algorithms.names())


@pytest.mark.parametrize(("registry", "name"), REGISTERED, ids=[f"{r.kind}={n}" for r, n in REGISTERED])
def test_a_name_gives_a_class_of_its_own_module_and_name(registry: Registry[Any], name: str):
    cls = registry.get(name)
    assert cls.__module__.rpartition(".")[2] == name
    assert cls.__name__.lower() == name.replace("_", "")
    assert cls.__doc__
    assert registry.name_of(cls) == name
    assert registry.named(cls.__name__) is cls


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown algorithm 'rign'; known: .*binomial_tree.*, ring"):
        algorithms.get("rign")
    assert algorithms.named("Rign") is None


def test_a_class_from_elsewhere_is_named_by_itself():
    class Mine(Ring):
        pass

    assert issubclass(Mine, Algorithm)
    assert algorithms.name_of(Mine) == "Mine"


def test_a_file_registers_the_class_that_is_named_as_it_is(make):
    registry = make(two_words="class Other(Thing):\n    pass\n\n\nclass TwoWords(Other):\n    pass\n")
    assert registry.names() == ["two_words"]
    assert registry.get("two_words").__name__ == "TwoWords"


@pytest.mark.parametrize("text", ["class Other(Thing):\n    pass\n", "class Wrong:\n    pass\n", ""])
def test_a_file_without_such_a_class_is_refused(make, text: str):
    registry = make(wrong=text)
    with pytest.raises(RuntimeError, match=r"wrong\.py must register a thing: a class derived from Thing .* as Wrong"):
        registry.get("wrong")


def test_a_name_in_two_rooms_is_refused(make):
    registry = make("room", "room2", first="class First(Thing):\n    pass\n")
    with pytest.raises(RuntimeError, match=r"the thing 'first' has two files, the second in room2"):
        registry.names()


def test_listing_imports_nothing(make):
    assert make(broken="import no_such_module\n").names() == ["broken"]


def test_packages_outside_register_by_entry_points(make, monkeypatch: pytest.MonkeyPatch):
    points = [EntryPoint("star", f"{__name__}:Thing", "bitring.things"), EntryPoint("odd", "os:sep", "bitring.things")]
    monkeypatch.setattr(bitring.registry, "entry_points", lambda group: points if group == "bitring.things" else [])
    registry = make(first="class First(Thing):\n    pass\n", group="bitring.things")
    assert registry.names() == ["first", "odd", "star"]
    assert registry.get("star") is Thing
    with pytest.raises(TypeError, match=r"the thing 'odd', os:sep, is no Thing"):
        registry.get("odd")


def test_an_entry_point_does_not_take_a_name_that_is_there(make, monkeypatch: pytest.MonkeyPatch):
    points = [EntryPoint("first", "their.thing:Thing", "bitring.things")]
    monkeypatch.setattr(bitring.registry, "entry_points", lambda group: points)
    registry = make(first="class First(Thing):\n    pass\n", group="bitring.things")
    with pytest.raises(RuntimeError, match=r"the thing 'first' of their.thing:Thing is registered already"):
        registry.names()
