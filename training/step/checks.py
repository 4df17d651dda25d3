"""Checks of parameters, gradients and settings before a trainer takes part, and the words for what is wrong."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bitring.arrays import BFLOAT16, as_array, is_dense, is_device, require_native, xp_of
from bitring.compression.factors import Factors
from bitring.registry import Registry
from bitring.settings import make
from bitring.training.sparse import Sparse
from bitring.training.tree import flattened, host_copy, is_array, leaves

DTYPES = tuple(np.dtype(dtype) for dtype in (np.float16, BFLOAT16, np.float32, np.float64))


def checked_weight(weight: Any, where: str) -> float:
    """``weight`` as a float. Raises TypeError and ValueError."""
    wrong = f"{where}: weight must be a number, the samples in this rank's part, got {weight!r}"
    if isinstance(weight, (str, bytes, np.complexfloating)) or getattr(weight, "ndim", False):
        raise TypeError(wrong)
    try:
        number = float(weight)
    except Exception:  # a tensor's may be its library's own
        raise TypeError(wrong) from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{where}: weight must be finite and >= 0, got {number}")
    return number


def checked_unused(unused: str) -> str:
    """``unused``, checked. Raises ValueError."""
    if not isinstance(unused, str) or unused not in ("error", "zeros"):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"DataParallel: unused must be 'error' or 'zeros', got {unused!r}")
    return unused


def checked_gradients(
    gradients: Any, parameters: Mapping[str, Any], where: str, zeros: bool, sparse: bool = False
) -> dict[str, Any]:
    """Name -> array, or ``Factors``, like the parameters; ``zeros``: what is None or not there is zeros.

    ``sparse``: what is ``Sparse`` stays so; else it is made dense.
    Raises TypeError and ValueError.
    """
    if isinstance(gradients, Mapping):
        taken = dict(gradients)
        if taken.keys() != parameters.keys():  # nested ones have others
            taken = flattened(gradients, f"{where}: gradients")
        if taken.keys() != parameters.keys():
            missing = [name for name in parameters if name not in taken]
            extra = [name for name in taken if name not in parameters]
            if extra or not zeros:
                raise ValueError(
                    f"{where}: gradients must have the parameters' names; missing: {missing}, unknown: {extra}"
                )
    elif isinstance(gradients, (list, tuple)):
        leaves_in_order: Any = gradients
        if any(isinstance(each, (Mapping, list, tuple)) for each in gradients):
            leaves_in_order = flattened(gradients, f"{where}: gradients").values()
        if len(leaves_in_order) != len(parameters):
            raise ValueError(
                f"{where}: gradients must be one for each of the {len(parameters)} parameters, "
                f"got {len(leaves_in_order)}"
            )
        taken = dict(zip(parameters, leaves_in_order, strict=True))
    else:
        raise TypeError(f"{where}: gradients must be a dict or a list of arrays, got {type(gradients).__name__}")
    sharing: set[type] = set()
    for name, w in parameters.items():
        g = taken.get(name)
        if g is None:
            if not zeros:
                raise TypeError(
                    f"{where}: the gradient of {name!r} is None: the parameter had no part in the loss; "
                    "DataParallel(..., unused='zeros') takes such gradients for zeros"
                )
            g = xp_of(w).zeros(w.shape, w.dtype)
            taken[name] = g
        if type(g) is np.ndarray and type(g) is type(w) and g.dtype == w.dtype and g.shape == w.shape:
            continue
        g = taken[name] = _gradient(g, where, name, sharing)
        if isinstance(g, Sparse) and not sparse:
            g = taken[name] = g.dense()
        array = g.u if isinstance(g, Factors) else g.values if isinstance(g, Sparse) else g
        if type(array) is not type(w) and not (isinstance(array, np.ndarray) and isinstance(w, np.ndarray)):
            raise TypeError(
                f"{where}: the gradient of {name!r} must be an array of {xp_of(w).__name__}, as the parameter is, "
                f"got {type(array).__module__}.{type(array).__name__}"
            )
        if g.shape != w.shape or g.dtype != w.dtype:
            require_native(g.dtype, where, f"the gradient of {name!r}")
            raise ValueError(
                f"{where}: the gradient of {name!r} must be {w.dtype.name} of shape {w.shape}, "
                f"got {g.dtype.name} of shape {g.shape}"
            )
    return taken


def _gradient(g: Any, where: str, name: str, sharing: set[type]) -> Any:
    """A gradient as an array, or ``Factors``. ``sharing``: types met in this step whose memory NumPy can share."""
    kind = type(g)
    if kind not in sharing:
        if isinstance(g, np.generic):  # what NumPy makes of arrays without dimensions
            return np.asarray(g)
        if isinstance(g, (Factors, Sparse)):
            return g
        if is_array(g) or not hasattr(g, "__dlpack__"):
            return as_array(g, where, f"the gradient of {name!r}")
    try:
        array = np.from_dlpack(g)  # it is only read, so a copy will do, and so does memory that says it is read-only
    except Exception:  # each library has its own; as_array says what is wrong, or knows another way
        return as_array(g, where, f"the gradient of {name!r}")
    sharing.add(kind)
    return array


def not_finite(arrays: Mapping[str, Any]) -> str | None:
    """Name the first array that holds NaN or Inf, and say which.

    A sum is finite only if all its terms are, and is the quickest pass over an array; when it is not, it may have
    overflowed, and the values themselves are looked at.
    """
    xp = xp_of(next(iter(arrays.values())))
    parts: list[tuple[str, Any]] = []
    for name, array in arrays.items():
        if isinstance(array, Factors):
            parts += [(name, array.u), (name, array.v)]
        else:
            parts.append((name, array.values if isinstance(array, Sparse) else array))
    sums = xp.empty(len(parts), np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for i, (_, array) in enumerate(parts):
            wide = np.float64 if array.dtype == np.float64 else np.float32
            sums[i] = array.sum(dtype=wide)
        finite = np.isfinite(host_copy(sums))
    for (name, array), good in zip(parts, finite, strict=True):
        if not good and not bool(xp.isfinite(array).all()):
            return f"{name!r} holds {'NaN' if bool(xp.isnan(array).any()) else 'Inf'}"
    for name, array in arrays.items():
        if isinstance(array, Factors) and array.overflows():
            return f"{name!r} holds Inf"
    return None


def resumable(description: Mapping[str, Any], owners_anew: bool = False) -> dict[str, Any]:
    """The part of a description that a state must share with the trainer that goes on from it.

    ``owners_anew``: whether owners' residuals are put together and cut again. A compressor's ``levels`` are free then:
    they say how values travel, and who owns which; residuals are of values.
    """
    compression = description["compression"]
    return {
        "parameters": description["parameters"],
        "optimizer": description["optimizer"].partition("(")[0],
        "mode": description["mode"].partition("(")[0],
        "compression": re.sub(r", levels='\w+'", "", compression) if owners_anew else compression,
    }


def require_state(state: Any, mine: Mapping[str, Any], where: str) -> None:
    """Raise TypeError unless ``state`` has the parts of ``mine``, of the same kinds, settings in full."""
    wanted = {**mine, **{f"settings/{key}": value for key, value in mine["settings"].items()}}
    given = state if isinstance(state, Mapping) else {}
    settings = given.get("settings")
    if isinstance(settings, Mapping):
        given = {**given, **{f"settings/{key}": value for key, value in settings.items()}}
    for part, value in wanted.items():
        if not isinstance(given.get(part), type(value)) and part != "settings/compression":
            raise TypeError(
                f"{where}: state must be what state_dict returned, with {part!r}, of type {type(value).__name__}; "
                f"got {type(state).__name__}, in which it is of type {type(given.get(part)).__name__}"
            )


def checked_leaves(state: Mapping[str, Any], live: Mapping[str, Any], plans: Sequence[Any], where: str) -> Any:
    """The leaves of a state that are to take the place of those of ``live``: path -> array or number.

    Raises ValueError unless they are of the same kinds, and the residuals those of ``plans``.
    """
    residuals = state["residuals"]
    if len(residuals) != len(plans) or not all(isinstance(kept, Mapping) for kept in residuals):
        raise ValueError(f"{where}: state must hold residuals for {len(plans)} plans; got {len(residuals)}")
    given = dict(leaves({part: state[part] for part in live}))
    new, old = dict(given), dict(leaves(live))
    for number, (plan, kept) in enumerate(zip(plans, residuals, strict=True)):
        new |= {("residuals", str(number), key): x for key, x in kept.items()}
        old |= {("residuals", str(number), key): x for key, x in plan.state_dict().items()}
    if new.keys() != old.keys():
        odd = "/".join(map(str, min(new.keys() ^ old.keys(), key=str)))
        raise ValueError(f"{where}: the state is of another trainer: {odd} is only in one of the two")
    for at, x in old.items():
        here, there = ((y.dtype.name, tuple(y.shape)) if is_array(y) else None for y in (x, new[at]))
        if here != there:
            raise ValueError(f"{where}: state: {'/'.join(at)} must be {here or 'a number'}; got {there or new[at]!r}")
    return given


def difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """The first difference between two descriptions, in words; None when there is none."""
    for key, value in here.items():
        other = there[key]
        if value == other and (key != "parameters" or list(value) == list(other)):
            continue
        if key != "parameters":
            return f"{key} is {value}, not {other}"
        if list(value) != list(other):
            return f"the parameters are {list(value)}, not {list(other)}"
        name = next(name for name in value if value[name] != other[name])
        kinds = [f"{dtype} of shape {tuple(shape)}" for dtype, shape in (value[name], other[name])]
        return f"parameter {name!r} is {kinds[0]}, not {kinds[1]}"
    return None


def text_of(settings: object) -> str:
    """Settings in words that are the same on every rank and in every run."""
    if settings is None or dataclasses.is_dataclass(settings):
        return repr(settings)
    plain = {k: v for k, v in vars(settings).items() if v is None or isinstance(v, (bool, int, float, str))}
    return f"{type(settings).__name__}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"


def is_frozen(settings: object) -> bool:
    """Whether settings cannot be changed in place."""
    parameters = getattr(settings, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)


def chosen(argument: str, given: Any, registry: Registry[Any], base: type[Any], function: str = "DataParallel") -> Any:
    """The instance that a name, settings behind it or not, or an instance stands for.

    Raises TypeError for anything else, and what ``make`` raises.
    """
    if isinstance(given, str):
        try:
            return make(given, registry)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{function}: {error}") from None
    if isinstance(given, base):
        return given
    shown = f"the class {given.__name__} itself" if isinstance(given, type) else repr(given)
    if hasattr(given, "is_for"):
        shown += f", which is for {given.is_for}"
    raise TypeError(
        f"{function}: {argument} must be a name ({', '.join(registry.names())}) "
        f"or an instance of {registry.kind.title()}, got {shown}"
    )


def checked_parameters(parameters: Any, function: str = "DataParallel", written: bool = True) -> dict[str, Any]:
    """Name -> array, over the memory of what was given, which must be writable where it is ``written``.

    Raises TypeError and ValueError.
    """
    where = f"{function}: parameters"
    if not isinstance(parameters, (Mapping, list, tuple)):
        raise TypeError(f"{where} must be a dict or a list of arrays, got {type(parameters).__name__}")
    named = flattened(parameters, where)
    if not named:
        raise ValueError(f"{where} must hold at least one array, got none")
    extents: list[tuple[int, int, str]] = []
    for name, array in list(named.items()):
        array = named[name] = as_array(array, where, repr(name))
        if is_device(array) != is_device(next(iter(named.values()))):
            raise TypeError(f"{where}: {name!r} must be on the same device as the others")
        require_native(array.dtype, where, repr(name))
        if array.dtype not in DTYPES:
            known = ", ".join(dtype.name for dtype in DTYPES)
            raise TypeError(f"{where}: {name!r} must be one of {known}, got {array.dtype.name}")
        if not (array.flags.c_contiguous if is_device(array) else is_dense(array)):
            order = "C-contiguous" if is_device(array) else "dense, in any memory order"
            raise ValueError(
                f"{where}: {name!r} must be {order}, got shape {tuple(array.shape)} with strides {tuple(array.strides)}"
            )
        if isinstance(array, np.ndarray):
            if written and not array.flags.writeable:
                raise ValueError(
                    f"{where}: {name!r} must be writable, since it is updated in place, got a read-only array; "
                    "give a writable copy, such as numpy.array of it"
                )
            if written and array.size:
                start = array.__array_interface__["data"][0]
                extents.append((start, start + array.nbytes, name))
    extents.sort()
    for (_, end, name), (start, _, other) in pairwise(extents):
        if start < end:
            raise ValueError(f"{where}: {name!r} and {other!r} share memory; give a shared array once")
    return named
