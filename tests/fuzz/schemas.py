"""Random graphs out of operator schemas: operators whose types fit what is there, attributes that hold, shapes that broadcast, constants.

A node is drawn from `onnx.defs`; the reference evaluator runs it at two sizes of the dynamic axis as it is added, and what fails there is left out.
So every graph is legal, and the numbers of each node are known to be finite or not.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = np.ndarray[Any, Any]
SIZES = (3, 5)  # of the dynamic axis "n", while the graph is made
OPSETS = (13, 17, 18, 20, 21, 22, 23)
_UNSTEADY = frozenset(["Dropout", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"])
_OWN = frozenset(["If", "Loop", "Scan", "SequenceMap", "Constant", "ConstantOfShape", "Optional"])  # of other generators, or made otherwise
_KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_, "tensor(int32)": np.int32, "tensor(double)": np.float64,
          "tensor(float16)": np.float16, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8}  # fmt: skip
_LIKELY = ["Add", "Mul", "Sub", "Div", "MatMul", "Gemm", "Reshape", "Transpose", "Softmax", "Relu", "Gelu", "Erf", "Tanh", "Sigmoid", "Sqrt", "Pow", "ReduceMean", "ReduceSum", "LayerNormalization", "Concat", "Split", "Slice", "Gather", "Unsqueeze", "Squeeze", "Where", "Cast", "Expand", "Neg", "Clip", "Identity", "Shape", "Equal", "Max", "Min", "Flatten", "Reciprocal", "Exp", "Log", "Abs", "Tile", "Pad"]  # fmt: skip


@dataclasses.dataclass
class _Known:
    """A value of the graph: what it is at each size, and whether it is stored."""

    name: str
    arrays: tuple[Array, ...]
    stored: bool = False

    @property
    def kind(self) -> type[Any]:
        return self.arrays[0].dtype.type


def graph(rng: Random) -> bytes:
    """A model of four to fourteen nodes over one to three inputs."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return _Maker(rng).made()


