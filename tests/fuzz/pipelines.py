"""Random pipelines: any order of the registered passes, with options drawn from the types and bounds that the passes state."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from random import Random
from typing import Any

from graphopt.core.contract import Pass
from graphopt.core.errors import PipelineError
from graphopt.core.options import Bounds
from graphopt.core.registry import passes

_ODD = ("-1", "0", "1000000007", "nan", "inf", "1e-30", '""', '"a b"', "none", "true", "0.5", "*", "\u00e9")
_STEPS = (0, 1, 2, 3, 4, 7, 8, 16, 32, 64)
_PATTERNS = ("*", "*0*", "*[a-m]*", "MatMul*", "nothing-is-called-so")


def pipeline(rng: Random) -> tuple[str, ...]:
    """One to eight passes as text."""
    known = passes()
    exact = [name for name in known if known[name].exact]
    lossy = [name for name in known if not known[name].exact]
    share = rng.choice((0.0, 0.2, 0.5))
    names = [rng.choice(lossy if rng.random() < share else exact) for _ in range(rng.randint(1, 8))]
    return tuple(element(rng, known[name]) for name in names)


def element(rng: Random, cls: type[Pass]) -> str:
    """A pass with some options; now and then with a value that it does not take."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    options = {}
    chosen = rng.choice(cls.ways.keys) if cls.ways.keys and rng.random() < 0.9 else None
    for field in fields:
        if field.name in cls.ways.keys and field.name != chosen and rng.random() < 0.95:
            continue
        if field.name == chosen or rng.random() < 0.25:
            odd = rng.random() < 0.02
            options[field.name.replace("_", "-")] = rng.choice(_ODD) if odd else _value(rng, cls, field, hints[field.name])
    text = " ".join(f"{key}={value}" for key, value in options.items())
    return f"{cls.name}{{{text}}}" if text else cls.name


def _value(rng: Random, cls: type[Pass], field: Any, hint: Any) -> str:
    bounds = field.metadata.get(Bounds, Bounds())
    if bounds.one_of:
        return str(rng.choice(bounds.one_of))
    inner = [h for h in typing.get_args(hint) if h is not type(None)]
    if typing.get_origin(hint) is tuple:
        return "+".join(_one(rng, cls, field, inner[0], bounds) for _ in range(rng.randint(1, 2)))
    if typing.get_origin(hint) is typing.Literal:
        return str(rng.choice(typing.get_args(hint)))
    if type(None) in typing.get_args(hint):
        return "none" if rng.random() < 0.1 else _one(rng, cls, field, inner[0], bounds)
    return _one(rng, cls, field, hint, bounds)


def _one(rng: Random, cls: type[Pass], field: Any, hint: Any, bounds: Bounds) -> str:
    if hint is bool:
        return rng.choice(("true", "false"))
    low, high = _range(bounds)
    if hint is float:
        return f"{low + (high - low) * rng.choice((0.05, 0.25, 0.5, 0.75, 0.95)):g}"
    words = _words(cls, field.name)
    if hint is int:
        known = [word for word in words if word.isdigit()]
        return rng.choice(known) if known and rng.random() < 0.5 else str(min(int(high), int(low) + rng.choice(_STEPS)))
    return rng.choice(words) if words and rng.random() < 0.95 else f'"{rng.choice(_PATTERNS)}"'


def _range(bounds: Bounds) -> tuple[float, float]:
    low = next((x for x in (bounds.least, bounds.above) if x is not None), 0)
    high = next((x for x in (bounds.most, bounds.below) if x is not None), low + 1 if bounds.above is not None else low + 1000)
    return low, high


@functools.cache
def _words(cls: type[Pass], field: str) -> tuple[str, ...]:
    """The words that an option of text or whole numbers takes: those of the error that says so, and those that its documentation spells."""
    key = field.replace("_", "-")
    text = _documented(cls, field)
    found = re.findall(r"`([A-Za-z][\w-]*)`|=(\w[\w-]*)|\b(\d+)\b", text)
    words = [word for group in found for word in group if word]
    try:
        cls.from_options({key: "qqq", **{way.replace("_", "-"): "0.5" for way in cls.ways.keys[:1] if way != field}})
    except PipelineError as error:
        expected = re.search(r"expects (?!a whole number|a number)(.*?)(?: in this version)?, found", str(error).partition("\n")[0])
        words += re.findall(r"\w[\w-]*", re.sub(r"\b(one of|or|and|a|the|number|from|to)\b", " ", expected[1])) if expected else []
    return tuple(dict.fromkeys(words))


def _documented(cls: type[Pass], field: str) -> str:
    """The paragraph of a field in the docstring of its class."""
    found = re.search(rf"^( +){field}: (.*?)(?=^\1\w+:|^ *$|\Z)", cls.__doc__ or "", re.M | re.S)
    return found[2] if found else ""
