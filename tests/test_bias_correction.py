"""quantize{bias-correction=true}: the mean error of every product goes into its bias, unless that hurts more rows than it helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from test_quantize import columns, node, ops, proto, reasons, run  # type: ignore[import-not-found]
from test_weight_only import Quantized  # type: ignore[import-not-found]

import graphopt
from graphopt.calibration.activations import LinearInputs
from graphopt.core.contract import Context
from graphopt.core.errors import PassError
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
W = np.random.default_rng(2).standard_normal((64, 16)).astype(np.float32)
B = np.linspace(-1, 1, 16, dtype=np.float32)
MODES = {"dynamic": "", "rows": "rows=true", "static": "mode=static", "8 bit": "mode=weight-only", "4 bit": "mode=weight-only bits=4 block=16"}
LAYERS: Mapping[str, tuple[list[onnx.NodeProto], dict[str, Array]]] = {
    "MatMul": ([node("MatMul", "x w", "y")], {"w": W}),
    "MatMul, Add": ([node("MatMul", "x w", "t"), node("Add", "b t", "y")], {"w": W, "b": B[None]}),
    "Gemm": ([node("Gemm", "x w", "y", alpha=0.5)], {"w": W}),
    "Gemm with bias": ([node("Gemm", "x w b", "y", transB=1, alpha=0.5, beta=3.0)], {"w": W.T.copy(), "b": B}),
    "Gemm, Add": ([node("Gemm", "x w c", "y")], {"w": W, "c": np.ones((1, 1), np.float32)}),
}


def shifted(seed: int, count: int = 200) -> Array:
    """Rows whose features have a mean of up to 3, and a spread of 0.3."""
    rng = np.random.default_rng(seed)
    mean = np.random.default_rng(9).uniform(0, 3, 64)
    return (mean + 0.3 * rng.standard_normal((count, 64))).astype(np.float32)


def quantized(source: onnx.ModelProto, options: str, x: Array | None = None) -> Any:
    samples = None if x is None else Samples([{"x": part} for part in np.array_split(x, 4)])
    return Quantized(source, f"quantize{{{options}}}", "quantized{tune=off}", samples)


def mean_error(source: onnx.ModelProto, made: Any, x: Array) -> Array:
    """Of each output feature, over the rows."""
    off: Array = (run(made.graph, {"x": x})["y"] - run(source, {"x": x})["y"]).mean(0)
    return off


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_mean_error_goes(layer: str, mode: str) -> None:
    """On rows that it has not seen; and the operators that the target writes are those of a layer with a bias."""
    source, x = proto(*LAYERS[layer]), shifted(1)
    plain = quantized(source, MODES[mode], x)
    made = quantized(source, f"{MODES[mode]} bias-correction=true", x)
    before, after = (np.abs(mean_error(source, m, shifted(2))).max() for m in (plain, made))
    assert after < 0.25 * before, "twice the correction, or none, would leave as much as before"
    assert made.error({"x": shifted(2)}) < plain.error({"x": shifted(2)})
    assert made.changes == [plain.changes[0] + 1]
    if layer in ("MatMul, Add", "Gemm with bias"):
        assert ops(made.graph, "Add") == ops(plain.graph, "Add"), "the bias that was there takes it up"
    if mode in ("dynamic", "static"):
        assert sum(made.count("DynamicQuantizeMatMul", "MatMulIntegerToFloat")) == 1
        assert made.count("Add") == [0], "the integer multiply adds it"


def test_a_mean_that_is_that_of_one_row_is_left() -> None:
    """One row of 100 is cut off by the range of the others; its error, spread over all, would cost more than it brings."""
    x = np.random.default_rng(1).standard_normal((400, 64)).astype(np.float32)
    x[::100] *= 300
    source = proto([node("MatMul", "x w", "y")], {"w": W})
    options = "mode=static calibrate=percentile percentile=98"
    plain, made = quantized(source, options, x), quantized(source, f"{options} bias-correction=true", x)
    assert "bias not corrected: it would take away -" in reasons(made.remarks)
    assert made.changes == plain.changes


def test_negligible_means_are_left() -> None:
    x = np.random.default_rng(1).standard_normal((20000, 64)).astype(np.float32)
    made = quantized(proto([node("MatMul", "x w", "y")], {"w": W}), "bias-correction=true", np.concatenate([x, -x]))
    assert made.changes == [1]
    assert "bias not corrected: it would take away" in reasons(made.remarks)
    assert ops(made.graph, "Add") == [0]


def test_two_layers_and_a_shared_bias() -> None:
    """Each product is corrected by its own error, also where both add one constant, and one reads the other."""
    nodes = [node("MatMul", "x v", "s"), node("Add", "s b", "t"), node("Relu", "t", "r"), node("MatMul", "r v", "u"), node("Add", "u b", "y")]
    source = proto(nodes, {"v": columns(64, 64), "b": np.linspace(-1, 1, 64, dtype=np.float32)})
    plain = quantized(source, "mode=weight-only bits=4", shifted(1))
    made = quantized(source, "mode=weight-only bits=4 bias-correction=true", shifted(1))
    assert made.changes == [4]
    assert len({v.name for n in made.graph.graph if n.op_type == "Add" for v in n.inputs if v is not None and v.is_initializer()}) == 2
    assert np.linalg.norm(mean_error(source, made, shifted(2))) < 0.5 * np.linalg.norm(mean_error(source, plain, shifted(2)))


def test_a_batch_of_matrices_says_so() -> None:
    w = np.random.default_rng(2).standard_normal((4, 32, 64)).astype(np.float32)
    source = proto([node("MatMul", "x w", "y")], {"w": w}, "x:4,S,32")
    made = quantized(source, "bias-correction=true", 1 + np.ones((16, 9, 32), np.float32))
    assert "bias not corrected: a batch of matrices" in reasons(made.remarks)


def test_it_needs_samples() -> None:
    with pytest.raises(PassError, match="needs samples"):
        quantized(proto(*LAYERS["MatMul"]), "bias-correction=true")


def test_the_mean_of_an_input_is_that_of_all_rows() -> None:
    model = graphopt.load(proto(*LAYERS["MatMul"]))
    x = shifted(3, 999)
    (seen,) = Context(model, samples=Samples([{"x": x[:7]}, {"x": x[7:]}])).get(LinearInputs()).values()
    np.testing.assert_allclose(seen.mean, x.mean(0, dtype=np.float64), rtol=1e-6)
