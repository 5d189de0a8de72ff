"""The base of targets that run through a provider of ONNX Runtime; what a provider has is data: its name, its kernels, the domain of its operators.

A plugin may inherit from it, see docs/writing-a-target.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from graphopt.core.contract import Array, Artifact, Pass, Session, Target
from graphopt.core.errors import TargetError
from graphopt.core.options import option
from graphopt.driver.lowering.decompose import portable
from graphopt.driver.lowering.limits import save_within, vendor_report
from graphopt.graph.opset.node_form import WORKING
from graphopt.graph.opset.versions import NEWEST, OLDEST, Rise
from graphopt.graph.questions import all_nodes


@dataclasses.dataclass(frozen=True)
class KernelDef:
    """One kernel: the versions of the operator's schema that it serves (`last` None = only `first`), and its types by schema name."""

    domain: str
    op_type: str
    first: int
    last: int | None
    types: tuple[frozenset[str], ...]  # one for each type variable of the schema; a node fits if all of its tensors fit one of them

    def serves(self, since: int) -> bool:
        return since == self.first if self.last is None else self.first <= since <= self.last

    def takes(self, dtype: str) -> bool:
        return any(dtype in allowed for allowed in self.types)


@dataclasses.dataclass(frozen=True)
class OrtTarget(Target):
    """A provider of ONNX Runtime: what it has no kernel for falls back to the CPU, node by node, and the report names these nodes.

    A subclass says the level texts (`pipeline`), and as class variables:
        provider: its name.
        package: what `pip install` brings it.
        own_domain: of the runtime's own operators, which `vendor=false` keeps out of the artifact.
        has_kernels: False for one that compiles parts of the graph, and registers no kernels; it overrides `refusal`.
    Optional are `known` (its kernels, for machines without it), `spell` (passes that write what it likes) and `providers`.

    Options are `threads` of a session, the `opset` that the artifact keeps to, `vendor` (whether operators of the runtime may be used),
    and `shapes`, BATCHxLENGTH sizes to measure at, such as `1x16+8x64`.
    """

    threads: int = option(1, least=1)
    opset: int | None = option(None, least=OLDEST, most=NEWEST)
    vendor: bool = True
    shapes: tuple[str, ...] = ()
    provider: ClassVar[str] = ""
    package: ClassVar[str] = ""
    own_domain: ClassVar[str] = ""
    has_kernels: ClassVar[bool] = True

    @property
    def without(self) -> str:
        """The domain whose operators the artifact must not have."""
        return "" if self.vendor else self.own_domain

    def lowerings(self) -> Sequence[Pass]:
        return [*self.spell(), *portable(self.opset, self.without)]

    def spell(self) -> Sequence[Pass]:
        """The spellings that the provider likes, before the limits."""
        return ()

    def known(self) -> tuple[KernelDef, ...]:
        """The kernels of the provider by its documentation."""
        return ()

    def kernels(self) -> tuple[KernelDef, ...]:
        """The kernels of the installed runtime where it has the provider, else those of the documentation."""
        return (registered(self.provider) if self.has_kernels else ()) or self.known()

    def supports(self, node: ir.Node) -> bool:
        return self.refusal(node) is None

    def refusal(self, node: ir.Node, opset: int | None = None) -> str | None:
        """None if the provider has a kernel for the node, written for `opset` (by default that of its graph); else why not."""
        found = [k for k in self.kernels() if (k.domain, k.op_type) == (_domain(node), node.op_type)]
        name = node.op_type if not _domain(node) else f"{_domain(node)}::{node.op_type}"
        if not found:
            return f"no kernel for {name}"
        since = _since(node, opset)
        fitting = [k for k in found if k.serves(since)]
        if not fitting:
            older = _last_served(node.op_type, since, found)
            return f"no kernel for {name} of opset {since}" + (f"; with opset={older} there is one" if older else "")
        kind = _kind(node)
        return None if kind is None or any(k.takes(kind) for k in fitting) else f"no kernel for {name} of {kind}"

    def finish(self, model: ir.Model) -> tuple[ir.Model, tuple[Rise, ...]]:
        from graphopt.io.save import finish

        return finish(model, self.opset)

    def save(self, model: ir.Model, path: Path) -> Artifact:
        return save_within(model, path, self.opset, self.without)

    def session(self, model: ir.Model) -> Session:
        from graphopt.run.ort import session

        self._require()
        return session(model, threads=self.threads, providers=(*self.providers(), "CPUExecutionProvider"))

    def probe(self, model: ir.Model, feed: Mapping[str, Array] | None = None) -> Mapping[str, Any]:
        from graphopt.run import guarded, ort

        self._require()
        return guarded.probe(model, feed, ort.settings(self.threads, providers=(*self.providers(), "CPUExecutionProvider")))

    def providers(self) -> Sequence[str | tuple[str, Mapping[str, str]]]:
        """What runs before the CPU provider does, with its options."""
        return (self.provider,)

    def runs_here(self) -> bool:
        return self.provider in available()

    def _require(self) -> None:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise TargetError(f"onnxruntime cannot be imported ({error}); pip install {self.package}") from error
        if not self.runs_here():
            have = ", ".join(available())
            raise TargetError(f"target {self.name} cannot run here: this onnxruntime has {have} and no {self.provider}; pip install {self.package}")

    def report(self, model: ir.Model) -> dict[str, Any]:
        """`falls_back`: [{node, op, reason}] of the artifact's nodes that would run on the CPU; `known_from`; `vendor_ops`."""
        finished, _ = self.finish(model)
        refused = [(n, self.refusal(n, finished.opset_imports[""])) for n in all_nodes(finished)]
        told = [{"node": n.name or "", "op": n.op_type, "reason": reason} for n, reason in refused if reason is not None]
        source = "the registry of the installed runtime" if self.has_kernels and registered(self.provider) else "the documentation of the provider"
        return {"provider": self.provider, "known_from": source, "falls_back": told} | vendor_report(model, self.own_domain)


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _since(node: ir.Node, opset: int | None) -> int:
    """The version of the schema that a node is written for."""
    if _domain(node):
        return 1
    own = node.graph.opset_imports.get("") if node.graph is not None else None
    version = node.version or opset or own or WORKING
    try:
        return int(onnx.defs.get_schema(node.op_type, version, "").since_version)
    except onnx.defs.SchemaError:
        return version


