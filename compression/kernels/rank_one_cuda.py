"""1-bit panels with levels of rank one on device memory: four kernels of ``onebit.cu``, and one that decodes."""

from __future__ import annotations

from typing import Any

from bitring.arrays import xp_of
from bitring.compression.encoder import Array
from bitring.compression.kernels.onebit_cuda import launch


def encode(encoder: Any, values: Array, residual: Array, payload: Array, seed: int) -> int:
    """See ``RankOne.encode``; unchecked but for alignment. Draws nothing."""
    columns, most, group = encoder.columns, encoder.rows, encoder.column_group
    rows = values.size // columns
    panels = -(-rows // most)
    scratch = xp_of(values).empty(4 * rows + panels * columns, "float64")
    warps = {"rows": rows, "columns": panels * -(-columns // 32), "codes": panels, "left": rows}
    for part, count in warps.items():
        launch(f"panel_{part}", values, count, (values, residual, payload, scratch), (columns, most, group))
    used: int = encoder.nbytes(values.size)
    return used


def decode(encoder: Any, payload: Array, out: Array, accumulate: bool) -> None:
    """See ``RankOne.decode``; unchecked but for alignment."""
    name = "panel_accumulate" if accumulate else "panel_decode"
    sizes = encoder.columns, encoder.rows, encoder.column_group
    launch(name, out, out.size // encoder.columns, (out, out, payload, payload), sizes)
