"""The torch executor on whole models: the numbers of ONNX Runtime, the gradients of torch and of differences, errors, and the way back."""

# ruff: noqa: E402  (torch is optional: what needs it is imported after the check)

from __future__ import annotations

import copy
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from models import assert_same, minilm, parse, run, text_feeds  # type: ignore[import-not-found]
from tiny import MODELS, tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.core.errors import GraphoptError, TargetError
from graphopt.run.torch.model import TorchModel, session
from graphopt.run.torch.table import MissingOp

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def floats(*shape: int, scale: float = 1.0) -> Array:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def graph(text: str, **weights: Array) -> ir.Model:
    return graphopt.load(parse('<ir_version: 10, opset_import: ["": 23]>\n' + text, **weights))


def tensors(feeds: dict[str, Array]) -> dict[str, Any]:
    return {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}


# ---- numbers ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["sdpa_18", "sdpa_23", "eager_ts17"])
def test_minilm(route: str) -> None:
    """Rows: full, padded on the left, with holes, masked everywhere."""
    model = graphopt.load(minilm(route))
    for batch, length in ((4, 9), (1, 5)):
        feeds = text_feeds(("input_ids", "attention_mask"), batch, length)
        assert_same(run(model, feeds), TorchModel(model).run(feeds), 1e-5)


@pytest.mark.parametrize(
    ("name", "attention", "route"),
    [
        ("llama", "sdpa", "18"),
        ("llama", "sdpa", "23"),
        ("qwen3", "eager", "18"),
        ("gpt2", "sdpa", "ts17"),
        ("bert", "sdpa", "23"),
        ("vit", "sdpa", "18"),
    ],
)
def test_small_models(name: str, attention: str, route: str) -> None:
    model = graphopt.load(tiny(name, attention, route))
    feeds = {"pixel_values": floats(3, 3, 32, 32)}
    if name != "vit":
        feeds = text_feeds(("input_ids", "attention_mask"), 3, 11)
        feeds["input_ids"] %= 100
    assert_same(run(model, feeds), TorchModel(model).run(feeds), 1e-5)


def test_after_the_passes() -> None:
    """Merged projections, Gelu, RMSNormalization, RotaryEmbedding, Attention: what the passes write runs as well."""
    model = graphopt.optimize(tiny("llama", "sdpa", "18"), "canonicalize, simplify, fuse-norm, fuse-activation, fuse-rotary, fuse-attention").model
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= {node.op_type for node in model.graph}
    feeds = text_feeds(("input_ids", "attention_mask"), 3, 11)
    feeds["input_ids"] %= 100
    assert_same(run(model, feeds), TorchModel(model).run(feeds), 1e-5)


DECODER = """
g (float[B,4,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v, MASK mask, float[B,2,P,8] pk, float[B,2,P,8] pv)
  => (float[B,4,S,8] y, float[B,2,T,8] nk, float[B,2,T,8] nv) {
  y, nk, nv = Attention <ATTRIBUTES> (q, k, v, mask, pk, pv)
}"""


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("attributes", ["is_causal = 1", "is_causal = 0, scale = 0.5", "is_causal = 1, softcap = 2.0"])
def test_a_decoder_with_past_and_left_padding(kind: str, attributes: str) -> None:
    """Grouped keys; row 0 is padded on the left so that its first token sees nothing, row 1 has holes."""
    text = DECODER.replace("ATTRIBUTES", attributes).replace("MASK", f"{kind}[B,1,S,T]")
    model = ir.from_proto(parse('<ir_version: 10, opset_import: ["": 23]>' + text))  # as it stands: load repairs masks that runtimes misread
    seen = np.ones((2, 1, 5, 8), bool)
    seen[0, :, :, :4], seen[1, :, :, [1, 4]] = False, False
    mask = seen if kind == "bool" else np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)
    feeds = {
        "q": floats(2, 4, 5, 8),
        "k": floats(2, 2, 5, 8),
        "v": floats(2, 2, 5, 8),
        "mask": mask,
        "pk": floats(2, 2, 3, 8),
        "pv": floats(2, 2, 3, 8),
    }
    expected = run(model, feeds)
    assert_same(expected, TorchModel(model).run(feeds), 1e-5)
    assert_same(run(graph(text), feeds), TorchModel(graph(text)).run(feeds), 1e-5)
    given = {name: tensor.requires_grad_(tensor.is_floating_point() and name != "mask") for name, tensor in tensors(feeds).items()}
    out = TorchModel(model)(given)["y"]
    np.testing.assert_allclose(out.detach().numpy(), expected["y"], atol=1e-5)
    out.square().sum().backward()
    for name in ("q", "k", "v", "pk", "pv"):
        assert torch.isfinite(given[name].grad).all(), f"the gradient of {name} where a row sees no key"
    if "is_causal = 1" in attributes:
        assert not out[0, :, 0].any(), "the first token of row 0 sees nothing"
        assert not given["q"].grad[0, :, 0].any()


