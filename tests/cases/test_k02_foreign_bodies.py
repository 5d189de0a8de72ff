"""Kind 2, bodies under operators of other domains: what is written is what came, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import assert_same, parse  # type: ignore[import-not-found]
from onnx import helper

import graphopt
from graphopt.core.errors import TargetError
from graphopt.graph.opset import versions
from graphopt.graph.verify import verify
from graphopt.io.load import load
from graphopt.io.save import finish

SEARCH = """<ir_version: 8, opset_import: ["" : %d, "com.microsoft" : 1]>
g (int32[batch,seq] input_ids, float[batch,4] x) => (int32[batch,n,len] sequences, float[batch,4] y) <int32 longest = {8}, int32 beams = {2}, float[4,4] w> {
  shared = MatMul (x, w)  bias = Identity (shared)  again = Identity (shared)
  sequences = com.microsoft.BeamSearch <eos_token_id = 1, pad_token_id = 0, decoder = decoder (int32[b,s] input_ids, int32[b,s] position_ids,
      int32[b,t] attention_mask, float[2,b,2,p,4] past_0) => (float[b,s,9] logits, float[2,b,2,t,4] present_0) <float[9,4] table, float[4,9] head> {
    ids = Cast <to = 7> (input_ids)  two = Constant <value_ints: ints = [0]> ()  h = Gather (table, ids)  i = Identity (h)
    u = Unsqueeze %s  q = Squeeze %s  s = Add (q, again)  logits = MatMul (s, head)  present_0 = Identity (past_0)
  }> (input_ids, longest, , beams)
  z = Relu (bias)  y = Identity (z)
}"""
AXES = {12: "<axes = [0]> (i)", 17: "(i, two)"}


def search(opset: int, domain: str = "com.microsoft") -> onnx.ModelProto:
    squeeze = AXES[opset].replace("(i", "(u")
    proto = parse(SEARCH % (opset, AXES[opset], squeeze), w=np.eye(4, dtype=np.float32))
    (node,) = (n for n in proto.graph.node if n.op_type == "BeamSearch")
    node.domain = domain
    if domain != "com.microsoft":
        proto.opset_import[1].domain = domain
    rng = np.random.default_rng(0)
    body = node.attribute[2].g
    del body.initializer[:]
    body.initializer.extend(onnx.numpy_helper.from_array(rng.standard_normal(s, np.float32), n) for n, s in (("table", (9, 4)), ("head", (4, 9))))
    return proto


def body_of(proto: onnx.ModelProto) -> bytes:
    """Its bytes, as onnx_ir spells them: a field that is empty is not written."""
    proto = ir.to_proto(ir.from_proto(proto))
    (found,) = (a.g for n in proto.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
    return bytes(found.SerializeToString(deterministic=True))


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("domain", ["com.microsoft", "elsewhere"])
def test_k2_1_a_body_under_a_foreign_operator_stays_byte_for_byte(opset: int, level: int, domain: str, tmp_path: Path) -> None:
    """Olive#1221: names of its inputs are its interface, and it reads `again` of the graph around it by that name."""
    proto, out = search(opset, domain), tmp_path / "out.onnx"
    verify(load(proto))
    graphopt.optimize(proto, level=level, promise=False).save(out)
    written = onnx.load(out)
    assert body_of(written) == body_of(proto)
    assert {o.domain: o.version for o in written.opset_import}[""] == opset
    made = {name for n in written.graph.node for name in n.output}
    assert {"again", "y"} <= made
    assert level == 0 or [n.op_type for n in written.graph.node].count("Identity") <= 1, "what stands around it is optimized"


def test_k2_1_the_opset_rises_only_as_far_as_the_body_allows() -> None:
    """A Squeeze of opset 12 that nobody may write anew cannot stand in a file of opset 13."""
    assert versions.ceiling(load(search(17))) is None
    assert versions.ceiling(load(search(12))) == 12
    result = graphopt.optimize(search(12), level=1, promise=False)
    told = [r.message for record in result.report.passes for r in record.remarks]
    assert any("stays at opset 12" in text for text in told)
    assert "cpu{opset=12}" in str(result.target)
    newer = load(search(12))
    next(n for n in newer.graph if n.op_type == "Relu").op_type = "Mish"  # of opset 18
    with pytest.raises(TargetError, match=r"cannot write opset .*a body that is left as it is: .*queeze`"):
        finish(newer)


def test_k2_1_functions_that_only_the_body_calls_stay(tmp_path: Path) -> None:
    proto, out = search(17), tmp_path / "out.onnx"
    (node,) = (n for n in proto.graph.node if n.op_type == "BeamSearch")
    call = next(n for n in node.attribute[2].g.node if list(n.output) == ["i"])
    call.op_type, call.domain = "Same", "my"
    inner = helper.make_node("Twice", ["a"], ["c"], domain="my")
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    proto.functions.append(helper.make_function("my", "Same", ["a"], ["c"], [inner], imports))
    proto.functions.append(helper.make_function("my", "Twice", ["a"], ["c"], [helper.make_node("Add", ["a", "a"], ["c"])], imports))
    proto.functions.append(helper.make_function("my", "Unused", ["a"], ["c"], [helper.make_node("Add", ["a", "a"], ["c"])], imports))
    proto.opset_import.append(helper.make_opsetid("my", 1))
    verify(load(proto))
    graphopt.optimize(proto, level=1, promise=False).save(out)
    written = onnx.load(out)
    assert body_of(written) == body_of(proto)
    assert {f.name for f in written.functions} == {"Same", "Twice"}
    assert "my" in {o.domain for o in written.opset_import}


def test_k2_1_a_function_that_holds_a_foreign_body_is_inlined_around_it(tmp_path: Path) -> None:
    proto, out = search(17), tmp_path / "out.onnx"
    index = next(k for k, n in enumerate(proto.graph.node) if n.op_type == "BeamSearch")
    node = proto.graph.node[index]
    body = node.attribute[2].g
    next(n for n in body.node if list(n.output) == ["s"]).input[1] = "q"  # a function reads nothing of the graph around it
    before = body_of(proto)
    formal = helper.make_node("BeamSearch", ["a", "b", "", "c"], ["d"], domain="com.microsoft")
    formal.attribute.extend(node.attribute)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto.functions.append(helper.make_function("my", "Search", ["a", "b", "c"], ["d"], [formal], imports))
    call = helper.make_node("Search", ["input_ids", "longest", "beams"], ["sequences"], domain="my")
    proto.graph.node[index].CopyFrom(call)
    proto.opset_import.append(helper.make_opsetid("my", 1))
    graphopt.optimize(proto, level=1, promise=False).save(out)
    assert body_of(onnx.load(out)) == before


def test_k2_1_weights_of_a_body_in_a_data_file(tmp_path: Path) -> None:
    proto, path, out = search(17), tmp_path / "m.onnx", tmp_path / "o" / "out.onnx"
    out.parent.mkdir()
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    graphopt.optimize(path, level=1, promise=False).save(out)
    (tmp_path / "m.data").unlink()
    (body,) = (a.g for n in onnx.load(out).graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in body.initializer}
    (other,) = (a.g for n in search(17).graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
    assert_same({t.name: onnx.numpy_helper.to_array(t) for t in other.initializer}, stored)
