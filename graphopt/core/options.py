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
    return at_option(key, f"{name}: option `{key}` expects {expected}, found `{told}`")


def at_option(key: str, message: str) -> PipelineError:
    """`bad_key` names the option under which the pipeline text gets its caret."""
    error = PipelineError(message)
    error.bad_key = key  # type: ignore[attr-defined]
    return error


class Configurable:
    """A frozen dataclass whose fields are its options, of the types bool, int, float, str, tuples of these, or None.

    The class name gives the name in texts: `FuseNorm` is `fuse-norm`; the field `per_channel` is the option `per-channel`.
    """

    name: ClassVar[str] = ""

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
            PipelineError: unknown key, or a value of another type; `bad_key` names the option.
        """
        hints = typing.get_type_hints(cls)
        known = {_key(f): f for f in _fields(cls)}
        values = {}
        for key, text in options.items():
            if key not in known:
                raise at_option(key, f"{cls.name} has no option `{key}`{near(key, known)}\n  options: {cls.describe() or 'none'}")
            try:
                values[known[key].name] = _cast("true" if text is None else text, hints[known[key].name])
            except ValueError as cause:
                raise option_error(cls.name, key, cause, text) from None
        return cls(**values)

    @classmethod
    def describe(cls) -> str:
        """The options with types and defaults, as one line: `energy: float = 0.95, rank: int | None = None`."""
        hints = typing.get_type_hints(cls)
        return ", ".join(f"{_key(f)}: {_type_text(hints[f.name])} = {_print(_default(f))}" for f in _fields(cls))


def check_limits(one: Configurable, limits: Mapping[str, tuple[int, int | None]]) -> None:
    """Refuse options out of their range (least, most); names that it has not are ignored, and so are defaults.

    Raises:
        PipelineError: names the option and its range.
    """
    for field in _fields(type(one)):
        least, most = limits.get(field.name, (0, None))
        found = getattr(one, field.name)
        if field.name not in limits or not isinstance(found, int) or found == _default(field):
            continue
        if found < least or (most is not None and found > most):
            expected = f"{least} or more" if most is None else f"a number from {least} to {most}"
            raise PipelineError(f"{one.name}: option `{_key(field)}` expects {expected}, found {found}")


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