SEQUENCES = """
g (float[6,4] x) => (float[5,4] y) <int64 one = {1}> {
  s = SplitToSequence <axis = 0> (x)
  t = SequenceErase(s, one)
  y = ConcatFromSequence <axis = 0> (t)
}"""
BRANCHES = """
g (float[B,4] x, bool c) => (float[B,4] y) <float[4] w> {
  h = Mul(x, w)
  y = If(c) <then_branch = t () => (float[B,4] a) { n = Neg(h)  a = Add(n, w) }, else_branch = e () => (float[B,4] b) { b = Exp(h) }>
}"""
LOOP = """
g (float[4] x, int64 n) => (float[4] y, float[N,4] all) <float[4] w, bool yes = {1}> {
  y, all = Loop(n, yes, x) <body = b (int64 i, bool go, float[4] s) => (bool again, float[4] next, float[4] out) {
    again = Identity(go)
    f = Cast <to = 1> (i)
    scaled = Mul(s, w)
    next = Add(scaled, f)
    out = Identity(next)
  }>
}"""


CORNERS = {
    "slice from far below, backwards": ("Slice(x, a, e, d, s)", {"a": np.array([-9]), "e": np.array([-(2**62)]), "d": np.array([1]), "s": np.array([-2])}),
    "slice to far below, backwards": ("Slice(x, a, e, d, s)", {"a": np.array([9]), "e": np.array([-(2**62)]), "d": np.array([1]), "s": np.array([-2])}),
    "nearest at a tie of float32": ("Resize(x, , s)", {"s": np.array([1, 0.7], np.float32)}),
    "nearest at a tie of sizes": ("Resize(x, , , s)", {"s": np.array([4, 14])}),
    "equal values": ("ArgMax <axis = 1, select_last_index = 1> (r)", {"r": np.array([[1, 2, 2, 0, 2]], np.float32)}),
    "no axes": ("ReduceSum <noop_with_empty_axes = 1> (x)", {}),
    "integers, truncated": ("Div(i, j)", {"i": np.array([-7, 7, -6]), "j": np.array([2, -2, 4])}),
    "integers, remainder": ("Mod(i, j)", {"i": np.array([-7, 7, -6]), "j": np.array([2, -2, 4])}),
}  # fmt: skip


@pytest.mark.parametrize("case", CORNERS)
def test_corners_are_those_of_onnx_runtime(case: str) -> None:
    node, weights = CORNERS[case]
    proto = parse('<ir_version: 10, opset_import: ["": 23]>\ng (float[4,7] x) => (y) { keep = Identity(x)  y = ' + node + " }", **weights)
    feeds = {"x": floats(4, 7)}
    assert_same(run(ir.from_proto(proto), feeds), TorchModel(ir.from_proto(proto)).run(feeds))


