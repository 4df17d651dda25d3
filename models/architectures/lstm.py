"""The large LSTM language model of Zaremba, Sutskever and Vinyals (2014, arXiv:1409.2329)."""

from __future__ import annotations

from bitring.models.architecture import Architecture, LayerTable

WORDS, UNITS, STEPS = 10_000, 1500, 35


class LSTM(Architecture):
    """Two layers of 1500 units, unrolled for 35 words, on Penn Treebank's 10,000: 66,022,000 parameters.

    A sample is a sequence of 35 words, and takes 1.8 G multiply-adds. The embedding's gradient is exchanged whole, as
    the others are.
    """

    def layers(self) -> list[LayerTable]:
        """See Architecture."""
        recurrent = [
            LayerTable(
                name,
                "lstm",
                ((f"{name}.weight", (4 * UNITS, 2 * UNITS)), (f"{name}.bias", (4 * UNITS,))),
                STEPS * 4 * UNITS * 2 * UNITS,
                factors=STEPS,
            )
            for name in ("lstm1", "lstm2")
        ]
        return [
            LayerTable("embedding", "embedding", (("embedding.weight", (WORDS, UNITS)),), 0),
            *recurrent,
            LayerTable(
                "softmax",
                "dense",
                (("softmax.weight", (WORDS, UNITS)), ("softmax.bias", (WORDS,))),
                STEPS * WORDS * UNITS,
                factors=STEPS,
            ),
        ]
