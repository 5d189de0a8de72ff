"""Repairs at the front door: what exporters write that no runtime runs, each with a remark."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.core.remarks import Remarks
from graphopt.graph.attention_node import LOWEST, AttentionNode, may_be_too_low
from graphopt.graph.fold import stored_bytes
from graphopt.graph.questions import all_nodes, attr, constant, consumers, rank, same_dim
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.insert import Inserter

_LARGE = 1 << 16  # bytes; below it, storing a table twice costs less than the node that would read it off the other
_ROWS = 4096


def repair(model: ir.Model, remarks: Remarks) -> int:
    """Repair `model` in place; returns how many nodes were mended.

    - RotaryEmbedding whose caches have batch 1: ONNX and its runtimes ask for the batch of x (torch 2.13 exports every rotary model so, and
      none of them runs for a batch above 1). The caches are expanded.
    - Attention whose mask has no axis for the query rows (refused), or holds -FLT_MAX (rows without keys would give zero, and not the average
      that ONNX defines): it is expanded, and raised to -1e30.
    - An embedding table whose transpose is stored a second time as the weight of the head: one of them is kept.
    """
    return _expand_caches(model, remarks) + _mend_masks(model, remarks) + _share_tables(model, remarks)


def count_axes(model: ir.Model, remarks: Remarks) -> None:
    """Transpose with axes counted from the end, which ONNX does not allow (torch 2.13's TorchScript exporter copies those of `permute`)."""
    for node in [n for n in all_nodes(model) if n.domain == "" and n.op_type == "Transpose"]:
        perm = attr(node, "perm", ())
        if any(-len(perm) <= p < 0 for p in perm):
            node.attributes["perm"] = ir.AttrInt64s("perm", [p % len(perm) for p in perm])
            remarks.warning(node.name or "", f"its perm {list(perm)} counts from the end, which runtimes refuse; it is written out", repaired=True)


def _mend_masks(model: ir.Model, remarks: Remarks) -> int:
    """Masks of Attention nodes: an axis for the query rows, and no number so low that runtimes take it for "no key"."""
    inserter = Inserter(model)
    made: dict[tuple[ir.Value, str], ir.Value] = {}
    mended = 0
    for a in [a for n in all_nodes(model) if (a := AttentionNode.of(n)) is not None]:
        node, query, mask = a.node, a.q, a.mask
        if mask is None or query.shape is None or mask.shape is None:
            continue
        low = mask.dtype == ir.DataType.FLOAT and may_be_too_low(mask)
        flat = len(mask.shape) > 1 and mask.shape[-2] == 1 and query.shape[-2] != 1
        if not low and not flat:
            continue
        key = (mask, str(query.shape[-2]) if flat else "")
        if key not in made:
            op = inserter.builder(node.graph)
            value = _not_below(op, mask, LOWEST) if low else mask
            made[key] = _for_every_row(op, value, query) if flat else value
            inserter.before(node, op)
        node.replace_input_with(3, made[key])
        mended += 1
        what = " and ".join(w for w, there in (("has no axis for the query rows", flat), ("holds the lowest finite number", low)) if there)
        remarks.warning(node.name or "", f"its mask {what}, which runtimes refuse or misread; it is written out", repaired=True)
    if mended:
        model.graph.sort()
    return mended


def _not_below(op: Builder, mask: ir.Value, lowest: float) -> ir.Value:
    """Finite numbers are raised to `lowest`; -inf stays."""
    least, raised = op.const(np.array(np.finfo(np.float32).min, np.float32), "least"), op.const(np.array(lowest, np.float32), "lowest")
    value: ir.Value = op.Where(op.Less(mask, least), mask, op.Max(mask, raised))
    return value


def _for_every_row(op: Builder, mask: ir.Value, query: ir.Value) -> ir.Value:
    axis = len(query.shape or ()) - 2
    rows = op.Shape(query, start=axis, end=axis + 1)
    value: ir.Value = op.Expand(mask, op.Concat(rows, op.const(np.array([1], np.int64), "one"), axis=0))
    return value


def _share_tables(model: ir.Model, remarks: Remarks) -> int:
    """Read the head's weight [width, rows] off the embedding table [rows, width], if every element is the same."""
    large = [v for v in model.graph.initializers.values() if rank(v) == 2 and not v.is_graph_input() and stored_bytes(v) >= _LARGE]
    tables = [v for v in large if any(n.op_type == "Gather" and n.inputs[0] is v for n in consumers(v))]
    mended = 0
    for table in tables:
        for weight in large:
            a, b = table.shape, weight.shape
            if weight is table or a is None or b is None or (a[0], a[1]) != (b[1], b[0]) or weight.dtype != table.dtype or weight.is_graph_output():
                continue
            if not weight.uses() or not _transposes(table, weight):
                continue
            _read_off(model, table, weight)
            mended += 1
            text = f"it is stored again as `{weight.name}`, transposed; one copy is kept ({stored_bytes(weight) / 1e6:.1f} MB less)"
            remarks.warning(table.name or "", text, repaired=True)
    return mended


def _read_off(model: ir.Model, table: ir.Value, weight: ir.Value) -> None:
    inserter, readers = Inserter(model), consumers(weight)
    op = inserter.builder()
    turned = op.Transpose(table, perm=[1, 0])
    inserter.before(model.graph[0], op, readers)
    weight.replace_all_uses_with(turned)
    del model.graph.initializers[str(weight.name)]


def _transposes(table: ir.Value, weight: ir.Value) -> bool:
    """Compared in blocks of rows, so that no copy of the whole is made."""
    a, b = constant(table), constant(weight)
    if a is None or b is None:
        return False
    return all(np.array_equal(a[k : k + _ROWS], b[:, k : k + _ROWS].T) for k in range(0, a.shape[0], _ROWS))


def _expand_caches(model: ir.Model, remarks: Remarks) -> int:
    inserter = Inserter(model)
    expanded: dict[tuple[ir.Value, str], ir.Value] = {}
    mended = 0
    for node in [n for n in all_nodes(model) if n.domain == "" and n.op_type == "RotaryEmbedding"]:
        x = node.inputs[0]
        if x is None or x.shape is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
            continue
        caches = node.inputs[1:3]
        if any(rank(c) != 3 or c is None or c.shape is None or c.shape[0] != 1 or same_dim(c.shape[0], x.shape[0]) for c in caches):
            continue
        for index, cache in enumerate(caches, start=1):
            assert cache is not None
            key = (cache, str(x.shape[0]))
            if key not in expanded:
                op = inserter.builder(node.graph)
                expanded[key] = op.Expand(cache, op.Concat(op.Shape(x, start=0, end=1), op.const(np.array([1, 1], np.int64), "ones"), axis=0))
                inserter.before(node, op)
            node.replace_input_with(index, expanded[key])
        mended += 1
        text = "its cos and sin caches have batch 1, which runtimes refuse for larger batches; they are expanded to the batch of x"
        remarks.warning(node.name or "", text, repaired=True)
    if mended:
        model.graph.sort()
    return mended
