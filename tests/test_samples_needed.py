"""What every pass says of samples is true: `no` never reads them, `can` runs without them, `needs` says so and names the options that do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tiny import tiny  # type: ignore[import-not-found]

import graphopt
from graphopt.core import registry
from graphopt.core.contract import Context
from graphopt.core.errors import PassError
from graphopt.core.pipeline import PassManager, parse
from graphopt.report.listing import declared

KNOWN = registry.passes()
ASKED = {  # what a pass must be told
    "prune": "flops=0.2",
    "prune-ffn": "ratio=0.25",
    "prune-heads": "ratio=0.25",
    "prune-head-dim": "ratio=0.5 multiple=1",
    "prune-hidden": "ratio=0.25 multiple=8",
    "merge-heads": "ratio=0.25",
}
FUSED = {"merge-heads", "threshold-attention"}


@pytest.mark.parametrize("name", list(KNOWN))
def test_what_the_list_reads_off_the_source_is_what_the_class_says(name: str) -> None:
    found, cls = declared(registry.passes().place(name), name, "exact", "samples", "data_free"), KNOWN[name]
    assert (found["exact"], found["samples"], found["data_free"]) == (cls.exact, cls.samples, cls.data_free)
    assert found["purpose"]


class Watched(Context):
    """Notes whether somebody looks at the samples."""

    looked = False

    def __getattribute__(self, name: str) -> Any:
        if name == "samples":
            object.__setattr__(self, "looked", True)
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def graph() -> ir.Model:
    """A small BERT, canonicalized."""
    model = graphopt.load(tiny("bert", "sdpa", "ts17"))
    PassManager(parse("canonicalize, simplify-masks, fuse-norm, fuse-activation", KNOWN)).run(model, Context(model))
    return model


def run(graph: ir.Model, name: str, options: str) -> Watched:
    model = graph.clone()
    ctx = Watched(model)
    ctx.looked = False
    text = f"{name}{{{options}}}" if options else name
    PassManager(parse(f"fuse-attention, {text}" if name in FUSED else text, KNOWN)).run(model, ctx)
    return ctx


@pytest.mark.parametrize("name", list(KNOWN))
def test_what_a_pass_says_of_samples(graph: ir.Model, name: str, tmp_path: Path) -> None:
    cls, options = KNOWN[name], ASKED.get(name, "")
    if cls.samples == "needs":
        with pytest.raises(PassError, match=f"{name} needs samples of the model's inputs; add --samples DATA") as caught:
            run(graph, name, options)
        assert (f"; or do without: {cls.data_free}" in str(caught.value)) == bool(cls.data_free)
    else:
        looked = run(graph, name, options).looked
        assert cls.samples == "can" or not looked
    if cls.data_free:
        ids = tmp_path / "ids.txt"
        ids.write_text(" ".join(map(str, range(60))))
        for choice in cls.data_free.split(", or "):
            run(graph, name, f"{options} {choice}".replace("FILE", str(ids)).strip())
