"""The tools compared. Each gives its results for a file; several if they fuse the same number of blocks, then one whose numbers hold counts."""

from __future__ import annotations

import collections
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FUSION = "canonicalize, simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"
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


def given(path: Path) -> list[Output]:
    """The file as it is."""
    import onnx

    model = onnx.load(path)
    return [Output(model, {"file": model.SerializeToString()})]


def graphopt(path: Path, **options: Any) -> list[Output]:
    """Blocks are counted in the fused graph; a target may then spell a block unfused. `options`: of the run at level 1."""
    import onnx

    import graphopt as package

    fused = package.optimize(path, FUSION)
    remarks = [f"{r.pass_name} `{r.node}`: {r.message}" for p in fused.report.passes for r in p.remarks if r.kind == "missed" and p.name in FUSION]
    lowered = package.optimize(path, level=1, **options)
    with tempfile.TemporaryDirectory() as folder:
        graph, artifact = Path(folder, "graph.onnx"), Path(folder, "artifact.onnx")
        fused.model = fused.graph
        fused.save(graph)
        lowered.save(artifact)
        return [Output(onnx.load(graph), {"graph": graph.read_bytes(), "artifact": artifact.read_bytes()}, remarks)]


def onnxruntime(path: Path) -> list[Output]:
    """onnxruntime.transformers.optimizer. It wants to be told the family, the heads and the kind of mask: every answer that a user might give."""
    from onnxruntime.transformers import fusion_options, optimizer

    families = {
        "gpt-neox": "gpt_neox", "gpt": "gpt2", "llama": "gpt2", "bart": "bart", "whisper": "bart", "t5": "t5", "vit": "vit", "deit": "vit",
        "dinov2": "vit", "clip": "clip", "swin": "swin", "phi": "phi", "qwen3": "qwen3",
    }  # fmt: skip
    found: dict[bytes, Output] = {}
    problem: Exception | None = None

    def attempt(family: str, heads: int, width: int, level: int | None, raw_mask: bool) -> int:
        nonlocal problem
        options = fusion_options.FusionOptions(family)
        options.use_raw_attention_mask(raw_mask)
        try:
            made = optimizer.optimize_model(str(path), family, heads, width, optimization_options=options, opt_level=level).model
        except Exception as error:  # noqa: BLE001
            problem = error
            return 0
        found.setdefault(key := made.SerializeToString(), Output(made, {"model": key}))
        return blocks(made)

    for family in sorted({"bert", next((v for k, v in families.items() if path.name.startswith(k)), "bert")}):
        for heads, width, level in ((0, 0, 0), (4, 64, 0), (0, 0, None)):
            if attempt(family, heads, width, level, raw_mask=False):
                attempt(family, heads, width, level, raw_mask=True)
    if not found:
        raise RuntimeError(str(problem)) from problem
    most = max(blocks(output.counted) for output in found.values())
    return [output for output in found.values() if blocks(output.counted) == most]


def onnxscript(path: Path) -> list[Output]:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = ir.to_proto(optimize_for_ort(ir.load(path))[0])
    return [Output(model, {"model": model.SerializeToString()})]


def onnxsim(path: Path) -> list[Output]:
    import onnx
    import onnxsim as package

    model = package.simplify(onnx.load(path))[0]
    return [Output(model, {"model": model.SerializeToString()})]


TOOLS: dict[str, Callable[[Path], list[Output]]] = {
    "graphopt": graphopt, "graphopt-untimed": functools.partial(graphopt, target="cpu{tune=off}", promise=False),
    "onnxruntime": onnxruntime, "onnxscript": onnxscript, "onnxsim": onnxsim, "none": given,
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
