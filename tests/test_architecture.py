"""The layer tables have the totals that are published, and those of bitring's own models are the models'."""

import pytest

import bitring
from bitring.models.architecture import LayerTable, architectures, layer_table, layer_tables, layers_of
from bitring.models.model import models

pytestmark = pytest.mark.single

PUBLISHED = {  # parameters, and multiply-adds a sample in units of 10⁹
    "alexnet": (60_965_224, 0.72),
    "vgg16": (138_357_544, 15.5),
    "vgg19": (143_667_240, 19.6),
    "googlenet": (6_998_552, 1.6),
    "resnet50": (25_557_032, 3.9),
    "lstm": (66_022_000, 1.8),
}


def total(layers: list[LayerTable]) -> int:
    return sum(layer.values for layer in layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str):
    values, billions = PUBLISHED[name]
    layers = layer_table(name)
    assert total(layers) == values
    assert sum(layer.multiply_adds for layer in layers) / 1e9 == pytest.approx(billions, rel=0.02)
    names = [parameter for layer in layers for parameter, _ in layer.parameters]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", models.names())
def test_own_models_are_what_their_tables_say(name: str):
    model = models.get(name)((28, 28), 10)
    layers = layer_table(name)
    shapes = dict(parameter for layer in layers for parameter in layer.parameters)
    assert shapes == {parameter: array.shape for parameter, array in model.parameters.items()}
    assert list(shapes) == list(model.parameters)


def test_other_shapes_of_own_models():
    layers = layers_of(bitring.CNN((8, 8), 10))
    assert [layer.multiply_adds for layer in layers[:2]] == [8 * 8 * 25 * 32, 4 * 4 * 25 * 32 * 64]
    layers = layers_of(bitring.MLP((5,), 3, hidden=[7]))
    assert [(layer.kind, layer.multiply_adds) for layer in layers] == [("dense", 35), ("dense", 21)]


def test_an_unknown_model_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown model 'vgg'; known: alexnet, cnn, .*vgg16"):
        layer_table("vgg")
    assert layer_tables() == sorted({*architectures.names(), *models.names()})
    assert set(PUBLISHED) <= set(architectures.names())