def test_sequences() -> None:
    model = graph(SEQUENCES)
    feeds = {"x": floats(6, 4)}
    assert_same(run(model, feeds), session(model).run(feeds))


@pytest.mark.parametrize("choice", [True, False])
def test_branches_read_outer_values(choice: bool) -> None:
    model = graph(BRANCHES, w=floats(4))
    feeds = {"x": floats(3, 4), "c": np.array(choice)}
    assert_same(run(model, feeds), TorchModel(model).run(feeds))
    executor = TorchModel(model)
    executor(tensors(feeds))["y"].sum().backward()
    x = feeds["x"]
    expected = (1 - x).sum(0) if choice else (x * np.exp(x * executor.weights()["w"].detach().numpy())).sum(0)
    np.testing.assert_allclose(executor.weights()["w"].grad.numpy(), expected, rtol=1e-5)


def test_a_loop_is_run_and_derived() -> None:
    model = graph(LOOP, w=floats(4))
    feeds = {"x": floats(4), "n": np.array(3)}
    assert_same(run(model, feeds), TorchModel(model).run(feeds))
    executor = TorchModel(model)
    given = tensors(feeds)
    given["x"].requires_grad_()
    executor(given)["y"].sum().backward()
    np.testing.assert_allclose(given["x"].grad.numpy(), executor.weights()["w"].detach().numpy() ** 3, rtol=1e-5)


# ---- gradients ----------------------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_torch_module() -> None:
    """A tiny BERT: every matrix and vector of the module is found in the graph (as it is, or transposed), with the same gradient."""
    import transformers

    config_class, model_class, options = MODELS["bert"]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    module = getattr(transformers, model_class)._from_config(config, attn_implementation="sdpa").eval()
    executor = TorchModel(graphopt.load(tiny("bert", "sdpa", "18")))
    feeds = text_feeds(("input_ids", "attention_mask"), 3, 11)
    feeds["input_ids"] %= 100
    expected = module(**tensors(feeds)).last_hidden_state
    found = executor(tensors(feeds))["out"]
    assert torch.allclose(found, expected, atol=1e-5)
    for out in (expected, found):
        out.square().mean().backward()
    compared = 0
    for weight in executor.weights().values():
        for parameter in module.parameters():
            if parameter.dim() != weight.dim() or parameter.std() == 0:
                continue
            for turn in (lambda w: w, torch.t):
                if turn(weight).shape == parameter.shape and torch.equal(turn(weight), parameter):
                    assert torch.allclose(turn(weight.grad), parameter.grad, atol=1e-6, rtol=1e-4)
                    compared += 1
                    break
    assert compared >= 12, "two layers of six matrices"


