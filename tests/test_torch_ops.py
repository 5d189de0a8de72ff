"""The torch executor, operator by operator, on the node tests that the onnx package ships for backends."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import graphopt
from graphopt.core.errors import GraphoptError
from graphopt.run.torch.model import TorchModel
from graphopt.run.torch.table import TABLE, MissingOp

FLOOR = 1400  # cases that ran and passed; onnx 1.23 has 1,513 of them
HALF = {"float16": 4e-3, "bfloat16": 3e-2}  # relative, a few places of the type: the cases ask for 1e-3, which bfloat16 does not even hold
LEFT_OUT = dict.fromkeys(
    ("test_training_dropout", "test_training_dropout_default", "test_training_dropout_mask", "test_training_dropout_default_mask"),
    "draws random numbers",
)
REASONS = {  # part of an error -> why a case is none for torch
    "not implemented for 'UInt": "torch has no kernel for uint16, uint32, uint64",
    "torch has no element type for STRING": "torch has no strings",
    "torch has no element type for FLOAT4E2M1": "torch has no 4-bit floats",
    "torch has no element type for FLOAT8E8M0": "the executor has no 8-bit exponents",
    "no such operator is in its table": "needs an operator that the table lacks",
    "cannot be written at opset": "is written in a way that the working opset lacks",
}
NO_CASE = dict.fromkeys(("SequenceErase", "ConcatFromSequence"), "onnx ships no case; test_torch.py compares it with ONNX Runtime")
# what the exporters wrote for the 500 files of benchmarks/zoo.py
ZOO = """
    Abs Add And Attention AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum Div Einsum Equal Erf Exp
    Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual GroupNormalization HardSwish Identity If
    InstanceNormalization IsNaN LayerNormalization Less LessOrEqual Log MatMul Max Min Mod Mul Neg NonZero Not OneHot Or Pad Pow
    RMSNormalization Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape Resize RotaryEmbedding ScatterND Shape Sigmoid Sign
    Sin Size Slice Softmax Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
""".split()  # noqa: SIM905


@functools.cache
def cases() -> dict[str, Any]:
    import warnings

    import onnx.backend.test.case.node as node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in node.collect_testcases(None)}


def op_types(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        if node.domain in ("", "ai.onnx"):
            yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from op_types(attribute.g)


@functools.cache
def cases_of() -> dict[str, list[str]]:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, case in cases().items():
        for op_type in set(op_types(case.model.graph)):
            found[op_type].append(name)
    return found


@functools.cache
def outcome(name: str) -> str:
    """ "" if the numbers are right, else what is wrong, or (after `-`) why torch cannot have them."""
    if name in LEFT_OUT:
        return f"- {LEFT_OUT[name]}"
    case = cases()[name]
    try:
        check(case)
    except (GraphoptError, AssertionError) as error:
        return next((f"- {reason}" for part, reason in REASONS.items() if part in str(error)), f"{name}: {error}")
    return ""


def check(case: Any) -> None:
    session = load(case.model)
    names = [x.name for x in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        found = session.run(dict(zip(names, map(plain, inputs), strict=True)))
        for expected, value in zip(map(plain, outputs), found.values(), strict=True):
            pairs = list(zip(expected, value, strict=True)) if isinstance(expected, list) else [(expected, value)]
            for a, b in pairs:
                same(np.asarray(a), b, case.rtol, case.atol)


def load(proto: onnx.ModelProto) -> TorchModel:
    """As it stands, or lifted to the working opset where the case is written for one that is too old."""
    try:
        return TorchModel(ir.from_proto(proto))
    except MissingOp as error:
        if "from version" not in str(error):
            raise
    return TorchModel(graphopt.load(proto))


def plain(x: Any) -> Any:
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


def same(expected: Any, found: Any, rtol: float, atol: float) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if expected.dtype.kind in "iub":
        np.testing.assert_array_equal(found, expected)
        return
    relative, wide = HALF.get(expected.dtype.name, rtol), np.complex128 if expected.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.astype(wide), expected.astype(wide), rtol=relative, atol=atol)


@pytest.mark.parametrize("op_type", sorted(TABLE))
def test_op(op_type: str) -> None:
    names = cases_of().get(op_type, [])
    results = [outcome(name) for name in names]
    wrong = [text for text in results if text and not text.startswith("- ")]
    assert not wrong, "\n".join(wrong)
    print(op_type, results.count(""), "passed;", dict(collections.Counter(text for text in results if text)))
    if op_type in NO_CASE or not names:
        pytest.skip(NO_CASE.get(op_type, f"this onnx, {onnx.__version__}, ships no case for {op_type}"))
    assert "" in results, f"no case of {op_type} ran: {set(results)}"


def test_enough_cases_ran() -> None:
    results = [outcome(name) for name in cases()]
    assert results.count("") >= FLOOR, collections.Counter(text for text in results if text)


def test_most_of_the_table_has_a_case() -> None:
    assert not [op_type for op_type in TABLE if op_type not in cases_of() and op_type not in NO_CASE]


def test_what_exporters_write_is_in_the_table() -> None:
    assert not set(ZOO) - set(TABLE)
