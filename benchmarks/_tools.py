"""The tools compared: each turns a file into graphs that onnxruntime can run, before and after lowering where it knows the difference."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FUSION = "canonicalize, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"
ATTENTION = {
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention", "PackedAttention", "DecoderMaskedMultiHeadAttention",
}  # fmt: skip
_LAYOUT = {"Cast", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Identity", "Concat", "Slice", "Split"}


@dataclasses.dataclass
class Output:
    """What a tool made of a file: the graph in which blocks are counted, all graphs that must run, and what it says it missed."""

    counted: Any
    runs: dict[str, bytes]
    missed: list[str] = dataclasses.field(default_factory=list)


def given(path: Path) -> Output:
    """The file as it is."""
    import onnx

    model = onnx.load(path)
    return Output(model, {"file": model.SerializeToString()})


def graphopt(path: Path) -> Output:
    """Blocks are counted in the fused graph; a target may then spell a block unfused."""
    import onnx

    import graphopt as package

    fused = package.optimize(path, FUSION)
    remarks = [f"{r.pass_name} `{r.node}`: {r.message}" for p in fused.report.passes for r in p.remarks if r.kind == "missed" and p.name in FUSION]
    lowered = package.optimize(path, level=1)
    with tempfile.TemporaryDirectory() as folder:
        graph, artifact = Path(folder, "graph.onnx"), Path(folder, "artifact.onnx")
        fused.model = fused.graph
        fused.save(graph)
        lowered.save(artifact)
        return Output(onnx.load(graph), {"graph": graph.read_bytes(), "artifact": artifact.read_bytes()}, remarks)


def onnxruntime(path: Path) -> Output:
    """onnxruntime.transformers.optimizer; it wants to be told the family, so the best of several is taken."""
    from onnxruntime.transformers import optimizer

    families = {"gpt": "gpt2", "bart": "bart", "t5": "t5", "vit": "vit", "clip": "clip", "swin": "swin", "phi": "phi", "deit": "vit", "dinov2": "vit"}
    name, best, problem = path.name.split(".")[0], None, None
    for family in sorted({"bert", next((v for k, v in families.items() if name.startswith(k)), "bert")}):
        for heads, width in ((0, 0), (4, 64)):
            try:
                model = optimizer.optimize_model(str(path), model_type=family, num_heads=heads, hidden_size=width, opt_level=0).model
            except Exception as error:  # noqa: BLE001
                problem = error
                continue
            if best is None or blocks(model) > blocks(best):
                best = model
    if best is None:
        raise RuntimeError(str(problem)) from problem
    return Output(best, {"model": best.SerializeToString()})


def onnxscript(path: Path) -> Output:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made = optimize_for_ort(ir.load(path))
    model = ir.to_proto(made[0] if isinstance(made, tuple) else made)
    return Output(model, {"model": model.SerializeToString()})


def onnxsim(path: Path) -> Output:
    import onnx
    import onnxsim as package

    model = package.simplify(onnx.load(path))[0]
    return Output(model, {"model": model.SerializeToString()})


def onnxslim(path: Path) -> Output:
    import onnx
    import onnxslim as package

    model = package.slim(onnx.load(path))
    return Output(model, {"model": model.SerializeToString()})


TOOLS: dict[str, Callable[[Path], Output]] = {
    "graphopt": graphopt, "onnxruntime": onnxruntime, "onnxscript": onnxscript, "onnxsim": onnxsim, "onnxslim": onnxslim, "none": given,
}  # fmt: skip


def blocks(model: Any) -> int:
    """Attention operators of any vendor."""
    return sum(n.op_type in ATTENTION for n in model.graph.node)


def primitives(model: Any) -> dict[str, int]:
    """What is still spelled in elementary operators: normalizations, Gelu (erf and tanh), rotary embeddings, and softmax."""
    nodes = list(model.graph.node)
    made = {o: n for n in nodes for o in n.output}
    left = collections.Counter[str]()
    for node in nodes:
        if node.op_type in ("Softmax", "Erf"):
            left["softmax" if node.op_type == "Softmax" else "gelu"] += 1
        if node.op_type in ("Sqrt", "Pow", "Reciprocal", "Rsqrt") and _behind(node, made, {"ReduceMean"}, {"Add", "Clip", "Max"}, 3):
            left["norm"] += node.op_type in ("Sqrt", "Pow")
        if node.op_type == "Tanh" and (_behind(node, made, {"Pow"}, {"Mul", "Add"}, 4)):
            left["gelu"] += 1
        if node.op_type == "Concat" and any(_behind(node, made, {"Neg"}, _LAYOUT, 3, only=i) for i in node.input):
            left["rotary"] += 1
    return dict(left)


def _behind(node: Any, made: dict[str, Any], wanted: set[str], through: set[str], depth: int, only: str = "") -> bool:
    """True if a wanted operator makes an input of the node, with only `through` between them."""
    for name in [only] if only else node.input:
        producer = made.get(name)
        if producer is None:
            continue
        if producer.op_type in wanted or (depth and producer.op_type in through and _behind(producer, made, wanted, through, depth - 1)):
            return True
    return False