OPS = {
    "attention": ("float[1,3,8] x", "y = Attention <q_num_heads = 2, kv_num_heads = 1, is_causal = 1> (x, k, k)", {"k": floats(1, 3, 4)}),
    "attention, explicit": (
        "float[1,3,8] x", "y = Attention <q_num_heads = 2, kv_num_heads = 2, softcap = 3.0> (x, k, k, m)",
        {"k": floats(1, 3, 8), "m": np.tril(np.ones((3, 3), bool))},
    ),
    "rotary": ("float[1,2,3,8] x", "y = RotaryEmbedding(x, c, s, p)", {"c": floats(5, 4), "s": floats(5, 4), "p": np.array([[1, 2, 4]])}),
    "rms": ("float[2,3,8] x", "y = RMSNormalization(x, w)", {"w": floats(8)}),
    "layer norm": ("float[2,3,8] x", "y = LayerNormalization(x, w, b)", {"w": floats(8), "b": floats(8)}),
    "layer norm, by steps": ("float[2,3,8] x", "y, m, d = LayerNormalization(x, w)", {"w": floats(8)}),
    "gelu": ("float[2,8] x", 'y = Gelu <approximate = "tanh"> (x)', {}),
    "softmax": ("float[2,8] x", "y = Softmax <axis = 0> (x)", {}),
    "einsum": ("float[2,3] x", 'y = Einsum <equation = "ij,jk->ik"> (x, w)', {"w": floats(3, 4)}),
    "gather": ("float[5,4] x", "y = Gather(x, i)", {"i": np.array([[0, -1], [2, 2]])}),
    "gather elements": ("float[3,4] x", "y = GatherElements <axis = 1> (x, i)", {"i": np.array([[0, 1], [3, 3], [-1, 0]])}),
    "gather nd": ("float[3,4] x", "y = GatherND(x, i)", {"i": np.array([[0, 1], [2, -1]])}),
    "scatter nd": ("float[3,4] x", 'y = ScatterND <reduction = "add"> (w, i, x)', {"w": floats(5, 4), "i": np.array([[0], [4], [0]])}),
    "scatter": ("float[2,3] x", "y = ScatterElements <axis = 0> (w, i, x)", {"w": floats(4, 3), "i": np.array([[0, 1, 2], [3, 2, 0]])}),
    "where": ("float[3,4] x", "y = Where(c, x, w)", {"c": np.tri(3, 4, dtype=bool), "w": floats(3, 4)}),
    "top": ("float[3,4] x", "y, i = TopK(x, k)", {"k": np.array([2])}),
    "cumulate": ("float[3,4] x", "y = CumSum <exclusive = 1> (x, k)", {"k": np.array(1)}),
    "reduce": ("float[3,4] x", "y = ReduceL2 <keepdims = 0> (x, k)", {"k": np.array([1])}),
    "conv": ("float[1,2,9] x", "y = Conv <pads = [1, 2], strides = [2], group = 2> (x, w, b)", {"w": floats(4, 1, 3), "b": floats(4)}),
    "conv transposed": ("float[1,2,5] x", "y = ConvTranspose <strides = [2], output_padding = [1]> (x, w)", {"w": floats(2, 3, 3)}),
    "average pool": ("float[1,2,6,6] x", "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x)", {}),
    "max pool": ("float[1,2,6,6] x", "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)", {}),
    "resize": ("float[1,2,4,4] x", 'y = Resize <mode = "cubic"> (x, , s)', {"s": np.array([1, 1, 1.5, 2], np.float32)}),
    "pad": ("float[1,2,4] x", 'y = Pad <mode = "reflect"> (x, p)', {"p": np.array([0, 0, 2, 0, 0, 1])}),
    "slice": ("float[3,6] x", "y = Slice(x, a, e, d, s)", {"a": np.array([5]), "e": np.array([-7]), "d": np.array([1]), "s": np.array([-2])}),
    "power": ("float[3,4] x", "y = Pow(x, k)", {"k": np.array(3, np.float32)}),
    "group norm": ("float[2,4,5] x", "y = GroupNormalization <num_groups = 2> (x, w, b)", {"w": floats(4), "b": floats(4)}),
}  # fmt: skip


@pytest.mark.parametrize("case", OPS)
def test_gradients_are_those_of_differences(case: str) -> None:
    """In float64, with respect to the input and to every float weight."""
    given, node, weights = OPS[case]
    outputs = node.split(" = ")[0].split(", ")
    model = ir.from_proto(parse(f'<ir_version: 10, opset_import: ["": 23]>\ng ({given}) => (float[N] {outputs[0]}) {{ {node} }}', **weights))
    executor = TorchModel(model, dtype=torch.float64)
    shape = [int(n) for n in given[given.index("[") + 1 : given.index("]")].split(",")]
    x = torch.from_numpy(RNG.permutation(np.prod(shape)).reshape(shape) / 7.0 - 1).requires_grad_()
    learned = [] if case == "resize" else list(executor.named_parameters())  # the factors of a resize decide sizes

    def function(x: Any, *parameters: Any) -> Any:
        replaced = dict(zip([n for n, _ in learned], parameters, strict=True))
        return torch.func.functional_call(executor, replaced, ({"x": x},))[outputs[0]]

    assert function(x, *(p for _, p in learned)).dtype == torch.float64
    assert torch.autograd.gradcheck(function, (x, *(p for _, p in learned)), atol=1e-6)


