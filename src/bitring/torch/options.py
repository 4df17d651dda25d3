"""What an averager is asked for, checked; and the exchange that this makes of a module's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from bitring.collectives.selection.selection import check_name
from bitring.compression.compressor import Compressor, compressors, parsed
from bitring.settings import Range, checked
from bitring.torch.bucket import Entry
from bitring.torch.tensors import array_dtype, memory_order
from bitring.torch.watched import Watched
from bitring.training.step.bucket_sizes import kind_of
from bitring.training.step.compression_for import compressor_of

BUCKET_BYTES = 8 << 20
"""The first gradients of back-propagation are under way while most are still to come."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of ``GradientAverager``, which describes them. Raises TypeError and ValueError, naming it."""

    compression: Compressor | str | None = None
    compression_for: Mapping[str, Compressor | str | None] | None = None
    overlap: bool | str = "auto"
    unused: str = "zeros"
    sparse: str = "dense"
    buffers: str = "broadcast"
    algorithm: str = "auto"
    bucket_bytes: int = BUCKET_BYTES

    def __post_init__(self) -> None:
        where = "GradientAverager"
        given = self.compression_for
        if given is not None and not isinstance(given, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"{where}: compression_for must be a dict of parameters' names or patterns; got {type(given).__name__}"
            )
        object.__setattr__(self, "compression", compressor(self.compression, where, "compression"))
        rules = {k: compressor(c, where, f"compression_for[{k!r}]") for k, c in (given or {}).items()}
        object.__setattr__(self, "compression_for", rules)
        if self.overlap != "auto":
            checked(where, "overlap", self.overlap, bool)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{where}: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        check_name(self.algorithm, where)
        checked(where, "bucket_bytes", self.bucket_bytes, int, Range(least=1))

    def compressor_of(self, name: str, values: int) -> Any:
        """The compressor of a parameter of so many values; None where it travels exactly, as what is small does."""
        chosen_for: Any = self.compression_for or {}
        usual: Any = self.compression
        return kind_of(compressor_of(name, usual, chosen_for), values)

    def require_known(self, names: Mapping[str, Any]) -> None:
        """Raise ValueError for a pattern of ``compression_for`` that no parameter has."""
        for pattern in self.compression_for or {}:
            if not any(pattern == name or fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"GradientAverager: compression_for: no parameter is named {pattern!r}; there are "
                    f"{', '.join(names)}"
                )

    def entries(self, watched: Watched, masters: Mapping[str, Any], left_out: set[str]) -> list[Entry]:
        """What is exchanged for the parameters that are trained, in their order; of its master's dtype for one."""
        found: list[Entry] = []
        for name, p in watched.trained.items():
            if name not in left_out:
                dtype = array_dtype(masters.get(name, p).dtype, f"GradientAverager: the parameter {name!r}")
                chosen = self.compressor_of(name, p.numel())
                found.append(
                    Entry(name, dtype, tuple(p.shape), memory_order(p), device_of(p, "GradientAverager"), chosen)
                )
        return found


_CHOICES = {
    "unused": ("zeros", "error"),
    "sparse": ("dense", "gather"),
    "buffers": ("broadcast", "mean", "own"),
}


def compressor(given: Any, where: str, argument: str) -> Compressor | None:
    """What ``compression=`` asks for, as an instance or None. Raises TypeError and ValueError."""
    made = parsed(given, where)
    if made is not None and not isinstance(made, Compressor):
        known = ", ".join(compressors.names())
        raise TypeError(
            f"{where}: {argument} must be None, a registered name ({known}), or an instance of a compressor; "
            f"got {type(given).__name__}"
        )
    return made


def device_of(p: Any, where: str) -> str:
    """The name of a parameter's device. Raises TypeError for one whose gradients cannot be exchanged."""
    if p.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{where}: parameters must be on the CPU or on a CUDA device; got one on {p.device}")
    return str(p.device)


def describe(entries: list[Entry], options: Options, masters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as plain data, which must be the same on all ranks."""
    return {
        "parameters": {e.name: [e.dtype.name, list(e.shape)] for e in entries},
        "compression_for": {e.name: str(e.compression) for e in entries},
        **{
            f.name: str(getattr(options, f.name))
            for f in dataclasses.fields(options)
            if f.name not in ("compression_for",)
        },
        "masters": sorted(masters),
    }
