"""What the targets share that run on the CPU provider of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from graphopt.core.contract import Artifact, Pass, Session, Spelling, Target
from graphopt.core.errors import TargetError
from graphopt.core.machine import Machine, processor
from graphopt.core.options import option
from graphopt.driver.lowering.choose import ChooseSpellings
from graphopt.graph.opset.versions import NEWEST, OLDEST, Rise
from graphopt.rewrite.choices import table_passes

from ._decompose import portable
from ._integer import integer_report
from ._limits import save_within
from ._provider import registered
from ._table import cpu_table

FUSE = "canonicalize, simplify-masks, fuse-norm, fuse-activation, fuse-rotary, fuse-attention"
EXACT = f"{FUSE}, canonicalize"
LEVELS = ("", EXACT, f"{EXACT}, quantize{{mode=dynamic}}")


@dataclasses.dataclass(frozen=True)
class CpuProvider(Target):
    """`threads`: intra-op threads of a session; `opset`: of the artifact; `vendor`: whether operators of the runtime may be used.

    `shapes`: BATCHxLENGTH sizes to measure at, such as `1x16+8x64`. `tune`: `on` times the spellings of the table that were not timed before,
    `cache` takes what is in the tuning cache only, `off` takes the defaults of the table. `processor`: the name of another processor, whose
    timings were imported by `graphopt tune import`; nothing is timed then. `int8_blocks`: a weight-only multiply may round its activations to
    8 bits where that is measured to be faster (accuracy_level=4 of MatMulNBits); it costs some accuracy, so it is off.
    """

    threads: int = option(1, least=1)
    opset: int | None = option(None, least=OLDEST, most=NEWEST)
    vendor: bool = True
    shapes: tuple[str, ...] = ()
    tune: Literal["on", "cache", "off"] = "on"
    processor: str | None = None
    int8_blocks: bool = False

    def spellings(self) -> Sequence[Spelling]:
        return cpu_table(vendor=self.vendor, int8_blocks=self.int8_blocks)

    def lowerings(self) -> Sequence[Pass]:
        """The spellings of the table, then what keeps the artifact to `opset` and `vendor`."""
        return [ChooseSpellings(), *table_passes(self.spellings()), *portable(self.opset, self.vendor)]

    def runs_here(self) -> bool:
        return find_spec("onnxruntime") is not None

    def machine(self) -> Machine | None:
        if not self.runs_here():
            return None
        import onnxruntime

        runtime = f"onnxruntime {onnxruntime.__version__} ({onnxruntime.get_build_info()})"
        return Machine(self.processor or processor(), runtime, "CPUExecutionProvider", self.threads, in_process=True)

    def supports(self, node: ir.Node) -> bool:
        """By the runtime's own list; where it has none to show, what the standard has."""
        listed = registered("CPUExecutionProvider")
        domain = "" if node.domain == "ai.onnx" else node.domain
        return any((k.domain, k.op_type) == (domain, node.op_type) for k in listed) if listed else not domain

    def finish(self, model: ir.Model) -> tuple[ir.Model, tuple[Rise, ...]]:
        from graphopt.io.save import finish

        return finish(model, self.opset)

    def save(self, model: ir.Model, path: Path) -> Artifact:
        return save_within(model, path, self.opset, vendor=self.vendor)

    def session(self, model: ir.Model) -> Session:
        from graphopt.run.ort import session

        return session(model, threads=self.threads)

    def report(self, model: ir.Model) -> dict[str, Any]:
        """`integer`: weights that are multiplied as integers; `float`: [{name, reason}] of the other stored integers; `tables`: of rows."""
        return integer_report(model)


def level_text(target: str, level: int, levels: Sequence[str]) -> str:
    """The pipeline of an optimization level.

    Raises:
        TargetError: a level that this version does not have.
    """
    if not 0 <= level < len(levels):
        has = ", ".join(map(str, range(len(levels))))
        raise TargetError(f"target {target} has the levels {has}, found {level}; sample-driven compression (level 3) is not in this version")
    return levels[level]
