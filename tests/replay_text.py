"""Graphs, weights and facts as text, for tests/replay.py; nothing of the package is used, so that the writer does not depend on what is checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

_TIMES = re.compile(r"second|latency|(^|_)(ms|time|times|faster|speed_?up)$")
_TIMED = re.compile(r"\b\d+(\.\d+)?(e-?\d+)? ?(ms|us|µs|s|seconds)\b")


def plain(value: Any, indent: int | None = None) -> str:
    """JSON without times; values and nodes of a graph by their names."""
    return _TIMED.sub("TIME", json.dumps(_plain(value), indent=indent, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not (isinstance(k, str) and _TIMES.search(k))}
    if isinstance(value, (ir.Value, ir.Node)):
        return value.name
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} #{digest(np.ascontiguousarray(value).tobytes())}"
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, map(_plain, value)))
    return value if value is None or isinstance(value, (str, int, float, bool)) else value.item() if hasattr(value, "item") else str(value)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tensor_text(tensor: Any) -> str:
    kind = f"{tensor.dtype.name}{list(tensor.shape.numpy())}"
    if tensor.dtype == ir.DataType.STRING:
        return f"{kind} #{digest(b'|'.join(tensor.string_data()))}"
    small = f" {tensor.numpy().tolist()}" if tensor.size <= 8 else ""
    return f"{kind} #{digest(tensor.tobytes())}{small}"


def lines(model: ir.Model) -> Iterator[str]:
    """The graph without its weights: header, functions, and one node a line."""
    yield f"ir {model.ir_version} opsets {sorted(model.opset_imports.items())} by {model.producer_name} {model.producer_version}"
    yield from (f"metadata {key}: {text}" for key, text in sorted(model.metadata_props.items()))
    yield from graph_lines(model.graph, "")
    for function in model.functions.values():
        yield from graph_lines(function, "")


def graph_lines(graph: Any, indent: str) -> Iterator[str]:
    yield f"{indent}{graph.name} ({', '.join(map(typed, graph.inputs))}) => ({', '.join(map(typed, graph.outputs))}){noted(graph)}"
    yield from (f"{indent}  {typed(value)}" for value in getattr(graph, "initializers", {}).values())
    for node in graph:
        own = dict(sorted(node.attributes.items()))
        inner = [g for attr in own.values() for g in _graphs(attr)]
        words = ", ".join(f"{name}={attribute(attr)}" for name, attr in own.items() if not _graphs(attr))
        reads = ", ".join("" if v is None else str(v.name) for v in node.inputs)
        op = ".".join(filter(None, (node.domain, node.op_type, node.overload)))
        yield f"{indent}  {node.name}: {', '.join(map(typed, node.outputs))} = {op}<{words}>({reads}){noted(node)}"
        for graph_of in inner:
            yield from graph_lines(graph_of, indent + "    ")


def _graphs(attr: Any) -> list[Any]:
    return [attr.value] if attr.type == ir.AttributeType.GRAPH else list(attr.value) if attr.type == ir.AttributeType.GRAPHS else []


def attribute(attr: Any) -> str:
    if attr.is_ref():
        return f"@{attr.ref_attr_name}"
    return tensor_text(attr.value) if attr.type == ir.AttributeType.TENSOR else str(attr.value)


def typed(value: ir.Value) -> str:
    return (
        f"{value.name}: {value.dtype.name if value.dtype is not None else value.type}{value.shape if value.shape is not None else ''}{noted(value)}"
    )


def noted(thing: Any) -> str:
    """What an exporter or a pass wrote to it, and its documentation."""
    found = json.dumps([sorted(thing.metadata_props.items()), getattr(thing, "doc_string", None) or ""])
    return "" if found == '[[], ""]' else f" !{digest(found.encode())}"


def weights(model: ir.Model) -> list[str]:
    return list(weights_of(model.graph))


def weights_of(graph: Any) -> Iterator[str]:
    for name, value in graph.initializers.items():
        yield f"{name}: {'none' if value.const_value is None else tensor_text(value.const_value)}"
    for node in graph:
        for attr in node.attributes.values():
            for inner in _graphs(attr):
                yield from weights_of(inner)
