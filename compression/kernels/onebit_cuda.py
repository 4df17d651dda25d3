"""1-bit encode and decode on device memory: the kernels of ``onebit.cu``, compiled by CuPy when first called.

CuPy keeps compiled code in its own cache (CUPY_CACHE_DIR), so that later processes load it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from bitring.compression.encoder import Array, Encoder

WARPS_PER_BLOCK = 8
MOST_BLOCKS = 1 << 16  # of threads; each warp takes quantization blocks in turn until none is left


@functools.cache
def _module() -> Any:
    import cupy

    source = Path(__file__).with_name("onebit.cu").read_text(encoding="utf-8")
    return cupy.RawModule(code=source, options=("--std=c++17", "--fmad=false"))


@functools.cache
def _kernel(name: str, device: int) -> Any:
    """The kernel ``name``, loaded on ``device``, which is current."""
    return _module().get_function(name)


def _launch(name: str, values: Array, block: int, arguments: tuple[Any, ...]) -> None:
    """Launch in CuPy's current stream. Does not wait."""
    if values.size == 0:
        return
    if values.data.ptr % values.itemsize:
        raise ValueError(
            f"OneBit: a device array of {values.dtype.name} must be aligned; got address {values.data.ptr}"
        )
    quantization_blocks = -(-values.size // block)
    blocks = min(-(-quantization_blocks // WARPS_PER_BLOCK), MOST_BLOCKS)
    with values.device:
        kernel = _kernel(f"{name}_{values.dtype.name}", values.device.id)
        kernel((blocks,), (32 * WARPS_PER_BLOCK,), (*arguments, np.int64(values.size), np.int64(block)))


def encode(encoder: Encoder, values: Array, residual: Array, payload: Array, seed: int) -> int:
    """See ``OneBit.encode``; unchecked but for alignment. Draws nothing."""
    _launch("encode", values, encoder.block, (values, residual, payload))
    return encoder.nbytes(values.size)


def decode(encoder: Encoder, payload: Array, out: Array, accumulate: bool) -> None:
    """See ``OneBit.decode``; unchecked but for alignment."""
    _launch("accumulate" if accumulate else "decode", out, encoder.block, (payload, out))
