"""Random Transformer blocks: norms, feed-forward networks, quantized weights and control flow, in the spellings of exporters and near them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
from onnx import TensorProto, helper

from fuzz.attention import attention  # type: ignore[import-not-found]
from fuzz.net import Net  # type: ignore[import-not-found]

WIDTH = 32
_NEAR = 0.06  # how often a constant of a pattern is another: then it must not be recognized


def blocks(rng: Random) -> bytes:
    """One to three blocks over [B, S, 32] with residual connections."""
    net = Net(rng, rng.choice((13, 17, 17, 18, 20, 21, 23, 23)))
    x = _start(net)
    for _ in range(rng.randint(1, 3)):
        block = rng.choice((attention, attention, feed_forward, feed_forward, _branches, _loop, _sequence))
        before = norm(net, x) if rng.random() < 0.6 else x
        made = block(net, before)
        x = net.either("Add", made, x) if rng.random() < 0.85 else made
        if rng.random() < 0.4:
            x = norm(net, x)
        if rng.random() < 0.1:
            net.output(x, "B", "S", WIDTH)
    net.output(net.op("Identity", x) if any(v.name == x for v in net.outputs) else x, "B", "S", WIDTH)
    return net.made()


def _start(net: Net) -> str:
    if net.rng.random() < 0.7:
        return net.input("x", TensorProto.FLOAT, "B", "S", WIDTH)
    ids = net.input("input_ids", TensorProto.INT64, "B", "S")
    return str(net.op("Gather", net.weight(50, WIDTH), ids))


def _near(net: Net, number: float) -> float:
    return number * net.rng.choice((0.9, 1.2, 1.0001)) if net.rng.random() < _NEAR else number


# ---- norms --------------------------------------------------------------------------------------------------------------------------------


def norm(net: Net, x: str) -> str:
    made: str = net.rng.choice((_layer_norm, _layer_norm, _by_squares, _rms, _operator))(net, x)
    return made


def _layer_norm(net: Net, x: str) -> str:
    centred = net.op("Sub", x, net.reduce("ReduceMean", x))
    square = net.op("Pow", centred, net.const(_near(net, 2.0))) if net.rng.random() < 0.5 else net.op("Mul", centred, centred)
    root = net.op("Sqrt", net.either("Add", net.reduce("ReduceMean", square), net.const(1e-5)))
    return _affine(net, _divided(net, centred, root), True)


def _by_squares(net: Net, x: str) -> str:
    """E[x^2] - E[x]^2, as converters from TensorFlow write it."""
    mean = net.reduce("ReduceMean", x)
    variance = net.op("Sub", net.reduce("ReduceMean", net.op("Mul", x, x)), net.op("Mul", mean, mean))
    scale = net.op("Mul", net.op("Reciprocal", net.op("Sqrt", net.op("Add", variance, net.const(1e-3)))), net.weight(WIDTH))
    shift = net.op("Sub", net.weight(WIDTH), net.op("Mul", mean, scale))
    return net.either("Add", net.op("Mul", x, scale), shift)


def _rms(net: Net, x: str) -> str:
    square = net.op("Pow", x, net.const(2.0)) if net.rng.random() < 0.5 else net.op("Mul", x, x)
    root = net.op("Sqrt", net.either("Add", net.reduce("ReduceMean", square), net.const(1e-6)))
    return _affine(net, _divided(net, x, root), False)


def _divided(net: Net, x: str, root: str) -> str:
    return str(net.op("Div", x, root) if net.rng.random() < 0.6 else net.either("Mul", x, net.op("Reciprocal", root)))


def _affine(net: Net, x: str, shifted: bool) -> str:
    if net.rng.random() < 0.9:
        x = net.either("Mul", x, net.weight(*((WIDTH,) if net.rng.random() < 0.8 else (1, 1, WIDTH))))
    return net.either("Add", x, net.weight(WIDTH)) if shifted and net.rng.random() < 0.9 else x


def _operator(net: Net, x: str) -> str:
    if net.opset >= 23 and net.rng.random() < 0.5:
        return str(net.op("RMSNormalization", x, net.weight(WIDTH), axis=-1))
    if net.opset < 17:
        return _layer_norm(net, x)
    return str(net.op("LayerNormalization", x, net.weight(WIDTH), net.weight(WIDTH), axis=net.rng.choice((-1, 2)), epsilon=1e-5))


# ---- feed-forward -------------------------------------------------------------------------------------------------------------------------


def activation(net: Net, x: str) -> str:
    made: str = net.rng.choice((_erf_gelu, _erf_gelu, _tanh_gelu, _silu, _plain))(net, x)
    return made


def _erf_gelu(net: Net, x: str) -> str:
    inner = net.op("Erf", net.scaled(x, _near(net, 0.7071067811865476)))
    outer = net.either("Add", inner, net.const(_near(net, 1.0)))
    if net.rng.random() < 0.5:
        return net.either("Mul", net.either("Mul", x, outer), net.const(_near(net, 0.5)))
    return net.either("Mul", net.either("Mul", x, net.const(0.5)), outer)


def _tanh_gelu(net: Net, x: str) -> str:
    cube = net.op("Pow", x, net.const(3.0)) if net.rng.random() < 0.5 else net.op("Mul", x, net.op("Mul", x, x))
    inner = net.either("Add", x, net.either("Mul", cube, net.const(_near(net, 0.044715))))
    outer = net.either("Add", net.op("Tanh", net.either("Mul", inner, net.const(0.7978845608))), net.const(1.0))
    return net.either("Mul", net.either("Mul", x, net.const(0.5)), outer)


def _silu(net: Net, x: str) -> str:
    inner = net.either("Mul", x, net.const(_near(net, 1.702))) if net.rng.random() < 0.4 else x
    return net.either("Mul", x, net.op("Sigmoid", inner))


def _plain(net: Net, x: str) -> str:
    if net.opset >= 20 and net.rng.random() < 0.4:
        return str(net.op("Gelu", x, approximate=net.rng.choice(("none", "tanh"))))
    return str(net.op(net.rng.choice(("Relu", "Tanh", "Sigmoid", "HardSwish", "Softplus") if net.opset >= 14 else ("Relu", "Tanh")), x))


def feed_forward(net: Net, x: str) -> str:
    wide = net.rng.choice((48, 64))
    if net.rng.random() < 0.3:  # gated
        gate = activation(net, linear(net, x, WIDTH, wide))
        return linear(net, net.either("Mul", gate, linear(net, x, WIDTH, wide)), wide, WIDTH)
    return linear(net, activation(net, linear(net, x, WIDTH, wide)), wide, WIDTH)


# ---- products with stored weights ---------------------------------------------------------------------------------------------------------


def linear(net: Net, x: str, rows: int, columns: int) -> str:
    """[B, S, rows] -> [B, S, columns]: a MatMul, a Gemm between Reshapes, an Einsum, a 1x1 convolution; the weight perhaps quantized."""
    style = net.rng.random()
    if style < 0.1:
        flat = net.op("Reshape", x, net.ints(-1, rows))
        back = net.ints(*((0, -1, columns) if net.rng.random() < 0.0 else (-1, columns)))
        made = net.op("Gemm", flat, net.weight(columns, rows), net.weight(columns), transB=1, beta=net.rng.choice((1.0, 0.5)))
        sizes = net.op("Concat", net.op("Slice", net.op("Shape", x), net.ints(0), net.ints(2)), net.ints(columns), axis=0)
        return str(net.op("Reshape", net.op("Reshape", made, back), sizes))
    if style < 0.16:
        return str(net.op("Einsum", x, net.weight(rows, columns), equation=net.rng.choice(("bsd,df->bsf", "abc,cd->abd", "...d,df->...f"))))
    if style < 0.22:
        turned = net.op("Transpose", x, perm=[0, 2, 1])
        made = net.op("Conv", turned, net.weight(columns, rows, 1), net.weight(columns), kernel_shape=[1])
        return str(net.op("Transpose", made, perm=[0, 2, 1]))
    made = net.op("MatMul", _activated(net, x), _stored(net, rows, columns))
    return net.either("Add", made, net.weight(columns)) if net.rng.random() < 0.7 else str(made)


def _activated(net: Net, x: str) -> str:
    """The activation, as a rule as it is; else through QuantizeLinear, or DynamicQuantizeLinear."""
    style = net.rng.random()
    if style < 0.85:
        return x
    if style < 0.93:
        codes, scale, zero = net.op("DynamicQuantizeLinear", x, outputs=3)
        return str(net.op("DequantizeLinear", codes, scale, zero))
    scale, zero = net.const(0.05), net.const(128 if (kind := net.rng.choice((np.uint8, np.int8))) is np.uint8 else 0, kind)
    return str(net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, zero), scale, zero))


def _stored(net: Net, rows: int, columns: int) -> str:
    style = net.rng.random()
    if style < 0.7:
        return str(net.weight(rows, columns)) if net.rng.random() < 0.8 else str(net.op("Transpose", net.weight(columns, rows), perm=[1, 0]))
    kind = net.rng.choice((np.int8, np.uint8))
    codes = net.const(net.data.integers(*((-127, 128) if kind is np.int8 else (0, 256)), (rows, columns)), kind)
    if style < 0.8 or (net.opset < 21 and style > 0.9):
        return str(net.op("DequantizeLinear", codes, net.const(0.004), net.const(0 if kind is np.int8 else 128, kind)))
    if style < 0.9:
        scale = net.const(0.002 + 0.004 * net.data.random(columns))
        zero = (net.const(np.full(columns, 0 if kind is np.int8 else 128), kind),) if net.rng.random() < 0.7 or kind is np.uint8 else ()
        return str(net.op("DequantizeLinear", codes, scale, *zero, axis=1))
    scale = net.const(0.002 + 0.004 * net.data.random((rows // 16, columns)))
    zero = (net.const(np.full((rows // 16, columns), 128), kind),) if kind is np.uint8 else ()
    return str(net.op("DequantizeLinear", codes, scale, *zero, axis=0, block_size=16))


# ---- control flow and sequences -----------------------------------------------------------------------------------------------------------


def _body(net: Net, make: Callable[[Net], str]) -> tuple[Net, str]:
    """A graph that captures from the outer one: its weights stand outside or inside."""
    inner = Net(net.rng, net.opset)
    inner.count = net.count + 1000 * (1 + len(net.nodes))
    made = make(inner)
    if net.rng.random() < 0.5:
        net.weights += inner.weights
        inner.weights = []
    return inner, made


def _branches(net: Net, x: str) -> str:
    parts = []
    for tag, make in (("then", lambda n: feed_forward(n, x)), ("else", lambda n: activation(n, x) if n.rng.random() < 0.5 else n.op("Identity", x))):
        inner, made = _body(net, make)
        parts.append(helper.make_graph(inner.nodes, tag, [], [helper.make_tensor_value_info(made, TensorProto.FLOAT, None)], inner.weights))
    style = net.rng.random()
    if style < 0.6:
        chosen = net.input("go", TensorProto.BOOL)
    elif style < 0.8:
        chosen = net.const(net.rng.random() < 0.5, np.bool_)
    else:
        chosen = net.op(
            "Greater", net.op("Squeeze", net.op("Slice", net.op("Shape", x), net.ints(1), net.ints(2)), net.ints(0)), net.const(3, np.int64)
        )
    return str(net.op("If", chosen, then_branch=parts[0], else_branch=parts[1]))


def _loop(net: Net, x: str) -> str:
    state, turn, more = net.name("state"), net.name("turn"), net.name("more")
    inner, made = _body(net, lambda n: activation(n, linear(n, state, WIDTH, WIDTH)))
    again = inner.op("Identity", more)
    ins = [helper.make_tensor_value_info(turn, TensorProto.INT64, []), helper.make_tensor_value_info(more, TensorProto.BOOL, [])]
    ins.append(helper.make_tensor_value_info(state, TensorProto.FLOAT, None if net.rng.random() < 0.5 else ["B", "S", WIDTH]))
    outs = [helper.make_tensor_value_info(again, TensorProto.BOOL, []), helper.make_tensor_value_info(made, TensorProto.FLOAT, None)]
    body = helper.make_graph(inner.nodes, "body", ins, outs, inner.weights)
    return str(net.op("Loop", net.const(net.rng.choice((0, 1, 3)), np.int64), net.const(True, np.bool_), x, body=body))


def _sequence(net: Net, x: str) -> str:
    """Cut along the features and put together again, in another order."""
    if net.rng.random() < 0.5:
        whole = net.op("SplitToSequence", x, net.const(WIDTH // 2, np.int64), axis=-1)
    else:
        whole = net.op("SequenceConstruct", *net.op("Split", x, net.ints(WIDTH // 2, WIDTH // 2), axis=-1, outputs=2))
    parts = [net.op("SequenceAt", whole, net.const(k, np.int64)) for k in net.rng.choice(((0, 1), (1, 0)))]
    if net.rng.random() < 0.3:
        return str(net.op("ConcatFromSequence", net.op("SequenceConstruct", *parts), axis=-1))
    return str(net.op("Concat", *parts, axis=-1))
