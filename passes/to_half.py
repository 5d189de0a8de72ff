"""to-half: float32 becomes float16 or bfloat16, except where that would leave the range or lose the digits that matter."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array, Context, Pass
from graphopt.core.remarks import plural
from graphopt.graph.interface import RETYPED
from graphopt.graph.questions import all_nodes, constant, is_tensor
from graphopt.rewrite.builder import Builder
from graphopt.rewrite.dead import remove_dead
from graphopt.rewrite.insert import Inserter

from ._precision import FLOAT, Hidden, Precision, largest, tensor_attributes

_FLOOR = -6e4  # of masks in Attention: above the lowest float16, so that a negative score added to it stays finite


@dataclasses.dataclass(frozen=True)
class ToHalf(Pass):
    """Store and compute in 16 bits. Integer and boolean tensors never change, nor does the order of inputs and outputs.

    Masks that float16 cannot hold stay float32 up to their Softmax; for an Attention node they are moved into the range, keeping which keys are
    hidden once and which twice, so that no finite mask becomes -inf. Epsilons of norms are attributes and stay; where a norm is written
    out, it stays float32 from the square to the quotient. So do angles of rotary embeddings, and what sequences and optionals hold, also those
    that are inputs or outputs. Numbers beyond the range are set to its end, with a warning that names the tensor. A row of attention that may
    read no key gives other finite numbers than before.

    Args:
        dtype: float16 or bfloat16.
        keep_io: inputs and outputs of the model keep float32, and Casts stand inside; False: they become 16 bits wide.
    """

    dtype: Literal["float16", "bfloat16"] = "float16"
    keep_io: bool = True
    exact: ClassVar[bool] = False

    def run(self, model: ir.Model, ctx: Context) -> int:
        to = ir.DataType[self.dtype.upper()]
        return _Conversion(model, ctx, Precision(model, to), to, self.keep_io).apply()


class _Conversion:
    def __init__(self, model: ir.Model, ctx: Context, plan: Precision, to: ir.DataType, keep_io: bool) -> None:
        self.model, self.ctx, self.plan, self.to, self.keep_io = model, ctx, plan, to, keep_io
        self.inserter, self.half = Inserter(model), dict[ir.Value, None]()
        self._twins: dict[tuple[ir.Value, ir.DataType, ir.Graph | None], ir.Value] = {}
        self._public = {v: str(v.name) for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype == FLOAT and is_tensor(v)}

    def apply(self) -> int:
        nodes = list(all_nodes(self.model))
        fit = [n for n in nodes if self.plan.changes(n)]
        if not fit and not self._tell():
            self.ctx.remarks.missed("", "nothing to convert: no float32 node takes the type")
        changed = [n for n in fit if self.ctx.fuel.burn()]
        burned = set(changed)
        self.plan.wide.update((n, self.ctx.fuel.why) for n in fit if n not in burned)
        if not changed:
            return 0
        for node in changed:
            for name, attribute in list(tensor_attributes(node)):
                node.attributes[name] = self._attribute(name, attribute)
            self.half.update((v, None) for i, v in enumerate(node.outputs) if v.dtype == FLOAT and self.plan.half_output(node, i))
        if not self.keep_io:
            self.half.update((v, None) for v in self.model.graph.inputs if v in self._public)
        for node in nodes:
            self._inputs(node)
        for value in self.half:
            if value.is_graph_input() and value.const_value is not None:
                value.const_value = ir.tensor(self._narrowed(value.const_value.numpy(), value.name or ""), name=value.name)
            value.type = ir.TensorType(self.to)
        self._outputs()
        self._tidy()
        self._tell()
        return len(changed)

    # ---- edges ----------------------------------------------------------------------------------------------------------------------------

    def _inputs(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != FLOAT:
                continue
            wanted = self.plan.half_input(node, index)
            if wanted == (value in self.half):
                continue
            hidden = self.plan.hidden.get(value) if wanted and value.const_value is None else None
            node.replace_input_with(index, self._twin(value, self.to if wanted else FLOAT, node, hidden))

    def _twin(self, value: ir.Value, to: ir.DataType, reader: ir.Node, hidden: Hidden | None) -> ir.Value:
        """The same numbers in the other type: a stored constant is stored so, anything else is cast, once for each graph that reads it."""
        array = constant(value)
        graph = reader.graph if array is None else self.model.graph
        key = (value, to, graph)
        if key not in self._twins and array is not None:
            name = f"{value.name}_{self.to.name.lower()}"
            self._twins[key] = self.inserter.constant(self._narrowed(array, value.name or ""), name)
        elif key not in self._twins:
            assert reader.graph is not None
            op = self.inserter.builder(reader.graph)
            bounded = value
            if hidden is not None and reader.op_type == "Attention":
                bounded = self._mask(op, value, hidden)
            elif hidden is not None and to != FLOAT:
                bounded = op.Max(value, _number(op, -largest(self.to)))
            self._twins[key] = op.Cast(bounded, to=to)
            self.inserter.behind(value, op, reader.graph, (reader,))
        return self._twins[key]

    @staticmethod
    def _mask(op: Builder, value: ir.Value, hidden: Hidden) -> ir.Value:
        """A mask of float32 fills as one of 16 bits: keys that two masks hide stay below those that one hides, and -inf stays."""
        once = _FLOOR / 2 if hidden.twice else _FLOOR
        out: ir.Value = op.Max(value, _number(op, once))
        if hidden.twice and np.isfinite(np.float32(1.5 * hidden.fill)):
            out = op.Where(op.Less(value, _number(op, 1.5 * hidden.fill)), _number(op, _FLOOR), out)
        if hidden.infinite:
            out = op.Where(op.IsInf(value), value, out)
        return out

    # ---- the public side ------------------------------------------------------------------------------------------------------------------

    def _outputs(self) -> None:
        graph = self.model.graph
        for index, value in enumerate(list(graph.outputs)):
            wanted = FLOAT if self.keep_io else self.to
            if value not in self._public or value.is_graph_input() or value.dtype == wanted:
                continue
            op, public, maker = self.inserter.builder(), value.name, value.producer()
            out = op.Cast(value, to=wanted)
            self.inserter.behind(value, op, graph, () if maker is None else (maker,))
            value.name = self.inserter.names.fresh(f"{public}_inner")
            out.name, out.shape, out.doc_string = public, value.shape, value.doc_string
            out.meta.update(value.meta)
            out.metadata_props.update(value.metadata_props)
            graph.outputs[index] = out
        if not self.keep_io:
            graph.meta[RETYPED] = {**graph.meta.get(RETYPED, {}), **dict.fromkeys(self._public.values(), self.to.name.lower())}

    # ---- numbers --------------------------------------------------------------------------------------------------------------------------

    def _attribute(self, name: str, attribute: Any) -> ir.Attr:
        if attribute.type == ir.AttributeType.TENSOR:
            return ir.AttrTensor(name, ir.tensor(self._narrowed(attribute.value.numpy(), name)))
        return ir.AttrInt64(name, self.to.value)

    def _narrowed(self, array: Array, name: str) -> Array:
        """Rounded to the nearest; finite numbers stay finite, infinite ones infinite."""
        kind = self.to.numpy()
        limit = largest(self.to)
        with np.errstate(over="ignore", invalid="ignore"):
            beyond = np.isfinite(array) & ~np.isfinite(array.astype(kind).astype(np.float32))
            out = np.where(beyond, np.sign(array) * np.float32(limit), array).astype(kind)
        if beyond.any():
            count, worst = int(beyond.sum()), float(array[beyond][np.argmax(np.abs(array[beyond]))])
            self.ctx.remarks.warning(name, f"`{name}`: {count} numbers beyond {limit:g} (such as {worst:g}) are set to it", count=count, worst=worst)
        return out

    # ---- the end --------------------------------------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Float32 copies of weights that nothing reads any more go; Casts there and back again too."""
        for node in list(all_nodes(self.model)):
            source, out = node.inputs[0] if node.inputs else None, node.outputs[0]
            same = node.op_type == "Cast" and source is not None and source.dtype == out.dtype and not out.is_graph_output()
            if same and source is not None and node.graph is not None:
                out.replace_all_uses_with(source)
                node.graph.remove(node, safe=True)
        remove_dead(self.model)

    def _tell(self) -> bool:
        """What stays float32, and why; False: nothing does for a reason."""
        reasons: dict[str, list[str]] = {}
        for node, reason in self.plan.wide.items():
            reasons.setdefault(reason, []).append(node.name or "")
        reasons.pop("it is a border already", None)
        for reason, names in reasons.items():
            self.ctx.remarks.missed(names[0], f"{plural(len(names), 'node stays', 'nodes stay')} float32: {reason}", nodes=names)
        return bool(reasons)


def _number(op: Builder, number: float) -> ir.Value:
    return op.const(np.array(number, np.float32), "bound")
