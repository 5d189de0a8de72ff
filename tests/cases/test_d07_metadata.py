"""D07: the stack traces of an exporter go on request, and only they."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from tiny import tiny  # type: ignore[import-not-found]

import graphopt


@pytest.mark.parametrize("pipeline", ["strip-metadata", "canonicalize, fuse-attention, strip-metadata"])
def test_stack_traces_go_and_the_users_own_metadata_stays(tmp_path: Path, pipeline: str) -> None:
    proto = onnx.load(tiny("bert", "sdpa", "18"))
    onnx.helper.set_model_props(proto, {"vocab": "abc", "pkg.torch.of-the-model": "stays"})
    kept = next(n for n in proto.graph.node if n.op_type == "LayerNormalization")
    kept.metadata_props.add(key="mine", value="kept")
    traces = [p.value for n in proto.graph.node for p in n.metadata_props if p.key.startswith("pkg.torch")]
    assert traces, "the exporter wrote some"
    result = graphopt.optimize(proto, pipeline, target="cpu{tune=off}", promise=False)
    out = tmp_path / "out.onnx"
    result.save(out)
    stripped = onnx.load(out)
    keys = {p.key for n in stripped.graph.node for p in n.metadata_props}
    assert "mine" in keys
    assert not [k for k in keys if k.startswith("pkg.")]
    assert not [p.key for v in (*stripped.graph.value_info, *stripped.graph.output) for p in v.metadata_props if p.key.startswith("pkg.")]
    assert {"vocab": "abc", "pkg.torch.of-the-model": "stays"}.items() <= {p.key: p.value for p in stripped.metadata_props}.items()
    told = next(r for record in result.report.passes if record.name == "strip-metadata" for r in record.remarks)
    assert told.facts["bytes"] > sum(len(t.encode()) for t in traces) / 4  # fusion took nodes, and their traces, before
    assert result.report.input.metadata > result.report.output.metadata
    assert len(proto.SerializeToString()) - out.stat().st_size > told.facts["bytes"] * 0.9


def test_nothing_to_strip_changes_nothing() -> None:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    result = graphopt.optimize(proto, "strip-metadata", target="cpu{tune=off}", promise=False)
    assert [r.changes for r in result.report.passes if r.name == "strip-metadata"] == [0]
