"""Which nodes a lossy pass looks at: include= and exclude=."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from graphopt.core.errors import PipelineError
from graphopt.core.options import near
from graphopt.graph.questions import all_nodes, origins


def passed_over(node: ir.Node, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why `include` and `exclude` leave this node out, by its name here or in the input model."""
    names = {node.name or "", *origins(node)}
    if include and not any(fits(n, include) for n in names):
        return f"not among include={'+'.join(include)}"
    return f"excluded by exclude={'+'.join(exclude)}" if any(fits(n, exclude) for n in names) else None


def fits(name: str, patterns: Iterable[str]) -> bool:
    return any(name == p or fnmatch.fnmatchcase(name, p) for p in patterns)


def check_patterns(model: ir.Model, patterns: Sequence[str], anchors: Iterable[str]) -> None:
    """Raises PipelineError for a pattern that fits the name of no node of these types, here or in the input model."""
    if not patterns:
        return
    nodes = [n for n in all_nodes(model) if n.op_type in anchors]
    names = {name for n in nodes for name in ((n.name or ""), *origins(n))}
    for pattern in patterns:
        if not any(fits(name, (pattern,)) for name in names):
            raise PipelineError(f"`{pattern}` fits the name of no MatMul, Gemm or Gather{near(pattern, names)}")
