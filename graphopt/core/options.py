"""Options as text: a frozen dataclass prints as `name{key=value}` and parses back losslessly. Passes and targets share it."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from graphopt.core.errors import PipelineError

_BARE = re.compile(r"[^\s,{}\"#=+]+")  # what a value may be without quotes


def kebab(name: str) -> str:
    """`FuseNorm` -> `fuse-norm`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` where something similar is known, else an empty text."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


def option_error(name: str, key: str, expected: object, found: object) -> PipelineError:
    """The error of a pass or target `name` whose option `key` (of its text, or the field) has a value that it cannot have."""
    key, told = key.replace("_", "-"), found if isinstance(found, str) else _print(found)
    return PipelineError(f"{name}: option `{key}` expects {expected}, found `{told}`", key)


@dataclasses.dataclass(frozen=True)
class Range:
    """Which values an option may have; of a tuple, each of its items. `what` they are, in the words of an error."""

    above: float | None = None
    below: float | None = None
    least: float | None = None
    most: float | None = None
    one_of: tuple[Any, ...] = ()
    what: str = "a number"

    def holds(self, value: Any) -> bool:
        if self.one_of:
            return value in self.one_of
        low = (self.above is None or value > self.above) and (self.least is None or value >= self.least)
        return low and (self.below is None or value < self.below) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        """`a number between 0 and 1`."""
        if self.one_of:
            return "one of " + ", ".join(map(_print, self.one_of))
        if self.above is not None and self.below is not None:
            return f"{self.what} between {self.above:g} and {self.below:g}"
        if self.above is not None and self.most is None:
            return f"{self.what} above {self.above:g}"
        if self.least is not None and self.most is not None:
            return f"{self.what} from {self.least:g} to {self.most:g}"
        bounds = (self.above, "more than {:g}"), (self.below, "less than {:g}"), (self.least, "{:g} or more"), (self.most, "at most {:g}")
        return " and ".join(text.format(bound) for bound, text in bounds if bound is not None)


def option(
    default: Any,
    *,
    above: float | None = None,
    below: float | None = None,
    least: float | None = None,
    most: float | None = None,
    one_of: Sequence[Any] = (),
    what: str = "a number",
) -> Any:
    """A field of a pass or target whose values are bounded; `default` itself is always allowed (None = not given).

    Example:
        `ratio: float | None = option(None, above=0, below=1, what="a fraction")`
    """
    return dataclasses.field(default=default, metadata={Range: Range(above, below, least, most, tuple(one_of), what)})


@dataclasses.dataclass(frozen=True)
class Exclusive:
    """Options of which one at most is given, that is, differs from its default."""

    keys: tuple[str, ...] = ()
    says: str = ""

    def given(self, one: Configurable) -> list[str]:
        return [f.name for key in self.keys for f in _fields(type(one)) if f.name == key and getattr(one, key) != _default(f)]

    def require(self, one: Configurable) -> str:
        """The one that is given.

        Raises:
            PipelineError: none is.
        """
        for key in self.given(one):
            return key
        first, *others = (key.replace("_", "-") for key in self.keys)
        raise option_error(one.name, first, f"{self.says} (or {', '.join(others)})", "nothing")


def exclusive(*keys: str, says: str = "") -> Exclusive:
    """Declares `ways` of a pass or target: options that do not stand together. `says` is what one of them has to tell, where one must be given.

    Example:
        `ways = exclusive("ratio", "flops", says="how much is to go")`
    """
    return Exclusive(keys, says)


class Configurable:
    """A frozen dataclass whose fields are its options, of the types bool, int, float, str, tuples of these, or None.

    The class name gives the name in texts: `FuseNorm` is `fuse-norm`; the field `per_channel` is the option `per-channel`. A field that is made
    by `option` states its range, and `ways` which options exclude each other; both are checked when one is made, and printed by `describe`.
    """

    name: ClassVar[str] = ""
    ways: ClassVar[Exclusive] = Exclusive()

    def __post_init__(self) -> None:
        """A subclass that checks more, such as two options against each other, calls this first.

        Raises:
            PipelineError: an option out of its range, or two that exclude each other.
        """
        given = [key.replace("_", "-") for key in self.ways.given(self)]
        if len(given) > 1:
            raise PipelineError(f"{self.name}: option `{given[1]}` expects to stand alone, without {given[0]}; both are given", given[1])
        for field in _fields(type(self)):
            self._check(field)

    def _check(self, field: dataclasses.Field[Any]) -> None:
        bounds, found = field.metadata.get(Range), getattr(self, field.name)
        if bounds is None or found == _default(field):
            return
        for value in found if isinstance(found, tuple) else (found,):
            if not bounds.holds(value):
                told = f"{value:g}" if isinstance(value, float) else f"`{value}`" if isinstance(value, str) else value
                raise PipelineError(f"{self.name}: option `{_key(field)}` expects {bounds}, found {told}", _key(field))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = kebab(cls.__name__)

    def __str__(self) -> str:
        options = [f"{_key(f)}={_print(getattr(self, f.name))}" for f in _fields(type(self)) if getattr(self, f.name) != _default(f)]
        return self.name + (f"{{{' '.join(options)}}}" if options else "")

    @classmethod
    def from_options(cls, options: Mapping[str, str | None]) -> Self:
        """Build from text values; a key without a value (None) means true.

        Raises:
            PipelineError: unknown key, or a value of another type or out of its range.
        """
        hints = typing.get_type_hints(cls)
        known = {_key(f): f for f in _fields(cls)}
        values = {}
        for key, text in options.items():
            if key not in known:
                raise PipelineError(f"{cls.name} has no option `{key}`{near(key, known)}\n  options: {cls.describe() or 'none'}", key)
            try:
                values[known[key].name] = _cast("true" if text is None else text, hints[known[key].name])
            except ValueError as cause:
                raise option_error(cls.name, key, cause, text) from None
        return cls(**values)

    @classmethod
    def describe(cls) -> str:
        """The options with types, defaults and ranges, as one line: `energy: float = 0.95 (a number between 0 and 1), rank: int | None = None`."""
        hints = typing.get_type_hints(cls)
        ranges = {f.name: f" ({f.metadata[Range]})" if Range in f.metadata else "" for f in _fields(cls)}
        return ", ".join(f"{_key(f)}: {_type_text(hints[f.name])} = {_print(_default(f))}{ranges[f.name]}" for f in _fields(cls))


def _fields(cls: type) -> Sequence[dataclasses.Field[Any]]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _key(field: dataclasses.Field[Any]) -> str:
    return field.name.replace("_", "-")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _print(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(_quote(str(v)) for v in value) or '""'
    return _quote(str(value)) if isinstance(value, str) else repr(value)


def _quote(text: str) -> str:
    if _BARE.fullmatch(text) and text not in ("none", ""):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _type_text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _cast(text: str, hint: Any) -> Any:
    """Turn option text into a value of the hinted type; raises ValueError whose text is the expected type."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if text == "none" and type(None) in typing.get_args(hint):
            return None
        return _cast(text, next(a for a in typing.get_args(hint) if a is not type(None)))
    if origin is typing.Literal:
        if unquote(text) not in typing.get_args(hint):
            raise ValueError("one of " + ", ".join(map(str, typing.get_args(hint))))
        return unquote(text)
    if origin is tuple:
        return tuple(_cast(part, typing.get_args(hint)[0]) for part in split_list(text))
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError("a whole number" if hint is int else "a number") from None
    return unquote(text)


def split_list(text: str) -> list[str]:
    """Split at `+` outside quotes: `a+"b+c"` is two items."""
    return [] if text == '""' else [p for p in re.findall(r'"(?:\\.|[^"\\])*"|[^+]+', text) if p]


def unquote(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return text
