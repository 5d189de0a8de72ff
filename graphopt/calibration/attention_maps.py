"""Attention weights on samples, reduced head by head while the model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.analysis.attention import AttentionFacts, Attentions
from graphopt.calibration.enough import too_few
from graphopt.calibration.observe import Reducer, observe
from graphopt.calibration.padding import Padding
from graphopt.core.contract import Array, Context
from graphopt.graph.attention_node import PROBABILITIES, AttentionNode
from graphopt.graph.questions import all_nodes
from graphopt.run import Feeds
from graphopt.run.observe import observable

Reduce = Callable[[Array], None]


def observe_maps(model: ir.Model, samples: Iterable[Feeds], reducers: Mapping[ir.Node, tuple[int, Reduce]]) -> int:
    """Hand each batch of attention weights, [rows, heads, keys] without rows of padding, to the reducer of its attention.

    Args:
        reducers: by the Softmax or Attention node that makes the weights, with the number of its heads.

    Returns:
        the number of samples.

    Raises:
        SampleError: there was no sample.
    """
    copy = model.clone()
    twins = dict(zip(all_nodes(model), all_nodes(copy), strict=True))
    facts = Attentions().compute(copy, Context(copy))
    wanted: list[Reducer] = []
    for node, (heads, reduce) in reducers.items():
        value = _weights(twins[node], facts.get(twins[node]))
        if value is not None and observable(copy, value):
            wanted.append(Reducer((value,), reduce, functools.partial(_by_row, heads=heads)))
    return observe(copy, samples, Padding(copy), wanted, optimize=False)


def _by_row(weights: Array, heads: int) -> Array:
    """[batch, heads, rows, keys] -> [rows, heads, keys]; the heads may be merged with the batch."""
    by_row = weights.reshape(-1, heads, *weights.shape[-2:]).transpose(0, 2, 1, 3)
    return by_row.reshape(-1, *by_row.shape[2:])


def _weights(node: ir.Node, facts: AttentionFacts | str | None) -> ir.Value | None:
    """The weights of an attention; the operator is made to show them."""
    if node.op_type == "Softmax":
        return facts.probabilities if isinstance(facts, AttentionFacts) else None
    a = AttentionNode.of(node)
    if a is None or a.shown is not None:
        return a.shown if a is not None and a.shows == PROBABILITIES else None
    node.resize_outputs(4)
    for k in range(1, 4):
        if node.outputs[k].name is None:
            node.outputs[k].name = ""
    node.outputs[3].name, node.outputs[3].type = f"{node.name}/weights", node.outputs[0].type
    node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", PROBABILITIES)
    return node.outputs[3]


def mean_maps(model: ir.Model, samples: Iterable[Feeds], nodes: Mapping[ir.Node, int], total: Callable[[Array], Array]) -> dict[ir.Node, Array]:
    """For each node, as far as samples show its weights, the mean over rows of what `total` [rows, heads, keys] sums up.

    Args:
        nodes: that make the weights, with their number of heads.
    """
    sums: dict[ir.Node, tuple[Array, int]] = {}

    def reducer(node: ir.Node) -> Reduce:
        def add(weights: Array) -> None:
            before, count = sums.get(node, (np.zeros(()), 0))
            sums[node] = before + total(weights), count + len(weights)

        return add

    observe_maps(model, samples, {node: (heads, reducer(node)) for node, heads in nodes.items()})
    return {node: found / rows for node, (found, rows) in sums.items() if too_few(rows, 1) is None}


def map_distances(model: ir.Model, samples: Iterable[Feeds], nodes: Mapping[ir.Node, int]) -> dict[ir.Node, Array]:
    """How unlike the heads of an attention look: for each node [heads, heads], the mean over rows of the squared distance of their weights."""

    def products(weights: Array) -> Array:
        by_head = weights.transpose(1, 0, 2).reshape(weights.shape[1], -1)
        return (by_head @ by_head.T).astype(np.float64)

    return {node: _squared(found) for node, found in mean_maps(model, samples, nodes, products).items()}


def _squared(products: Array) -> Array:
    """Squared distances from inner products."""
    own = np.diag(products)
    return np.asarray(np.maximum(own[:, None] + own - 2 * products, 0.0))