GUARD = """
g (float[N,3] x, float[N,3] mask) => (float[N,3] y) <float zero = {0}> {
  s = Add(x, mask)
  p = Softmax(s)
  bad = IsNaN(p)
  y = Where(bad, zero, p)
}"""


def test_a_row_that_sees_nothing_gets_no_gradient() -> None:
    """What TorchScript writes for attention: a row of -inf is NaN after Softmax, and then replaced by 0."""
    x, mask = floats(2, 3), np.array([[0, -np.inf, 0], [-np.inf] * 3], np.float32)
    model = graph(GUARD)
    given = {"x": torch.from_numpy(x).requires_grad_(), "mask": torch.from_numpy(mask)}
    y = TorchModel(model)(given)["y"]
    np.testing.assert_allclose(y.detach().numpy(), run(model, {"x": x, "mask": mask})["y"], atol=1e-6)
    (y * torch.arange(3.0)).sum().backward()
    share = y[0, 2].item()
    np.testing.assert_allclose(given["x"].grad.numpy(), [[-2 * share * (1 - share), 0, 2 * share * (1 - share)], [0, 0, 0]], atol=1e-6)


QDQ = """
g (float[N,4] x) => (float[N,4] y, int8[N,4] q) <float s = {0.1}, int8 z = {3}> {
  q = QuantizeLinear(x, s, z)
  y = DequantizeLinear(q, s, z)
}"""


def test_quantization_passes_the_gradient_of_what_is_not_clipped() -> None:
    model = graph(QDQ)
    x = torch.tensor([[0.04, 0.26, 100.0, -100.0]], requires_grad=True)
    executor = TorchModel(model)
    outputs = executor({"x": x})
    expected = run(model, {"x": x.detach().numpy()})
    np.testing.assert_array_equal(outputs["y"].detach().numpy(), expected["y"])
    np.testing.assert_array_equal(outputs["q"].detach().numpy(), expected["q"])
    outputs["y"].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 0, 0]]
    assert_same(expected, executor.run({"x": x.detach().numpy()}), 0)


BLOCKS = "g (float[N,4] x) => (float[N,3] y) <int4[4,3] w, float[2,3] s> { d = DequantizeLinear <axis = 0, block_size = 2> (w, s)  y = MatMul(x, d) }"
DYNAMIC = """
g (float[N,4] x) => (float[N,3] y) <float[4,3] w> {
  q, s, z = DynamicQuantizeLinear(x)
  d = DequantizeLinear(q, s, z)
  y = MatMul(d, w)
}"""


def test_four_bit_blocks_learn_their_scales() -> None:
    codes = RNG.integers(-8, 8, (4, 3)).astype(ir.DataType.INT4.numpy())
    model = graph(BLOCKS, s=floats(2, 3), w=codes)
    feeds = {"x": floats(5, 4)}
    executor = TorchModel(model)
    assert_same(run(model, feeds), executor.run(feeds))
    executor(tensors(feeds))["y"].sum().backward()
    assert list(executor.weights()) == ["s"]
    assert executor.weights()["s"].grad.abs().min() > 0


def test_four_bits_are_clipped_to_four_bits() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) <float s = {0.5}, int4 z> { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }"
    proto = parse('<ir_version: 10, opset_import: ["": 23]>' + text, z=np.array(0, ir.DataType.INT4.numpy()))
    del proto.graph.value_info[:]
    executor = TorchModel(ir.from_proto(proto))  # nothing says the type of q but its zero point
    x = np.array([[0.4, 9, -9, 1]], np.float32)
    assert executor.run({"x": x})["y"].tolist() == [[0.5, 3.5, -4, 1]]
    assert executor({"x": torch.from_numpy(x).requires_grad_()})["y"].tolist() == [[0.5, 3.5, -4, 1]]