class _Maker:
    def __init__(self, rng: Random) -> None:
        self.rng, self.opset = rng, rng.choice(OPSETS)
        self.data = np.random.default_rng(rng.randrange(1 << 30))
        self.nodes: list[onnx.NodeProto] = []
        self.values: list[_Known] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        for number in range(rng.randint(1, 3)):
            self._input(f"x{number}")

    def made(self) -> bytes:
        wanted, tries = self.rng.randint(4, 14), 0
        while len(self.nodes) < wanted and tries < 6 * wanted:
            tries += 1
            self._grow(self.rng.choice(_LIKELY) if self.rng.random() < 0.75 else self.rng.choice(_operators(self.opset)))
        read = {name for node in self.nodes for name in node.input}
        made = [v for v in self.values if any(v.name in node.output for node in self.nodes)]
        outputs = [v for v in made if v.name not in read or self.rng.random() < 0.1] or made[-1:]
        if not outputs:
            return self._finished([helper.make_node("Identity", ["x0"], ["y"])], [_Known("y", self.values[0].arrays)])
        return self._finished(self.nodes, outputs)

    def _finished(self, nodes: list[onnx.NodeProto], outputs: list[_Known]) -> bytes:
        read = {name for node in nodes for name in node.input}
        ports = [_port(v) for v in outputs]
        kept = [w for w in self.weights if w.name in read]
        made = helper.make_graph(nodes, "fuzz", self.inputs, ports, kept)
        if self.rng.random() < 0.3:  # what an exporter may have said of the values inside
            made.value_info.extend(_port(v) for v in self.values if not v.stored and v.name not in {p.name for p in (*ports, *self.inputs)})
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8 if self.opset < 20 else 10)
        return bytes(model.SerializeToString())

    # ---- values ---------------------------------------------------------------------------------------------------------------------------

    def _input(self, name: str) -> None:
        kind = self.rng.choice((np.float32, np.float32, np.float32, np.int64, np.bool_, np.float16))
        shape = self._shape()
        dims: list[Any] = list(shape)
        if dims and self.rng.random() < 0.8:
            dims[self.rng.randrange(len(dims))] = "n"
        sized = ([size if d == "n" else d for d in dims] for size in SIZES)
        self.values.append(_Known(name, tuple(self._array(kind, s) for s in sized)))
        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), dims))

    def _shape(self) -> list[int]:
        return [self.rng.choice((1, 2, 4, 4, 8)) for _ in range(self.rng.choice((1, 2, 2, 3, 3, 4)))]

    def _array(self, kind: type[Any], shape: list[int]) -> Array:
        if kind is np.bool_:
            return np.asarray(self.data.integers(0, 2, shape), np.bool_)
        if np.issubdtype(kind, np.integer):
            return np.asarray(self.data.integers(0, 4, shape), kind)
        return np.asarray(self.data.standard_normal(shape), kind)

    def _constant(self, kind: type[Any], like: Array | None = None) -> _Known:
        """A weight: a scalar, a vector, a matrix, or one that broadcasts with `like`."""
        shape = [] if self.rng.random() < 0.3 else self._shape()[:2]
        if like is not None and like.ndim and self.rng.random() < 0.7:
            shape = [d if self.rng.random() < 0.7 and d not in SIZES else 1 for d in like.shape[-self.rng.randint(1, like.ndim) :]]
        array = self._array(kind, shape)
        if np.issubdtype(kind, np.floating) and self.rng.random() < 0.3:
            array = np.full(shape, self.rng.choice((0.0, 1.0, 0.5, 2.0, -1.0, 1.4142135, 0.70710678, 1e-5, -1e4)), kind)
        return self._store(array)

    def _store(self, array: Array) -> _Known:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        value = _Known(name, (array,) * len(SIZES), True)
        self.values.append(value)
        return value

    # ---- nodes ----------------------------------------------------------------------------------------------------------------------------

    def _grow(self, op_type: str) -> None:
        schema = _schema(op_type, self.opset)
        if schema is None:
            return
        inputs = _SPECIAL[op_type](self) if op_type in _SPECIAL else self._operands(schema)
        if inputs is None:
            return
        count = _outputs(schema)
        outputs = [f"v{len(self.nodes)}_{k}" for k in range(count)]
        node = helper.make_node(op_type, [v.name if v else "" for v in inputs], outputs, **self._attributes(schema, inputs))
        results = self._evaluated(node, [v for v in inputs if v])
        if results is None:
            return
        self.nodes.append(node)
        self.values += [_Known(name, arrays) for name, arrays in zip(outputs, results, strict=True)]

    def _operands(self, schema: Any) -> list[_Known | None] | None:
        """Values for all inputs, of types that go together; an optional one may be left out."""
        allowed = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
        bound: dict[str, type[Any]] = {}
        found: list[_Known | None] = []
        variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
        formals = [f for f in schema.inputs for _ in range(self.rng.randint(1, 3) if f.option == variadic else 1)]
        like: Array | None = None
        for formal in formals:
            if formal.option == onnx.defs.OpSchema.FormalParameterOption.Optional and self.rng.random() < 0.5:
                break
            kinds = [bound[formal.type_str]] if formal.type_str in bound else [
                _KINDS[t] for t in allowed.get(formal.type_str, (formal.type_str,)) if t in _KINDS
            ]  # fmt: skip
            fitting = [v for v in self.values[-8:] if v.kind in kinds]
            if not kinds or (not fitting and not found):
                return None
            value = self.rng.choice(fitting) if fitting and (not found or self.rng.random() < 0.5) else self._constant(self.rng.choice(kinds), like)
            like = value.arrays[0] if like is None else like
            bound.setdefault(formal.type_str, value.kind)
            found.append(value)
        return found

    def _attributes(self, schema: Any, inputs: list[_Known | None]) -> dict[str, Any]:
        first = inputs[0].arrays[0] if inputs and inputs[0] else np.zeros(())
        given = {}
        for name, attribute in schema.attributes.items():
            if attribute.required or self.rng.random() < 0.4:
                value = self._attribute(name, attribute, first.ndim)
                if value is not None:
                    given[name] = value
        return given

    def _attribute(self, name: str, attribute: Any, rank: int) -> Any:
        types = onnx.defs.OpSchema.AttrType
        if name == "perm":
            return self.rng.sample(range(rank), rank) if rank else None
        if name == "to":
            return self.rng.choice(
                (TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.INT32, TensorProto.DOUBLE)
            )
        if name in ("axis", "axes", "batch_axis", "time_axis") and rank:
            axis = self.rng.randrange(-rank, rank)
            return axis if attribute.type == types.INT else [axis]
        if name in ("epsilon", "alpha", "beta", "gamma", "bias", "lambd"):
            return self.rng.choice((1e-5, 0.5, 1.0, 2.0)) if attribute.type == types.FLOAT else None
        if name == "approximate":
            return self.rng.choice(("none", "tanh"))
        if attribute.type == types.INT:
            return self.rng.choice((0, 1)) if name not in ("num_outputs", "num_groups", "blocksize") else 2
        return self.rng.choice((0.5, 1.0)) if attribute.type == types.FLOAT and attribute.required else None

    def _evaluated(self, node: onnx.NodeProto, inputs: list[_Known]) -> list[tuple[Array, ...]] | None:
        """The outputs at both sizes; None where the node does not run, or gives what numpy has no type for."""
        ports = [helper.make_tensor_value_info(v.name, helper.np_dtype_to_tensor_dtype(v.arrays[0].dtype), None) for v in _unique(inputs)]
        outs = [helper.make_empty_tensor_value_info(name) for name in node.output]
        model = helper.make_model(helper.make_graph([node], "one", ports, outs), opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        try:
            run = ReferenceEvaluator(model)
            results = [run.run(None, {v.name: v.arrays[k] for v in inputs}) for k in range(len(SIZES))]
        except Exception:  # noqa: BLE001 -- the evaluator raises whatever numpy does: the operands do not go together
            return None
        pairs = list(zip(*results, strict=True))
        if not pairs or not all(isinstance(a, np.ndarray) and a.dtype.type in _KINDS.values() and a.size <= 4096 for pair in pairs for a in pair):
            return None
        if any(len({a.dtype for a in pair}) > 1 or len({a.ndim for a in pair}) > 1 for pair in pairs):
            return None
        if any(a.dtype.kind == "f" and (not np.isfinite(a).all() or np.abs(a).max(initial=0) > 1e6) for pair in pairs for a in pair):
            return None
        return pairs

    def some(self, kind: type[Any] = np.float32, ranks: tuple[int, ...] = (1, 2, 3, 4)) -> _Known | None:
        fitting = [v for v in self.values if v.kind is kind and v.arrays[0].ndim in ranks and not v.stored]
        return self.rng.choice(fitting) if fitting else None

    # ---- operators whose inputs are numbers of a meaning ------------------------------------------------------------------------------------

    def matmul(self) -> list[_Known | None] | None:
        x = self.some(ranks=(2, 3, 4))
        if x is None or x.arrays[0].shape[-1] != x.arrays[1].shape[-1]:
            return None
        return [x, self._store(self._array(np.float32, [x.arrays[0].shape[-1], self.rng.choice((1, 4, 8))]))]

    def reshape(self) -> list[_Known | None] | None:
        x = self.some()
        if x is None:
            return None
        shape = [d if self.rng.random() < 0.5 else 0 for d in x.arrays[0].shape]
        style = self.rng.random()
        if style < 0.4:
            shape = [0] * max(0, len(shape) - 2) + [-1]
        elif style < 0.7 and shape:
            shape[self.rng.randrange(len(shape))] = -1
        elif shape and x.arrays[0].shape[-1] % 2 == 0:
            shape = [0] * (len(shape) - 1) + [2, -1]
        return [x, self._store(np.array(shape, np.int64))]

    def axes(self) -> list[_Known | None] | None:
        x = self.some()
        if x is None:
            return None
        axis = self.rng.randrange(-x.arrays[0].ndim, x.arrays[0].ndim)
        return [x, self._store(np.array([axis], np.int64))]

    def gather(self) -> list[_Known | None] | None:
        x = self.some()
        return None if x is None else [x, self._store(np.array(self.rng.choice((0, -1, [0], [0, 0])), np.int64))]

    def slices(self) -> list[_Known | None] | None:
        x = self.some()
        if x is None:
            return None
        numbers = (
            self.rng.choice((0, 1, -1, -2)),
            self.rng.choice((1, 2, -1, 2**62)),
            self.rng.randrange(x.arrays[0].ndim),
            self.rng.choice((1, 1, 2)),
        )
        return [x, *(self._store(np.array([n], np.int64)) for n in numbers)]

    def norm(self) -> list[_Known | None] | None:
        x = self.some(ranks=(2, 3, 4))
        if x is None:
            return None
        width = [x.arrays[0].shape[-1]]
        return [x, self._store(self._array(np.float32, width)), self._store(self._array(np.float32, width))]

    def expand(self) -> list[_Known | None] | None:
        x = self.some()
        return None if x is None else [x, self._store(np.array([self.rng.choice((1, 2)), *[1] * x.arrays[0].ndim], np.int64))]

    def tile(self) -> list[_Known | None] | None:
        x = self.some()
        return None if x is None else [x, self._store(np.array([self.rng.choice((1, 2)) for _ in range(x.arrays[0].ndim)], np.int64))]

    def clip(self) -> list[_Known | None] | None:
        x = self.some()
        return None if x is None else [x, self._store(np.float32(-0.5)), self._store(np.float32(self.rng.choice((0.5, 6.0, -1.0))))]

    def pad(self) -> list[_Known | None] | None:
        x = self.some()
        return None if x is None else [x, self._store(np.array([self.rng.choice((0, 1)) for _ in range(2 * x.arrays[0].ndim)], np.int64))]


_SPECIAL: Mapping[str, Callable[[_Maker], list[_Known | None] | None]] = {
    "MatMul": _Maker.matmul, "Reshape": _Maker.reshape, "Unsqueeze": _Maker.axes, "Squeeze": _Maker.axes, "ReduceMean": _Maker.axes,
    "ReduceSum": _Maker.axes, "Gather": _Maker.gather, "Slice": _Maker.slices, "LayerNormalization": _Maker.norm, "Expand": _Maker.expand,
    "Tile": _Maker.tile, "Clip": _Maker.clip, "Pad": _Maker.pad,
}  # fmt: skip


def _unique(values: list[_Known]) -> list[_Known]:
    return list({v.name: v for v in values}.values())


def _port(value: _Known) -> onnx.ValueInfoProto:
    shapes = [a.shape for a in value.arrays]
    dims = [a if a == b else None for a, b in zip(*shapes, strict=True)]
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.arrays[0].dtype), dims)


@functools.cache
def _schema(op_type: str, opset: int) -> Any:
    try:
        found = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    return None if found.deprecated else found


@functools.cache
def _operators(opset: int) -> tuple[str, ...]:
    names = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""} - _UNSTEADY - _OWN
    return tuple(sorted(name for name in names if _schema(name, opset) is not None))


def _outputs(schema: Any) -> int:
    """All that must be there; two of a variadic one."""
    if schema.outputs and schema.outputs[0].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
        return 2
    return sum(o.option == onnx.defs.OpSchema.FormalParameterOption.Single for o in schema.outputs) or 1