def _last_served(op_type: str, since: int, kernels: Sequence[KernelDef]) -> int | None:
    """The newest opset below `since` at which one of the kernels serves the operator."""
    for version in range(since - 1, OLDEST - 1, -1):
        try:
            schema = onnx.defs.get_schema(op_type, version, "")
        except onnx.defs.SchemaError:
            return None
        if any(k.serves(schema.since_version) for k in kernels):
            return version
    return None


def _kind(node: ir.Node) -> str | None:
    """The type that decides about the kernel: of the first floating input, else of the first input, else of the output."""
    operands = node.inputs[1:] if node.op_type == "Where" else node.inputs  # the condition is always boolean
    inputs = [v.dtype for v in operands if v is not None and v.dtype is not None]
    values = inputs or [v.dtype for v in node.outputs if v.dtype is not None]
    if not values:
        return None
    if node.op_type in _BY_FIRST:
        return _name(values[0])
    return _name(next((d for d in values if d.is_floating_point()), values[0]))


_BY_FIRST = ("DequantizeLinear", "MatMulInteger", "If", "Loop", "OneHot", "ConstantOfShape", "EmbedLayerNormalization", "QAttention")


def _name(dtype: ir.DataType) -> str:
    return dtype.name.lower()


def available() -> Sequence[str]:
    """The providers of the installed runtime; none where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return ()
    found: Sequence[str] = onnxruntime.get_available_providers()
    return found


@functools.cache
def registered(provider: str) -> tuple[KernelDef, ...]:
    """The kernels that the installed runtime has registered for a provider; empty where it has none, or compiles whole graphs instead.

    Read in a process of its own: the listing crashes the interpreter in some builds (onnxruntime-openvino 1.24.1).
    """
    if provider not in available():
        return ()
    done = subprocess.run([sys.executable, "-c", _LISTING, provider], capture_output=True, text=True, check=False)
    return tuple(_kernel(*row) for row in json.loads(done.stdout)) if done.returncode == 0 else ()


def _kernel(domain: str, op_type: str, first: int, last: int, constraints: dict[str, list[str]]) -> KernelDef:
    types = tuple(frozenset(t.removeprefix("tensor(").rstrip(")") for t in names) for names in constraints.values())
    return KernelDef("" if domain == "ai.onnx" else domain, op_type, first, None if last >= _OPEN else last, types)


_OPEN = 2**31 - 1
_LISTING = """
import json, sys
import onnxruntime.capi.onnxruntime_pybind11_state as state
kernels = [k for k in state.get_all_opkernel_def() if k.provider == sys.argv[1]]
print(json.dumps([[k.domain, k.op_name, *k.version_range, dict(k.type_constraints)] for k in kernels]))
"""