def test_dynamic_quantization_is_straight_through() -> None:
    model = graph(DYNAMIC, w=floats(4, 3))
    feeds = {"x": floats(5, 4)}
    executor = TorchModel(model)
    assert_same(run(model, feeds), executor.run(feeds))
    given = tensors(feeds)
    given["x"].requires_grad_()
    executor(given)["y"].sum().backward()
    inside = torch.ones(5, 4, dtype=torch.bool).flatten()
    inside[[int(given["x"].argmax()), int(given["x"].argmin())]] = False  # the ends of the range also move the scale
    expected = executor.weights()["w"].detach().sum(1).expand(5, 4).flatten()
    assert torch.allclose(given["x"].grad.flatten()[inside], expected[inside], atol=1e-6)


# ---- looking inside -----------------------------------------------------------------------------------------------------------------------

MLP = """
g (float[N,4] x) => (float[N,3] y) <float[4,6] up, float[6,3] down> {
  h = MatMul(x, up)
  a = Relu(h)
  y = MatMul(a, down)
}"""


def mlp() -> ir.Model:
    return graph(MLP, up=floats(4, 6), down=floats(6, 3))


def test_values_are_observed_and_replaced() -> None:
    model = mlp()
    x = torch.from_numpy(floats(5, 4))
    executor = TorchModel(model)
    mask = torch.ones(6, requires_grad=True)
    outputs = executor({"x": x}, observe=["a", "x", "up"], edit={"a": lambda a: a * mask})
    assert list(outputs) == ["y", "a", "x", "up"]
    assert torch.equal(outputs["a"], torch.relu(x @ executor.weights()["up"]) * mask)
    outputs["y"].sum().backward()
    expected = (outputs["a"].sum(0) * executor.weights()["down"].sum(1)).detach()
    assert torch.allclose(mask.grad, expected, atol=1e-5)
    halved = executor({"x": x}, edit={"x": lambda t: t / 2, "up": lambda w: w * 2})
    assert torch.allclose(halved["y"], outputs["y"], atol=1e-5)


def test_what_is_not_there_cannot_be_observed() -> None:
    with pytest.raises(GraphoptError, match="`nothing` is no value of the graph"):
        TorchModel(mlp())({"x": torch.ones(1, 4)}, observe=["nothing"])
    model = graph(BRANCHES, w=floats(4))
    feeds = {"x": torch.ones(1, 4), "c": torch.tensor(True)}
    with pytest.raises(GraphoptError, match="inside a subgraph"):
        TorchModel(model)(feeds, edit={"n": torch.neg})


def test_memory_is_free_after_the_last_use() -> None:
    model = graph("g (float[N] x) => (float[N] y) { a = Neg(x)  b = Exp(a)  c = Relu(b)  y = Neg(c) }")
    alive: dict[str, Any] = {}

    def remember(value: Any) -> Any:
        alive["a"] = weakref.ref(value)
        return value

    def look(value: Any) -> Any:
        assert alive["a"]() is None
        return value

    with torch.no_grad():
        TorchModel(model)({"x": torch.ones(3)}, edit={"a": remember, "c": look})
    assert len(alive) == 1


