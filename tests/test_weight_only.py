"""quantize{mode=weight-only}: 4 and 8 bits in blocks, in every layout, stored once, and what the CPU targets make of it.

The yardstick: per output column j, e_j = ||y_j - q_j|| / ||y_j|| over random rows, for columns whose sizes differ by 10^4. One scale for all,
or scales along the wrong axis, give about 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.analysis.linear import Linears
from graphopt.calibration.moments import input_moments
from graphopt.core.contract import Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes, targets
from graphopt.core.remarks import Remark
from graphopt.driver.transaction import TransactionManager
from graphopt.graph.interface import interface
from graphopt.graph.verify import verify
from graphopt.run.ort import session
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
K, N = 96, 24
BOUNDS = {"bits=8": 0.008, "bits=8 block=32": 0.0075, "bits=8 symmetric=false": 0.009, "bits=4 block=16": 0.1, "bits=4": 0.11,
          "bits=4 block=32 symmetric=false": 0.1, "bits=4 block=64": 0.13}  # fmt: skip
CLOSE = 3e-6  # of the largest output: the same products, added in another order


def rng(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


def columns(k: int = K, n: int = N) -> Array:
    return (rng().standard_normal((k, n)) * np.logspace(-3, 1, n)).astype(np.float32)


def rows(k: int = K) -> Array:
    return rng(3).standard_normal((128, k)).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(" "), [output], name=f"/{output}/{op}", **attributes)


def value(text: str) -> onnx.ValueInfoProto:
    name, _, dims = text.partition(":")
    kind = TensorProto.INT64 if name.startswith("ids") else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, [int(d) if d.isdigit() else d for d in dims.split(",")] if dims else None)


def proto(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Array], inputs: str = f"x:B,{K}", outputs: str = "y") -> onnx.ModelProto:
    stored = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [value(t) for t in inputs.split(" ")], [value(t) for t in outputs.split(" ")], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


class Quantized:
    """A model quantized, and lowered for a target; both checked against each other."""

    def __init__(self, source: onnx.ModelProto, options: str = "", where: str = "cpu{tune=off}", samples: Samples | None = None) -> None:
        self.source, self.graph = source, graphopt.load(source)
        (self.target,) = parse(where, targets(), "target")
        public = interface(self.graph)
        text = options if options.startswith("quantize") else f"quantize{{mode=weight-only {options}}}"
        records = PassManager(parse(text, passes())).run(self.graph, Context(self.graph, samples=samples))
        verify(self.graph, interface=public)
        self.changes = [record.changes for record in records]
        self.remarks: list[Remark] = [r for record in records for r in record.remarks]
        again = PassManager(parse(text.partition("}")[0] + "}", passes())).run(self.graph, Context(self.graph, samples=samples))
        assert again[0].changes == 0, "a second run must change nothing"
        self.model = self.graph.clone()
        PassManager(list(self.target.lowerings())).run(self.model, Context(self.model, target=self.target))
        verify(self.model, interface=public)

    def count(self, *op_types: str) -> list[int]:
        every = [n.op_type for n in ir.traversal.RecursiveGraphIterator(self.model.graph)]
        return [every.count(op) for op in op_types]

    def error(self, feeds: Mapping[str, Array], name: str = "y") -> float:
        """The worst column against the float input; the lowered graph gives the numbers of the quantized one, runtime optimizations on and off."""
        base, decoded = (session(m, optimize=False).run(feeds) for m in (self.source, self.graph))
        for optimize in (False, True):
            got = session(self.model, optimize=optimize).run(feeds)
            for key, expected in decoded.items():
                assert got[key].dtype == expected.dtype
                np.testing.assert_allclose(got[key], expected, rtol=0, atol=CLOSE * (1 + np.abs(expected).max()))
        axes = tuple(range(base[name].ndim - 1))
        return float(np.sqrt(np.square(base[name] - decoded[name]).sum(axes) / np.square(base[name]).sum(axes)).max())

    def told(self, kind: str = "missed") -> str:
        return "\n".join(f"{r.node}: {r.message}" for r in self.remarks if r.kind == kind)


def stored_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


W, BIAS = columns(), np.linspace(-3, 3, N, dtype=np.float32)
LAYOUTS: dict[str, tuple[list[onnx.NodeProto], dict[str, Array], int]] = {  # the last: the axis of the input features
    "MatMul": ([node("MatMul", "x w", "y")], {"w": W}, 0),
    "Gemm": ([node("Gemm", "x w b", "y", alpha=0.5, beta=2.0)], {"w": W, "b": np.zeros(N, np.float32)}, 0),
    "Gemm transB": ([node("Gemm", "x w b", "y", transB=1)], {"w": W.T.copy(), "b": np.zeros((1, N), np.float32)}, 1),
    "Transpose on the weight": ([node("Transpose", "w", "wt", perm=[1, 0]), node("MatMul", "x wt", "y")], {"w": W.T.copy()}, 1),
}


@pytest.mark.parametrize("options", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_yardstick(layout: str, options: str) -> None:
    nodes, weights, axis = LAYOUTS[layout]
    made = Quantized(proto(nodes, weights), options)
    assert made.changes == [1]
    assert 0 < made.error({"x": rows()}) <= BOUNDS[options]
    assert made.count("MatMulNBits", "DequantizeLinear", "MatMul", "Gemm") == [1, 0, 0, 0]
    fact = next(r for r in made.remarks if r.kind == "applied").facts
    assert fact["axis"] == (axis if fact["block"] else 1 - axis)
    assert 0 < fact["worst_error"] <= 1.1 * BOUNDS[options]
    linear = Context(made.graph).get(Linears())[0]
    expected = rows() @ linear.matrix() * linear.alpha  # the dequantized weight, in numpy
    np.testing.assert_allclose(made.target.session(made.model).run({"x": rows()})["y"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_wrong_scale_fails_the_yardstick() -> None:
    made = Quantized(proto(*LAYOUTS["MatMul"][:2]), "bits=4")
    scale = next(v for v in made.graph.graph.initializers.values() if v.name and v.name.endswith("_scale"))
    assert scale.const_value is not None
    scale.const_value = ir.tensor(np.roll(scale.const_value.numpy(), 1, axis=1), name=scale.name)
    base, got = (session(m, optimize=False).run({"x": rows()})["y"] for m in (made.source, made.graph))
    assert np.sqrt(np.square(base - got).sum(0) / np.square(base).sum(0)).max() > 3 * BOUNDS["bits=4"]
    with pytest.raises(AssertionError):  # and the lowered graph no longer agrees with it
        made.error({"x": rows()})


def test_a_short_last_block() -> None:
    """70 input features in blocks of 32: the runtime pads the codes, the scales are three to a row."""
    w = columns(70, N)
    for options in ("bits=4", "bits=8 block=32", "bits=4 symmetric=false"):
        made = Quantized(proto([node("MatMul", "x w", "y")], {"w": w}, "x:B,70"), options)
        assert made.count("MatMulNBits") == [1]
        assert made.error({"x": rows(70)}) <= 0.12


def test_batches_of_matrices_and_transposed_inputs_stay_in_the_standard_form() -> None:
    w = rng().standard_normal((3, 64, 16)).astype(np.float32)
    made = Quantized(proto([node("MatMul", "x w", "y")], {"w": w}, "x:3,S,64"), "block=32")
    assert made.count("MatMulNBits", "DequantizeLinear") == [0, 1]
    assert made.error({"x": rng(1).standard_normal((3, 9, 64)).astype(np.float32)}) <= 0.02
    refused = Quantized(proto([node("MatMul", "x w", "y")], {"w": w}, "x:3,S,64"))
    assert refused.changes == [0]
    assert "a batch of matrices, which wants a block" in refused.told()
    turned = Quantized(proto([node("Gemm", "x w", "y", transA=1)], {"w": W}, f"x:{K},B"), "bits=4")
    assert turned.count("MatMulNBits", "DequantizeLinear") == [0, 1]
    assert turned.error({"x": rows().T.copy()}) <= BOUNDS["bits=4"]


# ---- tables and what is tied to them (C01, C03) --------------------------------------------------------------------------------------

TABLE = rng().standard_normal((250, 64)).astype(np.float32)  # too small for the door to tie it to its transpose


def tied(transposed: Array, outputs: str = "y") -> onnx.ModelProto:
    return proto([node("Gather", "w ids", "h"), node("MatMul", "h wt", "y")], {"w": TABLE, "wt": transposed}, "ids:B,S", outputs)


@pytest.mark.parametrize(
    ("options", "size"),
    [("bits=4", 250 * 32 + 250 * 2 * 4), ("bits=8 block=32", 250 * 64 + 250 * 2 * 4), ("bits=8", 250 * 64 + 250 * 4),
     ("bits=4 symmetric=false", 250 * 32 + 250 * 2 * 4 + 250)],
)  # fmt: skip
def test_a_tied_table_is_stored_once(options: str, size: int, tmp_path: Path) -> None:
    made = Quantized(tied(TABLE.T.copy()), options)
    assert made.changes == [2]
    assert stored_bytes(made.graph) == size
    assert any(r.facts.get("tied_to") == "/h/Gather" for r in made.remarks)
    assert made.count("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear") == [1, 1, 0]
    assert stored_bytes(made.model) <= size + 16 + 8
    assert made.error({"ids": rng().integers(0, 250, (4, 9))}) <= 0.25
    made.target.save(made.model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size <= size + 2500
    report = made.target.report(made.model)
    assert report["tables"] == [entry["name"] for entry in report["float"]]
    assert report["integer"] == []


def test_what_is_not_tied_is_stored_twice() -> None:
    other = TABLE.T.copy()
    other[5, 5] += 1e-3
    made = Quantized(tied(other), "bits=4")
    assert stored_bytes(made.graph) == 2 * (250 * 32 + 250 * 2 * 4)
    assert not any("tied_to" in r.facts for r in made.remarks)


def test_two_widths_in_two_steps() -> None:
    """The table 8 bits, the rest 4: the second pass leaves alone what is quantized."""
    nodes = [node("Gather", "w ids", "h"), node("MatMul", "h a", "t"), node("MatMul", "t wt", "y")]
    source = proto(nodes, {"w": TABLE, "wt": TABLE.T.copy(), "a": columns(64, 64)}, "ids:B,S")
    text = "quantize{mode=weight-only block=32 include=/h/Gather+/y/MatMul}, quantize{mode=weight-only bits=4 block=32}"
    made = Quantized(source, text)
    assert made.changes == [2, 1]
    assert stored_bytes(made.graph) == 250 * 64 + 250 * 2 * 4 + 64 * 32 + 64 * 2 * 4
    assert made.count("MatMulNBits", "GatherBlockQuantized") == [2, 1]
    made.error({"ids": rng().integers(0, 250, (2, 5))})


def test_rows_that_the_block_does_not_divide() -> None:
    table = rng().standard_normal((300, 80)).astype(np.float32)
    source = proto([node("Gather", "t ids", "y")], {"t": table}, "ids:B,S")
    made = Quantized(source, "bits=4 block=32")
    assert made.changes == [0]
    assert "rows of 80 numbers are no multiple of block=32" in made.told()
    fits = Quantized(source, "bits=4 block=16")
    assert fits.count("GatherBlockQuantized") == [1]
    fits.error({"ids": np.arange(300).reshape(3, 100)})
    assert Quantized(source, "bits=4 block=16 embeddings=false").changes == [0]


# ---- names, reports, options (C18, C19, C21) -----------------------------------------------------------------------------------------


def test_outputs_keep_their_names() -> None:
    nodes = [node("Gather", "w ids", "rows"), node("MatMul", "rows a", "audio_features"), node("MatMul", "audio_features b", "y")]
    source = proto(nodes, {"w": TABLE, "a": columns(64, 64), "b": columns(64, 64)}, "ids:B,S", "rows audio_features y")
    made = Quantized(source, "bits=4")
    assert made.changes == [3]
    assert [v.name for v in made.model.graph.outputs] == ["rows", "audio_features", "y"]
    made.error({"ids": rng().integers(0, 250, (3, 5))})


def test_names_that_the_pass_wants_are_taken() -> None:
    weights = {name: rng(k).standard_normal((64, 64)).astype(np.float32) for k, name in enumerate(("w", "w2", "w_zero_point"))}
    nodes = [node("MatMul", "x w", "w_scale"), node("MatMul", "w_scale w2", "w_uint4"), node("MatMul", "w_uint4 w_zero_point", "y")]
    for n in nodes:
        n.name = ""
    made = Quantized(proto(nodes, weights, "x:B,64"), "bits=4 symmetric=false")
    assert made.changes == [3]
    assert made.error({"x": rows(64)}) <= 0.25
    again = PassManager(parse("quantize{mode=weight-only}", passes())).run(made.graph, Context(made.graph))[0]
    assert any("3 weights are quantized already" in r.message for r in again.remarks)


@pytest.mark.parametrize("where", ["cpu{tune=off}", "quantized{tune=off}", "cpu{tune=off vendor=false}"])
def test_the_report_says_that_it_computes_floats(where: str) -> None:
    """C21."""
    (target,) = parse(where, targets(), "target")
    model = graphopt.load(proto(*LAYOUTS["MatMul"][:2]))
    PassManager(parse("quantize{mode=weight-only}", passes())).run(model, Context(model))
    PassManager(list(target.lowerings())).run(model, Context(model, target=target))
    report = target.report(model)
    domains = {n.domain for n in model.graph}
    assert domains == ({""} if "vendor=false" in where else {"com.microsoft"})
    if "vendor=false" not in where:
        assert (report["integer"], len(report["float"])) == ([], 1)


@pytest.mark.parametrize("options", ["bits=4", "bits=8 block=64", "bits=8"])
@pytest.mark.parametrize("layout", ["MatMul", "MatMul with bias", "Gemm transB"])
def test_the_report_tells_what_the_runtime_makes_of_the_standard_form(layout: str, options: str, tmp_path: Path) -> None:
    """vendor=false: what the report calls integer rounds activations in a plain session on the saved file, and what it calls float does not."""
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((256, 96)).astype(np.float32), np.linspace(-1, 1, 96, dtype=np.float32)
    nodes = {
        "MatMul": [node("MatMul", "x w", "y")],
        "MatMul with bias": [node("MatMul", "x w", "t"), node("Add", "t b", "y")],
        "Gemm transB": [node("Gemm", "x w b", "y", transB=1)],
    }[layout]
    weights = {"w": w.T.copy() if "transB" in layout else w} | ({} if layout == "MatMul" else {"b": b})
    source = proto(nodes, weights, "x:B,256")
    result = graphopt.optimize(source, f"quantize{{mode=weight-only {options}}}", target="cpu{vendor=false tune=off}", promise=False)
    result.save(tmp_path / "model.onnx")
    feed = {"x": rng.standard_normal((8, 256)).astype(np.float32)}
    exact, got = (session(tmp_path / "model.onnx", optimize=on).run(feed)["y"] for on in (False, True))
    off = float(np.abs(got - exact).max() / np.abs(exact).max())
    report = result.report.as_dict()["target"]
    rounded = [entry["name"] for entry in report.get("rounded_at_load", [])]
    assert rounded == report["integer"]
    assert len(report["integer"]) + len(report["float"]) == 1
    assert (off > 1e-3) is bool(rounded), off
    assert bool(rounded) is ("MatMul" in layout), "it fuses no Gemm"
    assert "session.qdq_matmulnbits_accuracy_level=0" in str(report.get("rounded_at_load")) or not rounded


def made_table() -> Sequence[Any]:
    """The spellings that are tried unless asked for more: none of them rounds activations."""
    table: Sequence[Any] = parse("cpu", targets(), "target")[0].spellings()
    assert not any(s.name == "int8-blocks" for s in table)
    return table


def test_rounded_activations_are_judged_by_their_loss() -> None:
    """Over the budget the multiply stays in blocks, of floats."""
    model = graphopt.load(proto(*LAYOUTS["MatMul"][:2]))
    parse("quantize{mode=weight-only block=32}", passes())[0].run(model, Context(model))
    spelling = next(s for s in parse("cpu{int8-blocks=true}", targets(), "target")[0].spellings() if s.name == "int8-blocks")
    made = TransactionManager(spelling.passes, loss=lambda m: float(any("accuracy_level" in n.attributes for n in m.graph)), max_loss=0.5)
    (record,) = made.run(model, Context(model))
    assert (record.name, record.changes) == ("spell-blocked-matmul", 1)
    assert [n.op_type for n in model.graph] == ["MatMulNBits"]


def test_eight_bit_activations_are_called_integers() -> None:
    assert len(list(parse("cpu{int8-blocks=true}", targets(), "target")[0].spellings())) == len(list(made_table())) + 1
    made = Quantized(proto(*LAYOUTS["MatMul"][:2]), "block=32")
    product = next(n for n in made.model.graph if n.op_type == "MatMulNBits")
    product.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)
    report = made.target.report(made.model)
    assert (len(report["integer"]), report["float"]) == (1, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [("mode=weight-only bits=3", "expects 8 or 4"), ("mode=weight-only block=48", "`block` expects 0 or 16"), ("bits=4", "expects 8 in"),
     ("mode=weight-only method=magic", "expects nearest or gptq"), ("method=gptq", "expects nearest in"), ("block=32", "`block` expects 0 in")],
)  # fmt: skip
def test_options_that_do_not_exist(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse(f"quantize{{{text}}}", passes())


# ---- GPTQ ----------------------------------------------------------------------------------------------------------------------------


def calibration(count: int = 6) -> Samples:
    """Rows whose features depend on each other, as those of a network do."""
    mixing = rng(5).standard_normal((12, K))
    generator = rng(6)
    return Samples([{"x": (generator.standard_normal((64 + k, 12)) @ mixing + 0.1 * generator.standard_normal((64 + k, K))).astype(np.float32)}
                    for k in range(count)])  # fmt: skip


def test_moments_are_those_of_all_batches() -> None:
    model = graphopt.load(proto([node("Relu", "x", "r"), node("MatMul", "r w", "y")], {"w": W}))
    values = [model.graph.inputs[0], next(iter(model.graph)).outputs[0]]
    every = np.concatenate([batch["x"] for batch in calibration()])
    for limit in (1, 2**30):  # one run for each value, or one for both
        found = dict(input_moments(Context(model, samples=calibration()), values, limit=limit))
        for v, x in zip(values, (every, np.maximum(every, 0)), strict=True):
            np.testing.assert_allclose(found[v], x.T @ x / len(x), rtol=1e-3, atol=1e-4 * np.square(x).max())


@pytest.mark.parametrize("options", ["bits=4", "bits=4 symmetric=false", "bits=4 block=16"])
@pytest.mark.parametrize("layout", ["MatMul", "Gemm transB"])
def test_gptq_keeps_the_output_nearer(layout: str, options: str) -> None:
    source = proto(*LAYOUTS[layout][:2])
    feeds = list(calibration(9))[8]  # not among the six that it sees
    nearest = Quantized(source, options).error(feeds)
    solved = Quantized(source, f"{options} method=gptq", samples=calibration())
    assert solved.count("MatMulNBits") == [1]
    assert solved.error(feeds) < 0.6 * nearest


def test_gptq_needs_samples() -> None:
    with pytest.raises(PassError, match="needs samples"):
        Quantized(proto(*LAYOUTS["MatMul"][:2]), "bits=4 method=gptq")


def test_weights_of_branches_are_stored_once() -> None:
    """C12: both branches read one weight; its blocks are packed once."""

    def branch(name: str) -> onnx.GraphProto:
        return helper.make_graph([node("MatMul", "x w", name)], name, [], [value(name)])

    both = helper.make_node("If", ["cond"], ["y"], name="if", then_branch=branch("a"), else_branch=branch("b"))
    source = proto([both], {"w": columns(64, 64)}, "x:B,64")
    source.graph.input.append(helper.make_tensor_value_info("cond", TensorProto.BOOL, []))
    made = Quantized(source, "bits=4")
    assert made.changes == [2]
    assert stored_bytes(made.model) == 64 * 32 + 64 * 2 * 4
    assert made.count("MatMulNBits") == [2]
    for cond in (True, False):
        assert made.error({"x": rows(64), "cond": np.array(cond)}) <= 0.13


def test_gptq_falls_back_where_it_cannot_look() -> None:
    """A multiply inside a branch has no input that can be observed: rounded to nearest, with a remark."""
    then = helper.make_graph([node("Relu", "x", "r"), node("MatMul", "r w", "a")], "then", [], [value("a")])
    other = helper.make_graph([node("MatMul", "x v", "b")], "other", [], [value("b")])
    both = helper.make_node("If", ["cond"], ["y"], name="if", then_branch=then, else_branch=other)
    source = proto([both], {"w": W, "v": W * np.float32(0.5)})
    source.graph.input.append(helper.make_tensor_value_info("cond", TensorProto.BOOL, []))
    samples = Samples([{**batch, "cond": np.array(True)} for batch in calibration()])
    made = Quantized(source, "bits=4 method=gptq", samples=samples)
    assert made.changes == [2]
    assert "/a/MatMul: rounded to nearest: its input cannot be observed" in made.told()
    assert "/b/MatMul" not in made.told()
    assert made.error({"x": rows(), "cond": np.array(True)}) <= 0.5


def test_the_same_spelling_from_the_command_of_the_user(tmp_path: Path) -> None:
    """Through optimize, with measured spellings: the file runs, and is as small as its codes."""
    nodes = [node("Gather", "w ids", "h"), node("MatMul", "h a", "t"), node("MatMul", "t wt", "y")]
    source = proto(nodes, {"w": TABLE, "wt": TABLE.T.copy(), "a": columns(64, 64)}, "ids:B,S")
    result = graphopt.optimize(source, "canonicalize, quantize{mode=weight-only bits=4}", target="cpu", promise=False)
    path = tmp_path / "model.onnx"
    result.save(path)
    assert path.stat().st_size <= 250 * 40 + 64 * 40 + 2500
    feeds = {"ids": rng().integers(0, 250, (2, 7))}
    base, got = session(source, optimize=False).run(feeds)["y"], session(onnx.load(path)).run(feeds)["y"]
    assert np.linalg.norm(base - got) <= 0.3 * np.linalg.norm(base)


def test_bias_correction_and_awq_exclude_each_other() -> None:
    with pytest.raises(PipelineError, match="false beside method=awq"):
        parse("quantize{mode=weight-only method=awq bias-correction=true}", passes())
