"""Questions about a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.core.hand_on import hand_on

if TYPE_CHECKING:
    from graphopt.graph.questions import (
        Names,
        all_nodes,
        annotated,
        attr,
        bodies,
        constant,
        consumers,
        downstream,
        enclosed,
        graphs,
        initializer,
        is_constant,
        is_graph,
        metadata_bytes,
        nbytes,
        parameters,
        producer,
        rank,
        same_dim,
        same_shape,
        scalar,
        shape_text,
        static_dim,
        used_once,
    )
    from graphopt.graph.shapes import infer_nodes, infer_shapes
    from graphopt.graph.text import graph_text

__all__ = [
    "Names", "all_nodes", "annotated", "attr", "bodies", "constant", "consumers", "downstream", "enclosed", "graph_text", "graphs",
    "infer_nodes", "infer_shapes", "initializer", "is_constant", "is_graph", "metadata_bytes", "nbytes", "parameters", "producer", "rank",
    "same_dim", "same_shape", "scalar", "shape_text", "static_dim", "used_once",
]  # fmt: skip
__getattr__ = hand_on(__name__, __all__, ("questions", "shapes", "text"))
