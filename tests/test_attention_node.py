"""What an Attention node says, and which nodes are none."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from models import parse as model_of  # type: ignore[import-not-found]

import graphopt
from graphopt.graph.attention_node import AttentionNode
from graphopt.report.inspection import attention
from graphopt.rewrite.attention import read_outputs

PACKED = "float[2,8,96] q, float[2,5,48] k, float[2,5,24] v"
SPLIT = "float[2,6,8,16] q, float[2,3,5,16] k, float[2,3,5,8] v"
CACHE = ", float[2,3,7,16] pk, float[2,3,7,8] pv"
COUNTS = "q_num_heads = 6, kv_num_heads = 3"


def node_of(inputs: str, attributes: str = "", more: str = "", out: str = "y", shapes: str = "float[?,?,?] y", opset: int = 23) -> ir.Node:
    written = f"<{attributes}>" if attributes else ""
    text = f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({shapes}) {{ {out} = Attention {written} (q, k, v{more}) }}'
    return next(iter(ir.serde.deserialize_model(model_of(text)).graph))


def read(*arguments: Any, **options: Any) -> AttentionNode:
    found = AttentionNode.of(node_of(*arguments, **options))
    assert found is not None
    return found


@pytest.mark.parametrize(("inputs", "attributes"), [(PACKED, COUNTS), (SPLIT, ""), (SPLIT, COUNTS)])
def test_heads_are_counted_and_what_is_left_out_is_none(inputs: str, attributes: str) -> None:
    a = read(inputs, attributes)
    assert (a.heads, a.kv_heads, a.group, a.head_dim, a.value_dim) == (6, 3, 2, 16, 8)
    assert a.packed == (inputs is PACKED)
    assert a.scale == pytest.approx(1 / 4)
    assert [v.name for v in a.operands] == ["q", "k", "v"]
    assert (a.mask, a.past, a.present, a.lengths, a.shown, a.precision) == (None, (None, None), (None, None), None, None, None)
    assert a.plain
    assert not a.cached
    assert read_outputs(a) == [0]


def test_a_cache_and_what_is_read_of_it() -> None:
    a = read(PACKED + CACHE, COUNTS, more=", , pk, pv", out="y, nk, nv", shapes="float[?,?,?] y, float[?,?,?,?] nv")
    assert a.mask is None
    assert [v and v.name for v in (*a.past, *a.present)] == ["pk", "pv", None, "nv"], "nothing reads the new keys"
    assert a.cached
    assert not a.plain
    assert read_outputs(a) == [0, 2]


def test_lengths_are_a_cache_too() -> None:
    a = read(PACKED + ", int64[2] n", COUNTS, more=", , , , n", opset=24)
    assert a.lengths is not None
    assert a.cached


@pytest.mark.parametrize(
    ("attributes", "name", "value"),
    [
        ("scale = 0.5", "scale", 0.5),
        ("is_causal = 1", "causal", True),
        ("softcap = 30.0", "softcap", 30.0),
        ("softmax_precision = 1", "precision", 1),
    ],
)
def test_attributes(attributes: str, name: str, value: object) -> None:
    a = read(SPLIT, attributes)
    assert getattr(a, name) == value
    assert a.plain == (name == "scale")


def test_shown_scores_and_masks() -> None:
    shown = read(SPLIT, "qk_matmul_output_mode = 3", out="y, , , p", shapes="float[?,?,?,?] y, float[?,?,?,?] p")
    assert shown.shown is not None
    assert (shown.shows, shown.plain, read_outputs(shown)) == (3, False, [0, 3])
    masks = {"float[8,5] m": False, "float[2,1,8,5] m": False, "float[2,6,8,5] m": True, "bool[6,8,5] m": True, "float m": False}
    assert {m: read(f"{SPLIT}, {m}", more=", m").mask_differs for m in masks} == masks


def test_sizes_that_are_not_known_are_0() -> None:
    a = read("float[B,H,S,D] q, float[B,H,S,D] k, float[B,H,S,D] v")
    assert (a.heads, a.kv_heads, a.head_dim, a.scale) == (0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        (PACKED, "q_num_heads = 5, kv_num_heads = 3"),
        ("float[2,8,96] q, float[2,5,64] k, float[2,5,64] v", "q_num_heads = 6, kv_num_heads = 4"),
        (PACKED, ""),
        ("float[2,6,8,16] q, float[2,5,48] k, float[2,5,48] v", COUNTS),
        ("float[8,16] q, float[5,16] k, float[5,16] v", ""),
    ],
    ids=["heads do not divide", "groups are uneven", "no numbers of heads", "3 and 4 axes", "2 axes"],
)
def test_what_breaks_the_specification_is_no_attention_node(inputs: str, attributes: str) -> None:
    assert AttentionNode.of(node_of(inputs, attributes)) is None


def test_inspect_lists_a_node_of_four_axes_that_is_causal() -> None:
    model = graphopt.load(model_of(f'<ir_version: 10, opset_import: ["": 23]> g ({SPLIT}) => (y) {{ y = Attention <is_causal = 1> (q, k, v) }}'))
    blocks, declined = attention(model)
    assert declined == []
    assert [(b["heads"], b["kv_heads"], b["head_dim"], b["value_dim"]) for b in blocks] == [(6, 3, 16, 8)]
