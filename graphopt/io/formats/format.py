"""What a format is: a form in which a model comes.

A format is one class, and FORMATS of io/load.py names it, in the order of asking. Whatever it gives is brought into normal form behind it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt.core.remarks import Remarks

Loaded = tuple[ir.Model, str, list[str]]  # the model as it came, its name in messages, and its files


class Format(ABC):
    """One form in which a model comes.

    Attributes:
        given: what there is to give, in the words of an error.
        own: the options of loading that no other format takes, and `owned`, the words that say so.
        onnx_file: a source is the path of an ONNX file, whose bytes are kept where no pass changes anything.
    """

    given: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()
    owned: ClassVar[str] = ""
    onnx_file: ClassVar[bool] = False

    @abstractmethod
    def recognizes(self, source: Any) -> bool:
        """Whether this format reads the source; the first that does is taken. It is asked about every source, and so must be quick."""

    @abstractmethod
    def read(self, source: Any, options: Mapping[str, Any], remarks: Remarks) -> Loaded:
        """The model; `options` are those of `LoadOptions` that were given.

        Raises:
            LoadError: one line that names the source, what was found, and what to do.
        """


def is_path(source: Any) -> bool:
    return isinstance(source, str | os.PathLike)


def described(source: Any) -> str:
    """A source in messages: the path, or the type of the object."""
    return str(source) if is_path(source) else f"an object of type {type(source).__module__}.{type(source).__qualname__}"
