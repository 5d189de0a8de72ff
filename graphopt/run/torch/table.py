"""The table of operators that the torch executor knows: op type -> function(inputs, *, attributes).

The keyword arguments of a function are the attributes of the operator with the defaults of the specification, so that an attribute that a
function does not know is an error and not a wrong number; one without a default is required. `_outputs` is how many outputs the node has,
`_dtype` the type of the first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import onnx_ir as ir
import torch

from graphopt.core.errors import TargetError
from graphopt.graph.opset.node_form import schema
from graphopt.run.torch.types import kind_of, to_tensor

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

OLDEST, NEWEST = 18, 28  # opsets whose meaning the functions have; an operator that was last changed before or after them is none of the table
TABLE: dict[str, dict[int, Function]] = {}  # standard op type -> first version of the operator -> function


class MissingOp(TargetError):
    """The torch executor has no function for a node.

    Attributes:
        op_type, domain, version: the operator, and the opset that the model asks for.
        node: the name of the node.
    """

    def __init__(self, node: ir.Node, version: int | None, why: str, hint: str) -> None:
        self.op_type, self.domain, self.version, self.node = node.op_type, node.domain, version, str(node.name)
        domain = f"domain `{node.domain}`" if node.domain else "the standard domain"
        super().__init__(f"the torch executor has no `{node.op_type}` of {domain}, opset {version} (node `{node.name}`): {why}; {hint}")


def op(*names: str, since: int | None = None) -> Callable[[F], F]:
    """Enter a function for standard operators, from the version `since` of the operator on; by default the one of opset 18, or the first."""

    def entered(function: F) -> F:
        for name in names:
            TABLE.setdefault(name, {})[_first(name) if since is None else since] = function
        return function

    return entered


def enter(functions: Mapping[str, Function]) -> None:
    """Enter functions for operators that one expression of torch computes."""
    for name, function in functions.items():
        op(name)(function)


def _first(name: str) -> int:
    """The version of an operator at the oldest opset that counts, else the first that there is; 1 where the installed onnx has not heard of it."""
    found = (schema(name, version) for version in range(OLDEST, NEWEST + 1))
    return next((s.since_version for s in found if s is not None), 1)


def function_of(node: ir.Node, version: int | None, extra: Mapping[tuple[str, str], Function], dtype: torch.dtype = torch.float32) -> Function:
    """What computes a node, its attributes bound; subgraphs are not, they come as keyword arguments too. `dtype` stands for float32.

    Raises:
        MissingOp: the operator, this version of it, or one of its attributes is not in the table.
    """
    own = extra.get((node.domain, node.op_type))
    function = own or _standard(node, version)
    attributes = {name: _plain(a) for name, a in node.attributes.items() if a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)}
    known = _arguments(function)
    takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in known.values())
    unknown = sorted(set(node.attributes) - set(known)) if not takes_any else []
    if unknown:
        raise MissingOp(node, version, f"its attribute `{unknown[0]}` is not supported", _hint(node))
    if "_outputs" in known:
        attributes["_outputs"] = len(node.outputs)
    if "_dtype" in known:
        attributes["_dtype"] = _kind(node)
    if dtype != torch.float32:
        if "stash_type" in known:
            attributes.setdefault("stash_type", known["stash_type"].default)
        attributes = {name: _retyped(node, name, value, dtype) for name, value in attributes.items()}
    return functools.partial(function, **attributes) if attributes else function


def _kind(node: ir.Node) -> ir.DataType | None:
    """The element type of the first output, else of the last input: the zero point of QuantizeLinear, the pattern of CastLike."""
    last = node.inputs[-1] if len(node.inputs) > 1 else None
    return node.outputs[0].dtype or (None if last is None else last.dtype)


def _retyped(node: ir.Node, name: str, value: Any, dtype: torch.dtype) -> Any:
    """An attribute, where it says float32, for a graph that is computed in another type."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype == torch.float32 else value
    names_a_type = name in ("to", "dtype", "output_dtype", "stash_type", "softmax_precision", "_dtype")
    return kind_of(dtype) if names_a_type and value == ir.DataType.FLOAT else value


def _standard(node: ir.Node, version: int | None) -> Function:
    versions = TABLE.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if versions is None:
        raise MissingOp(node, version, "no such operator is in its table", _hint(node))
    since = None if version is None else schema(node.op_type, version)
    current = max(versions) if since is None else since.since_version
    best = max((v for v in versions if v <= current), default=None)
    if best is None:
        raise MissingOp(
            node, version, f"it knows this operator from version {min(versions)} on", "load the model by graphopt.load, which lifts it to opset 23"
        )
    latest = schema(node.op_type, NEWEST)
    if version is not None and version > NEWEST and latest is not None and latest.since_version != current:
        raise MissingOp(
            node, version, f"version {current} of the operator is newer than opset {NEWEST}, which the table was checked with", _hint(node)
        )
    return versions[best]


def _arguments(function: Function) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # a builtin of torch: it is entered for operators without attributes
        return {}


def _hint(node: ir.Node) -> str:
    return f"pass ops={{({node.domain!r}, {node.op_type!r}): function}}, or bring the model into standard operators by graphopt.load first"


def _plain(attribute: ir.Attr) -> Any:
    if attribute.is_ref():
        raise TargetError(f"the attribute `{attribute.name}` refers to a function that is not inlined; load the model by graphopt.load first")
    if attribute.type == ir.AttributeType.TENSOR:
        return to_tensor(attribute.as_tensor().numpy())
    return attribute.value
