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
MOST_BLOCKS = 1 << 16  # of threads; each warp takes blocks, or rows, in turn until none is left


@functools.cache
def _module() -> Any:
    import cupy

    source = Path(__file__).with_name("onebit.cu").read_text(encoding="utf-8")
    return cupy.RawModule(code=source, options=("--std=c++17", "--fmad=false"))


@functools.cache
def _kernel(name: str, device: int) -> Any:
    """The kernel ``name``, loaded on ``device``, which is current."""
    return _module().get_function(name)


def launch(name: str, values: Array, warps: int, arguments: tuple[Any, ...], sizes: tuple[int, ...]) -> None:
    """Launch the kernel ``name`` for values like these, with something for so many warps, in CuPy's current stream.

    Does not wait.
    """
    if values.size == 0:
        return
    if values.data.ptr % values.itemsize:
        raise ValueError(
            f"OneBit: a device array of {values.dtype.name} must be aligned; got address {values.data.ptr}"
        )
    blocks = min(-(-warps // WARPS_PER_BLOCK), MOST_BLOCKS)
    with values.device:
        kernel = _kernel(f"{name}_{values.dtype.name}", values.device.id)
        kernel((blocks,), (32 * WARPS_PER_BLOCK,), (*arguments, *map(np.int64, (values.size, *sizes))))


def encode(encoder: Encoder, values: Array, residual: Array, payload: Array, seed: int) -> int:
    """See ``OneBit.encode``; unchecked but for alignment. Draws nothing."""
    launch("encode", values, -(-values.size // encoder.block), (values, residual, payload), (encoder.block,))
    return encoder.nbytes(values.size)


def decode(encoder: Encoder, payload: Array, out: Array, accumulate: bool) -> None:
    """See ``OneBit.decode``; unchecked but for alignment."""
    name = "accumulate" if accumulate else "decode"
    launch(name, out, -(-out.size // encoder.block), (payload, out), (encoder.block,))
