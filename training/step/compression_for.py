"""What each parameter travels by: one compressor for all, and others for those that a name or a pattern picks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from bitring.compression.compressor import Compressor, compressors, parsed
from bitring.settings import name_of
from bitring.training.choice import Choice, choices
from bitring.training.step.checks import chosen, text_of

Choices = dict[str, Compressor | None]


def chosen_compression(given: Any) -> Compressor | Choice | None:
    """``compression``, by name or instance: a choice, too. Raises TypeError and ValueError."""
    if isinstance(given, Choice):
        return given
    if isinstance(given, str) and name_of(given) in choices.names():
        made: Choice = chosen("compression", given, choices, Choice)
        return made
    return chosen_compressor("compression", given)


def chosen_compressor(argument: str, given: Any) -> Compressor | None:
    """A compressor by name or instance; None for exact sums. Raises TypeError and ValueError."""
    made = parsed(given, "DataParallel")
    return None if made is None else chosen(argument, made, compressors, Compressor)


def checked_choices(given: Any, names: Iterable[str]) -> Choices:
    """``compression_for``, with instances. Raises TypeError and ValueError; also for what fits no parameter."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            "DataParallel: compression_for must be a dict of a parameter's name or pattern -> compressor or None, "
            f"got {type(given).__name__}"
        )
    known = list(names)
    made: Choices = {}
    for pattern, compressor in given.items():
        if not isinstance(pattern, str):
            raise TypeError(f"DataParallel: compression_for: a name or pattern must be a string, got {pattern!r}")
        if not any(name == pattern or fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"DataParallel: compression_for: {pattern!r} fits no parameter: {', '.join(known)}")
        made[pattern] = chosen_compressor(f"compression_for[{pattern!r}]", compressor)
    return made


def compressor_of_each(usual: Choices, chosen_for: Choices) -> Choices:
    """Parameter's name -> compressor: the ``usual`` one, where ``compression_for`` says nothing else."""
    return {name: compressor_of(name, compressor, chosen_for) for name, compressor in usual.items()}


def compressor_of(name: str, usual: Compressor | None, chosen_for: Choices) -> Compressor | None:
    """A parameter's: ``chosen_for`` its name, or by the first pattern that fits, else the ``usual`` one."""
    if name in chosen_for:
        return chosen_for[name]
    return next((each for pattern, each in chosen_for.items() if fnmatchcase(name, pattern)), usual)


def compression_in_words(compression: Compressor | Choice | None, chosen_for: Choices) -> str:
    """The same on every rank and in every run."""
    words = text_of(compression)
    if chosen_for:
        words += "; " + ", ".join(f"{pattern}: {text_of(each)}" for pattern, each in chosen_for.items())
    return words