def test_parameters_buffers_and_trainable() -> None:
    text = "g (float[N,4] x) => (float[N,4] y) <float[4] a.weight, float[4] a, float scale = {2}> { b = Mul(x, a.weight) c = Add(b, a) y = Mul(c, scale) }"
    text = text.replace("a.weight", "w1")
    model = graph(text, w1=floats(4), a=floats(4))
    model.graph.initializers["w1"].name = "a.weight"  # as torch names it, beside a weight `a`
    executor = TorchModel(model)
    assert set(executor.weights()) == {"a.weight", "a"}
    assert sum(1 for _ in executor.buffers()) == 1
    state = {name: tensor * 0 for name, tensor in executor.state_dict().items()}
    executor.load_state_dict(state)
    assert model.graph.initializers["scale"].const_value.numpy() == 2, "the model keeps its own numbers"
    assert not executor.run({"x": np.ones((1, 4), np.float32)})["y"].any()
    twin = copy.deepcopy(TorchModel(model))
    with torch.no_grad():
        twin.weights()["a"].add_(1)
    x = np.ones((1, 4), np.float32)
    np.testing.assert_allclose(twin.run({"x": x})["y"] - TorchModel(model).run({"x": x})["y"], np.full((1, 4), 2), rtol=1e-5)
    some = TorchModel(model, trainable=["a", "scale"])
    assert {name for name, p in some.weights().items() if p.requires_grad} == {"a", "scale"}
    with pytest.raises(GraphoptError, match="`nothing`, which is no float initializer"):
        TorchModel(model, trainable=["nothing"])


def test_an_overridable_weight_can_be_fed() -> None:
    text = "g (float[N,4] x, float[4] w) => (float[N,4] y) <float[4] w> { y = Mul(x, w) }"
    model = graph(text, w=floats(4))
    x = np.ones((1, 4), np.float32)
    executor = TorchModel(model)
    assert [port.name for port in executor.inputs] == ["x"]
    np.testing.assert_array_equal(executor.run({"x": x})["y"][0], executor.weights()["w"].detach().numpy())
    np.testing.assert_array_equal(executor.run({"x": x, "w": np.arange(4, dtype=np.float32)})["y"][0], np.arange(4))


# ---- errors -------------------------------------------------------------------------------------------------------------------------------


def test_a_missing_op_is_named() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 23, "my.ops": 1]>\ng (float[4] x) => (float[4] y) { y = my.ops.Twist <turn = 2> (x) }'
    )
    next(iter(model.graph)).name = "n7"
    with pytest.raises(MissingOp, match=r"`Twist` of domain `my.ops`, opset 1 \(node `n7`\).*pass ops=") as caught:
        TorchModel(model)
    error = caught.value
    assert (error.op_type, error.domain, error.version, error.node) == ("Twist", "my.ops", 1, "n7")
    known = TorchModel(model, ops={("my.ops", "Twist"): lambda x, *, turn: x * turn})
    np.testing.assert_array_equal(known.run({"x": np.ones(4, np.float32)})["y"], [2, 2, 2, 2])


@pytest.mark.parametrize(
    ("opset", "node", "expected"),
    [
        (23, "y = Softplus <warp = 1> (x)", "its attribute `warp` is not supported"),
        (23, "y = NoSuchOp(x)", "no such operator is in its table"),
        (11, "y = Softmax(x)", "it knows this operator from version 13 on; load the model by graphopt.load"),
    ],
)
def test_what_the_table_lacks(opset: int, node: str, expected: str) -> None:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": {opset}]>\ng (float[4] x) => (float[4] y) {{ {node} }}')
    with pytest.raises(MissingOp, match=expected):
        TorchModel(model)


def test_a_bad_feed_and_a_failing_node_are_one_line() -> None:
    executor = TorchModel(mlp())
    with pytest.raises(TargetError, match="input x missing; the model needs x"):
        executor.run({})
    with pytest.raises(TargetError, match="the model has no input z"):
        executor.run({"x": np.ones((1, 4), np.float32), "z": np.ones(1)})
    with pytest.raises(TargetError, match=r"failed at node `.*` \(MatMul\)") as caught:
        executor.run({"x": np.ones((1, 5), np.float32)})
    assert "\n" not in str(caught.value)


# ---- the way back -------------------------------------------------------------------------------------------------------------------------


