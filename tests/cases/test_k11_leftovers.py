"""Kind 11: what earlier cases left over, and their siblings."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from test_api import BLOCK, RELU, model

import graphopt
from graphopt.core.errors import PassError, PipelineError

# ---- messages -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "without"),
    [
        ("prune-ffn{ratio=0.5}", "importance=magnitude refit=false"),
        ("factorize", "method=svd"),
        ("quantize{mode=static}", "mode=dynamic"),
        ("drop-layers", "layers=0+1"),
    ],
)
def test_an_error_about_samples_names_what_does_without(pipeline: str, without: str) -> None:
    with pytest.raises(PassError, match=f"add --samples DATA.*; or do without: {re.escape(without)}") as error:
        graphopt.optimize(model(BLOCK), pipeline, target="cpu{tune=off}")
    assert "\n" not in str(error.value)


def test_a_lossy_pass_that_did_nothing_says_so_at_the_end(tmp_path: Path) -> None:
    report = graphopt.optimize(model(RELU), "quantize, canonicalize", target="cpu{tune=off}").report
    told = [str(x) for x in report.remarks("warning")]
    assert told == [
        "warning quantize: `quantize` was asked for and changed nothing: nothing to quantize: no MatMul, Gemm or Gather reads a stored weight that fits"
    ]
    assert str(report).splitlines()[-1] == told[0]
    assert not graphopt.optimize(model(BLOCK), "quantize, fuse-rotary", target="cpu{tune=off}").report.remarks("warning")


def test_an_unknown_option_points_to_the_command_that_explains() -> None:
    for pipeline, target, command in (
        ("factorize{enrgy=0.5}", "cpu", "graphopt passes factorize"),
        ("canonicalize", "cpu{treads=2}", "graphopt targets cpu"),
    ):
        with pytest.raises(PipelineError) as error:
            graphopt.optimize(onnx.ModelProto(), pipeline, target=target)
        assert str(error.value).splitlines()[-1] == f"  `{command}` explains them"
