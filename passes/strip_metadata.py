"""strip-metadata: what an exporter wrote into nodes and values about its own source code is removed."""

from __future__ import annotations

import collections
import dataclasses

import onnx_ir as ir

from graphopt.core.contract import Context, Pass
from graphopt.graph.questions import annotated


@dataclasses.dataclass(frozen=True)
class StripMetadata(Pass):
    """Remove the metadata entries of graphs, nodes and values whose key begins with one of `prefix`; those of the model itself always stay.

    The stack traces and scopes of the dynamo exporter are more than half of a small file. The remark says how many bytes went.

    Args:
        prefix: beginnings of keys; an entry of anybody else stays.
    """

    prefix: tuple[str, ...] = ("pkg.torch", "pkg.onnxscript")

    def run(self, model: ir.Model, ctx: Context) -> int:
        entries = nbytes = 0
        kinds: collections.Counter[str] = collections.Counter()
        for properties in annotated(model):
            for key in [k for k in properties if k.startswith(self.prefix)]:
                if not ctx.fuel.burn():
                    continue
                entries += 1
                kinds[key] += 1
                nbytes += len(key.encode()) + len(properties.pop(key).encode())
        if entries:
            ctx.remarks.applied("", f"{entries} entries of metadata, {nbytes} bytes", bytes=nbytes, keys=dict(kinds))
        return entries