def test_one_step_of_distillation_and_back() -> None:
    """A MiniLM with noise on its weights learns from the original; ONNX Runtime gives the numbers of what was learned."""
    source = minilm("sdpa_23")
    teacher, student = TorchModel(graphopt.load(source), trainable=()), graphopt.load(source)
    executor = TorchModel(student)
    matrices = {name: weight for name, weight in executor.weights().items() if weight.dim() == 2 and min(weight.shape) >= 384 and len(weight) < 2000}
    assert len(matrices) >= 36
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in matrices.values():
            weight += 0.02 * torch.randn_like(weight)
    assert executor.write_back(student) == len(matrices)
    feeds = text_feeds(("input_ids", "attention_mask"), 3, 8)
    with torch.no_grad():
        target = teacher(tensors(feeds))["last_hidden_state"]
    optimizer = torch.optim.SGD(executor.parameters(), lr=0.1)

    def loss() -> Any:
        return torch.nn.functional.mse_loss(executor(tensors(feeds))["last_hidden_state"], target)

    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before * 0.95
    assert executor.write_back(student) >= len(matrices)
    assert executor.write_back(student) == 0, "nothing changed since"
    assert_same(executor.run(feeds), run(student, feeds), 1e-5)
    assert np.abs(run(student, feeds)["last_hidden_state"] - target.numpy()).max() > 1e-3, "it is another model than the teacher"


def test_write_back_wants_the_same_model() -> None:
    executor = TorchModel(mlp())
    with pytest.raises(GraphoptError, match="the graph has no initializer `up`"):
        executor.write_back(graph(BRANCHES, w=floats(4)))
    other = graph(MLP.replace("[4,6]", "[4,5]").replace("[6,3]", "[5,3]"), up=floats(4, 5), down=floats(5, 3))
    with pytest.raises(GraphoptError, match=r"`up` is \[4, 5\] in the graph and \[4, 6\] here"):
        executor.write_back(other)


def test_the_model_itself_stays() -> None:
    model = mlp()
    before = model.graph.initializers["up"].const_value.numpy().copy()
    executor = TorchModel(model)
    with torch.no_grad():
        for weight in executor.parameters():
            weight.zero_()
    np.testing.assert_array_equal(model.graph.initializers["up"].const_value.numpy(), before)


def test_the_page_on_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its examples run as they stand, one after the other."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "gradients.md").read_text(encoding="utf-8")
    (tmp_path / "minilm.onnx").symlink_to(minilm("sdpa_23"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, names)
    assert names["importance"].shape == (1536,)
    assert names["importance"].min() > 0
    assert names["outputs"][names["hidden"]].shape == (1, 4, 1536)
    assert names["changed"] > 50
    feeds = {name: tensor.numpy() for name, tensor in names["feeds"].items()}
    assert_same(names["executor"].run(feeds), run(names["model"], feeds), 1e-5)


@pytest.mark.parametrize("pipeline", ["quantize{mode=dynamic}", "quantize{mode=weight-only bits=4 block=16}", "quantize{mode=weight-only bits=8}"])
def test_quantized_models_run_and_learn(pipeline: str) -> None:
    model = graphopt.optimize(tiny("bert", "sdpa", "18"), f"canonicalize, fuse-norm, {pipeline}", target="cpu{tune=off vendor=false}").model
    assert {"DequantizeLinear", "MatMulInteger"} & {node.op_type for node in model.graph}
    feeds = text_feeds(("input_ids", "attention_mask"), 3, 11)
    feeds["input_ids"] %= 100
    expected = run(model, feeds)
    executor = TorchModel(model)
    assert_same(expected, executor.run(feeds), 1e-5 if "weight-only" in pipeline else 2e-2)  # a rounding that falls on the other side
    out = executor(tensors(feeds))["out"]
    assert_same(executor.run(feeds), {"out": out.detach().numpy()}, 1e-5 if "weight-only" in pipeline else 2e-2)
    out.square().mean().backward()
    gradients = [weight.grad for weight in executor.weights().values() if weight.grad is not None]
    assert len(gradients) >= 6
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
