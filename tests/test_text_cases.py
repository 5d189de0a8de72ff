"""Runs every case of tests/passes/*.test and tests/lowerings/*.test, and shows that the harness itself can fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from harness import Case, build, check, check_case, compare, read_cases  # type: ignore[import-not-found]

import graphopt
from graphopt.core.errors import VerifyError
from graphopt.core.pipeline import parse
from graphopt.core.registry import passes, targets

FILES = sorted(path for folder in ("passes", "lowerings") for path in (Path(__file__).parent / folder).glob("*.test"))
CASES = [case for path in FILES for case in read_cases(path)]
TARGETS = "cpu, cpu{opset=16}, quantized{vnni=false}, cuda{opset=16}, openvino, tensorrt"
GELU = """(float[B,4] x) => (float[B,4] y) <float s = {0.70710678}, float one = {1}, float half = {0.5}> {
  a = Mul(x, s)
  e = Erf(a)
  b = Add(e, one)
  c = Mul(x, b)
  y = Mul(c, half)
}"""
LINEAR = "(float[B,4] x) => (float[B,3] y) <float[4,3] w> { y = MatMul(x, w) }"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_has_negative_cases(path: Path) -> None:
    assert any(case.expect == "unchanged" for case in read_cases(path))


def test_every_pass_has_a_file() -> None:
    registry = passes()
    own = {name for name in registry if registry.owner(name) == "graphopt"}
    files = {path.stem: list(read_cases(path)) for path in FILES if path.parent.name == "passes"}
    assert own == set(files)
    foreign = [name for name, cases in files.items() if not all(name in case.pipeline for case in cases)]
    assert not foreign, f"cases that run another pass: {foreign}"


def test_every_lowering_has_a_case() -> None:
    steps = [s for t in parse(TARGETS, targets(), "target") for s in (*t.lowerings(), *(s for row in t.spellings() for s in row.passes))]
    tried = {case.pipeline.split(",")[-1].split("{")[0].strip() for case in CASES} | {"choose-spellings"}
    assert {step.name for step in steps} <= tried
    assert {name for name in targets() if targets().owner(name) == "graphopt"} <= {t.name for t in parse(TARGETS, targets(), "target")}


def test_a_wrong_weight_fails_the_numbers() -> None:
    """The tolerance can fail: one element of twelve, off by a ten-thousandth."""
    proto = build(LINEAR)
    model = graphopt.load(proto)
    feed = {"x": np.ones((2, 4), np.float32)}
    compare(proto, model, [feed])
    weight = model.graph.initializers["w"]
    array = weight.const_value.numpy().copy()
    array[2, 1] += 1e-4
    weight.const_value = ir.tensor(array)
    with pytest.raises(AssertionError, match=r"output `y` at \[\d, 1\]"):
        compare(proto, model, [feed])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"expected": GELU}, r"Gelu"),
        ({"expect": "unchanged"}, "changed the graph"),
        ({"expect": "ops", "expected": "Gelu 2"}, "instead of"),
        ({"remarks": (("missed", "of course"),)}, "no remark `missed` says `of course`"),
    ],
    ids=["graph", "unchanged", "ops", "remark"],
)
def test_a_wrong_expectation_fails(change: dict[str, object], complaint: str) -> None:
    right = Case("gelu", GELU, "after", "(float[B,4] x) => (float[B,4] y) { y = Gelu(x) }", "fuse-activation", (("applied", "Gelu"),))
    check_case(right)
    with pytest.raises(AssertionError, match=complaint):
        check_case(dataclasses.replace(right, **change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"loss": 0.001}, "more than loss: 0.001"),
        ({"loss": 0.9}, "less than a tenth of loss: 0.9"),
        ({"loss": None}, "off by"),
        ({"resizes": ("y",)}, "outputs of another size"),
        ({"pipeline": "canonicalize"}, "every pass is exact: no loss is allowed"),
        ({"expect": "error", "expected": "it cannot be"}, "DID NOT RAISE"),
        ({"expect": "error", "expected": "it cannot be", "pipeline": "quantize{mode=static}"}, "the error does not say `it cannot be`"),
    ],
    ids=["tight", "wide", "none", "resized", "exact", "no error", "another error"],
)
def test_a_wrong_loss_or_error_fails(change: dict[str, object], complaint: str) -> None:
    text = "(float[B,16] x) => (float[B,8] y) <float[16,8] w> { y = MatMul(x, w) }"
    right = Case("quantize", text, "ops", "MatMul 1, DynamicQuantizeLinear 1", "quantize", loss=0.05)
    check_case(right)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=complaint):
        check_case(dataclasses.replace(right, **change))


def test_a_raw_error_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes()["fuse-activation"], "run", lambda self, model, ctx: 1 // 0)
    with pytest.raises(AssertionError, match=r"a raw error: .*ZeroDivisionError"):
        check_case(Case("raw", GELU, "error", "division by zero", "fuse-activation"))


def test_a_dishonest_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = passes()["fuse-activation"]
    run = cls.run
    monkeypatch.setattr(cls, "run", lambda self, model, ctx: 0 * run(self, model, ctx))
    with pytest.raises(AssertionError, match="counted 0 changes"):
        check(build(GELU), "fuse-activation")


def test_a_lost_input_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = passes()["fuse-activation"]

    def run(self: object, model: object, ctx: object) -> int:
        model.graph.inputs.pop()  # type: ignore[attr-defined]
        return 1

    monkeypatch.setattr(cls, "run", run)
    with pytest.raises(VerifyError, match="extra"):
        check(build(GELU.replace("(float[B,4] x)", "(float[B,4] x, float[B] extra)")), "fuse-activation", again=False)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("=== a\npipeline: canonicalize\n--- before\nx\n", "expected `--- before` and one of"),
        ("=== a\npipline: canonicalize\n--- before\nx\n--- after\ny\n", "unknown option"),
        ("=== a\n--- before\nx\n--- after\ny\n", "no pipeline"),
        ("=== a\npipeline: canonicalize\n--- before\nx\n--- unchanged\n", "a negative case names the reason"),
    ],
)
def test_a_broken_case_file_is_an_error(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "broken.test"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        list(read_cases(path))
