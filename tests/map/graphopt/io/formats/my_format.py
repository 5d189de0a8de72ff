"""ONNX models as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from graphopt.core.errors import LoadError
from graphopt.core.remarks import Remarks
from graphopt.io.formats.format import Format, Loaded, is_path


class MyFormat(Format):
    """A file that ends in .mine."""

    given: ClassVar[str] = "a path"

    def recognizes(self, source: Any) -> bool:
        return is_path(source) and Path(source).suffix == ".mine"

    def read(self, source: Any, options: Mapping[str, Any], remarks: Remarks) -> Loaded:
        try:
            proto = onnx.parser.parse_model(Path(source).read_text(encoding="utf-8"))
        except onnx.parser.ParseError as error:
            raise LoadError(f"{source}: expected ONNX as text, found something else ({error})") from None
        return ir.from_proto(proto), str(source), [str(Path(source).absolute())]
