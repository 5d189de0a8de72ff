"""quantize{mode=weight-only method=awq}: scaled input channels and clipped blocks, where the graph allows both."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from test_weight_only import Quantized, node, proto, rng, stored_bytes

import graphopt
from graphopt.compress.quantize.awq import channel_scale, scale_inputs
from graphopt.compress.quantize.grids import steps
from graphopt.core.contract import Context
from graphopt.core.errors import PassError, PipelineError
from graphopt.core.pipeline import parse
from graphopt.core.registry import passes
from graphopt.run.ort import session
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]
K, N = 128, 64
SIZE = np.exp(rng(4).standard_normal(K) * 1.5).astype(np.float32)  # of the channels behind the norm


def weights(k: int = 1, rows: int = K, columns: int = N) -> Array:
    return rng(k).standard_normal((rows, columns)).astype(np.float32)


def normed(norm: str = "RMSNormalization") -> onnx.ModelProto:
    """A norm whose scale makes some channels large, and two multiplies that read it."""
    bias = {"b": np.linspace(-1, 1, K, dtype=np.float32)} if norm == "LayerNormalization" else {}
    text = "x s b" if bias else "x s"
    nodes = [node(norm, text, "h", axis=-1), node("MatMul", "h v", "y"), node("MatMul", "h w", "z")]
    made = proto(nodes, {"s": SIZE, "v": weights(1), "w": weights(2), **bias}, f"x:B,{K}", "y z")
    made.opset_import[0].version = 23
    return made


def gated() -> onnx.ModelProto:
    """up, a gate, down: the channels of up have very different sizes."""
    up = weights(1, 64, K) * SIZE
    nodes = [node("MatMul", "x g", "a"), node("Sigmoid", "a", "c"), node("MatMul", "x u", "t"), node("Add", "t b", "up"),
             node("Mul", "c up", "h"), node("MatMul", "h w", "y")]  # fmt: skip
    return proto(nodes, {"g": weights(3, 64, K), "u": up, "b": SIZE / 4, "w": weights(2)}, "x:B,64")


def feeds(width: int = K, seed: int = 0, count: int = 4) -> list[dict[str, Array]]:
    return [{"x": rng(seed + k).standard_normal((96, width)).astype(np.float32)} for k in range(count)]


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
@pytest.mark.parametrize("options", ["bits=4", "bits=4 symmetric=false", "bits=4 codes=nf4"])
def test_channels_are_scaled_behind_a_norm(norm: str, options: str) -> None:
    source, held_out = normed(norm), feeds(seed=50)[0]
    nearest = Quantized(source, options)
    made = Quantized(source, f"{options} method=awq", samples=Samples(feeds()))
    assert made.changes == [3]  # the scaling, two multiplies
    (remark,) = [r for r in made.remarks if "strength" in r.facts]
    assert 0 < remark.facts["strength"] < 1
    assert remark.facts["after"] < 0.95 * remark.facts["before"]
    for output in ("y", "z"):
        assert made.error(held_out, output) < 0.95 * nearest.error(held_out, output)


def test_channels_are_scaled_through_a_gate() -> None:
    source, held_out = gated(), feeds(64, 50)[0]
    nearest, made = Quantized(source, "bits=4"), Quantized(source, "bits=4 method=awq", samples=Samples(feeds(64)))
    assert any(r.facts.get("strength") and r.node == "/y/MatMul" for r in made.remarks)
    assert made.error(held_out) < 0.95 * nearest.error(held_out)


def test_a_reader_that_stays_float_forbids_the_scaling() -> None:
    source = normed()
    text = "quantize{mode=weight-only bits=4 method=awq exclude=/y/MatMul}"
    made = Quantized(source, text, samples=Samples(feeds()))
    assert made.changes == [1]  # `/y/MatMul` stays float, so nothing is scaled, and only `/z/MatMul` is quantized
    assert "/z/MatMul: its input channels are not scaled: all that read `h` would have to be quantized" in made.told()
    assert made.error(feeds(seed=50)[0], "y") == 0


@pytest.mark.parametrize("source", [normed(), normed("LayerNormalization"), gated()])
def test_the_scaling_is_exact(source: onnx.ModelProto) -> None:
    """Before anything is rounded, the graph computes what it did."""
    model, given = graphopt.load(source), feeds(K if len(source.graph.node) == 3 else 64)

    def rounded(rows: Array, moments: Array) -> Array:
        grid = steps(rows, 32, 4, moments=moments)
        return grid.decode(grid.round(rows))

    assert scale_inputs(model, Context(model, samples=Samples(given)), lambda linear: True, rounded) == 1
    assert any(str(name).endswith("_awq") for name in model.graph.initializers)
    base, got = (session(m, optimize=False).run(given[0])["y"] for m in (source, model))
    np.testing.assert_allclose(got, base, rtol=0, atol=1e-5 * np.abs(base).max())


def test_what_cannot_be_folded_keeps_its_scale() -> None:
    """x comes from outside: only the blocks are clipped, which is no worse than to nearest."""
    source = proto([node("MatMul", "x w", "y")], {"w": weights() ** 3}, f"x:B,{K}")
    mixed = rng(9).standard_normal((12, K)).astype(np.float32)
    samples = [{"x": f["x"][:, :12] @ mixed} for f in feeds()]
    made = Quantized(source, "bits=4 method=awq", samples=Samples(samples[:3]))
    assert made.changes == [1]
    assert "/y/MatMul: its input channels are not scaled: no norm" in made.told()
    assert made.error(samples[3]) < Quantized(source, "bits=4").error(samples[3])


def test_a_table_that_is_looked_up_too_is_not_scaled() -> None:
    table = weights(5, 300, K)
    nodes = [node("Gather", "t ids", "e"), node("RMSNormalization", "e s", "h", axis=-1), node("MatMul", "h w", "y")]
    source = proto(nodes, {"t": table, "s": SIZE, "w": table.T.copy()}, "ids:B,S")
    source.opset_import[0].version = 23
    made = Quantized(source, "bits=4 method=awq", samples=Samples([{"ids": np.arange(300).reshape(10, 30)}]))
    assert made.changes == [2]
    assert not any("strength" in r.facts for r in made.remarks)
    assert stored_bytes(made.graph) <= 300 * K // 2 + 300 * K // 32 * 4 + K * 4


def test_even_channels_are_left_alone() -> None:
    source = proto([node("RMSNormalization", "x s", "h", axis=-1), node("MatMul", "h w", "y")],
                   {"s": np.ones(K, np.float32), "w": weights()}, f"x:B,{K}")  # fmt: skip
    source.opset_import[0].version = 23
    made = Quantized(source, "bits=4 method=awq", samples=Samples(feeds()))
    assert made.changes == [1]
    assert "no strength lowers the output error" in made.told()


def test_together_with_gptq() -> None:
    source, held_out = normed(), feeds(seed=50)[0]
    one, both = (Quantized(source, f"bits=4 method={m}", samples=Samples(feeds())).error(held_out) for m in ("awq", "awq-gptq"))
    assert both < 1.1 * one


def test_the_scale_of_a_channel() -> None:
    moments = np.diag(np.array([4.0, 1.0, 0.25, 0.0], np.float32))
    scale = channel_scale(moments, 0.5)
    np.testing.assert_allclose(scale[:3] / scale[1], [2**0.5, 1, 0.5**0.5], rtol=1e-6)
    assert np.isfinite(scale).all()
    np.testing.assert_allclose(scale.max() * scale.min(), 1, rtol=1e-5)
    assert (channel_scale(np.zeros((3, 3), np.float32), 0.5) == 1).all()


def test_blocks_are_clipped_by_the_error_of_their_products() -> None:
    """For inputs that go together, the sum of the errors counts; the grid of all moments has less of it than that of their diagonal."""
    w = rng(1).standard_t(3, (40, 70)).astype(np.float32)
    x = rng(2).standard_normal((200, 5)) @ rng(3).standard_normal((5, 70))
    moments = (x.T @ x / 200).astype(np.float32)

    def cost(**options: Any) -> float:
        grid = steps(w, 32, 4, **options)
        off = grid.decode(grid.round(w)) - w
        return sum(float(np.square(off[:, a : a + 32] @ x.T[a : a + 32]).sum()) for a in (0, 32, 64))

    assert cost(moments=moments) < 0.9 * cost(importance=np.diag(moments)) < cost()


def test_awq_needs_samples() -> None:
    with pytest.raises(PassError, match="needs samples"):
        Quantized(normed(), "bits=4 method=awq")
    with pytest.raises(PipelineError, match="`method` expects nearest or gptq in"):
        parse("quantize{mode=weight-only bits=4 codes=kmeans method=awq}", passes())
