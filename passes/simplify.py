"""simplify: onnxsim, with the public interface guarded."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.core.errors import GraphoptError
from graphopt.core.remarks import Remarks
from graphopt.graph.fold import is_random
from graphopt.graph.questions import all_nodes, is_constant, nbytes
from graphopt.graph.shapes import declared_shape, infer_shapes
from graphopt.io.normal_form import normalize

_SMALL = 4096  # bytes; larger weights stay here: what onnxsim is given is the structure, small whatever the model weighs
# onnxsim has crashed on valid graphs: it runs in a process of its own. What it uses torch for is not needed here, and costs seconds.
_WORKER = """
import sys
sys.modules["torch"] = None
import onnx, onnxsim
settings = {"tensor_size_threshold": sys.argv[3] + "B", "include_subgraph": True, "certify": False, "skipped_optimizers": sys.argv[4:]}
model, _ = onnxsim.simplify(onnx.load(sys.argv[1]), **settings)
onnx.save(model, sys.argv[2])
"""
# What it would write in operators of one runtime, or in another form than the passes that recognize these blocks.
_SKIPPED = (
    "fuse_attention", "fuse_gelu", "fuse_gqa", "fuse_layer_norm", "fuse_lp_normalization", "fuse_qkv", "fuse_rms_norm", "fuse_rope",
)  # fmt: skip
_MERGES = "eliminate_common_subexpression"  # also two random nodes into one


@dataclasses.dataclass(frozen=True)
class Simplify(Pass):
    """Simplify by onnxsim (https://github.com/onnxsim/onnxsim), on a copy, and take the result only if the interface is the same.

    Overridable initializers and unused inputs, which onnxsim would fold or drop, keep their place; random nodes stay apart, and no operator of a
    runtime is written. A result that has not fewer nodes, or as many with smaller weights, is refused. Not part of -O1, where canonicalize does
    this work.

    Attributes:
        max_growth: bytes of weights that the result may have more than the input; else it is refused with a remark.
        timeout: seconds that onnxsim may take.
    """

    max_growth: int = 1024
    timeout: int = 600

    def run(self, model: ir.Model, ctx: Context) -> int:
        if importlib.util.find_spec("onnxsim") is None:
            raise GraphoptError("simplify needs onnxsim; install it with: pip install onnxsim")
        simplified = self._simplified(model)
        if isinstance(simplified, str):
            ctx.remarks.missed("", f"the graph stays as it was: {simplified}")
            return 0
        before, after = _census(model), _census(simplified)
        changes = max((before - after).total(), (after - before).total())
        if not changes:
            return 0
        if (after.total(), nbytes(simplified)) >= (before.total(), nbytes(model)):
            ctx.remarks.missed("", f"the graph stays as it was: onnxsim makes {after.total()} nodes of {before.total()}")
            return 0
        if not ctx.fuel.burn():
            return 0
        _adopt(model, simplified)
        ctx.remarks.applied("", f"onnxsim: {before.total()} nodes -> {after.total()}", nodes_before=before.total(), nodes_after=after.total())
        return changes

    def _simplified(self, model: ir.Model) -> ir.Model | str:
        """The simplified copy with its weights, in normal form, or why there is none."""
        structure = model.clone()
        kept = _hide(structure)
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            source, target = Path(folder, "in.onnx"), Path(folder, "out.onnx")
            ir.save(structure, source)
            reason = self._call(source, target, (*_SKIPPED, *([_MERGES] if any(map(is_random, all_nodes(model))) else [])))
            if reason is not None:
                return reason
            result = ir.load(target)
            ir.external_data.load_to_model(result)
        reason = _restore(model, result, kept)
        if reason is not None:
            return reason
        domains = {n.domain for n in all_nodes(result)} - {n.domain for n in all_nodes(model)}
        if domains:
            return f"onnxsim wrote operators of {', '.join(sorted(domains))}"
        normalize(result, Remarks())
        if _random(result) != _random(model):
            return "onnxsim merged or removed random nodes"
        grown = nbytes(result) - nbytes(model)
        return f"its weights would grow by {grown} bytes, max-growth is {self.max_growth}" if grown > self.max_growth else result

    def _call(self, source: Path, target: Path, skipped: Sequence[str]) -> str | None:
        """Run onnxsim on a file, without the optimizers `skipped`; a text is the reason why there is no result."""
        command = [sys.executable, "-c", _WORKER, str(source), str(target), str(max(self.max_growth, 1)), *skipped]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout, check=False)
        except subprocess.TimeoutExpired:
            return f"onnxsim took more than {self.timeout} seconds"
        if done.returncode < 0:
            return f"onnxsim crashed (signal {-done.returncode})"
        if done.returncode or not target.is_file():
            return f"onnxsim failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
        return None


def _hide(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Turn large weights and overridable defaults into plain inputs; returns them by name."""
    hidden: dict[str, ir.TensorProtocol] = {}
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or (is_constant(value) and tensor.nbytes <= _SMALL) or value.is_graph_output():
            continue
        hidden[name] = tensor
        del graph.initializers[name]
        value.const_value = None
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        if not value.is_graph_input():
            graph.inputs.append(value)
    return hidden


def _restore(model: ir.Model, result: ir.Model, hidden: dict[str, ir.TensorProtocol]) -> str | None:
    """Give `result` the inputs of `model`, in order, and its weights back; a text is the reason why that cannot be."""
    graph = result.graph
    if [v.name for v in graph.outputs] != [v.name for v in model.graph.outputs]:
        return f"onnxsim changed the outputs to {[v.name for v in graph.outputs]}"
    for new, old in zip(graph.outputs, model.graph.outputs, strict=True):
        if new.dtype != old.dtype:
            return f"onnxsim changed the type of the output `{old.name}`"
        new.shape = declared_shape(old)
    found = {v.name: v for v in graph.inputs}
    strange = [name for name in found if name not in hidden and name not in {v.name for v in model.graph.inputs}]
    if strange:
        return f"onnxsim made up the input `{strange[0]}`"
    public = []
    for old in model.graph.inputs:
        value = found[old.name] if old.name in found else ir.Value(name=old.name, type=old.type, shape=old.shape)
        value.shape, value.doc_string = old.shape, old.doc_string
        value.metadata_props.update(old.metadata_props)
        public.append(value)
    graph.inputs.clear()
    graph.inputs.extend(public)
    found.update({v.name: v for v in public})
    for name, tensor in hidden.items():  # in the order of the input, which is the same in every process
        if name in found:
            found[name].const_value = tensor
            graph.register_initializer(found[name])
    return None


def _adopt(model: ir.Model, simplified: ir.Model) -> None:
    """Put the simplified graph into `model`; nodes and graph keep what their author noted on them."""
    known = {n.name: n for n in all_nodes(model)}
    for node in all_nodes(simplified):
        old = known.get(node.name)
        if old is not None:
            node.meta.update(old.meta)
            node.metadata_props.update(old.metadata_props)
            node.doc_string = node.doc_string or old.doc_string
    old_graph, graph = model.graph, simplified.graph
    graph.name, graph.doc_string = old_graph.name, old_graph.doc_string
    graph.metadata_props.update(old_graph.metadata_props)
    graph.meta.update(old_graph.meta)
    for new, old_output in zip(graph.outputs, old_graph.outputs, strict=True):
        new.doc_string = old_output.doc_string
        new.metadata_props.update(old_output.metadata_props)
    model.graph = graph
    infer_shapes(model)


def _random(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(n.op_type for n in all_nodes(model) if is_random(n))


def _census(model: ir.Model) -> collections.Counter[str]:
    """The nodes as a multiset, whatever their names."""
    return collections.Counter(
        f"{n.domain}::{n.op_type} {sorted((a.name, str(a.value)[:200]) for a in n.attributes.values())}" for n in all_nodes(model)
    )
