"""Instruments: what each one catches, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.core.contract import Context, Pass
from graphopt.core.errors import PassError, SampleError, VerifyError
from graphopt.core.pipeline import Instrument, PassManager
from graphopt.driver.instruments import CheckNumerics, Dump, PrintChanged, Time, VerifyEach
from graphopt.graph import shapes
from graphopt.run import ort
from graphopt.run.samples import Samples

TEXT = """<ir_version: 10, opset_import: ["": 23]>
g (int64[b,s] ids, int64[b,s] mask, float gain) => (float[b,s,4] y) <float[9,4] table, float[4,4] w, int64[1] last = {2}, float one = {1}> {
  [embed] e = Gather(table, ids)
  [float] m = Cast<to=1>(mask)
  [wide] k = Unsqueeze(m, last)
  [keep] x = Mul(e, k)
  [project] h = MatMul(x, w)
  [scale] t = Mul(h, gain)
  [end] y = Add(t, one)
}"""


def model() -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {"table": rng.standard_normal((9, 4)), "w": rng.standard_normal((4, 4))}
    built = ir.from_onnx_text(TEXT, initializers=[ir.tensor(a.astype(np.float32), name=n) for n, a in weights.items()])
    shapes.infer_shapes(built)
    return built


Change = Callable[[ir.Model], int]


def step(change: Change, *, is_exact: bool = True) -> Pass:
    @dataclasses.dataclass(frozen=True)
    class Tinker(Pass):
        exact: ClassVar[bool] = is_exact

        def run(self, model: ir.Model, ctx: Context) -> int:
            return change(model)

    return Tinker()


def nothing(model: ir.Model) -> int:
    return 0


def flip_one_weight(model: ir.Model) -> int:
    """The injected fault: one sign, in one element."""
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[2, 1] *= -1
    value.const_value = ir.tensor(array, name="w")
    return 1


def shift_ids(model: ir.Model) -> int:
    """Reads the table at other rows: invisible where all ids are 0."""
    value = model.graph.initializers["table"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[1:] = array[:0:-1]
    value.const_value = ir.tensor(array, name="table")
    return 1


def drop_mask(model: ir.Model) -> int:
    """Right only where the mask is all ones."""
    nodes = {n.name: n for n in model.graph}
    nodes["project"].replace_input_with(0, nodes["embed"].outputs[0])
    model.graph.remove([nodes["keep"], nodes["wide"], nodes["float"]], safe=True)
    return 1


def divide_by_zero(model: ir.Model) -> int:
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(np.full((4, 4), np.nan, np.float32), name="w")
    return 1


def run(change: Change, *instruments: Instrument, is_exact: bool = True, samples: Samples | None = None) -> Context:
    graph = model()
    ctx = Context(graph, samples=samples)
    PassManager([step(nothing), step(change, is_exact=is_exact)], instruments).run(graph, ctx)
    return ctx


@pytest.mark.parametrize("fault", [flip_one_weight, shift_ids, drop_mask])
def test_check_numerics_catches_a_fault(fault: Change) -> None:
    with pytest.raises(PassError) as caught:
        run(fault, CheckNumerics())
    assert isinstance(caught.value.cause, VerifyError)
    assert (caught.value.position, caught.value.pass_text) == (2, "tinker")
    assert "pass 2 `tinker` changed the numbers: output `y` at [" in str(caught.value)
    assert "expected" in str(caught.value)


def test_check_numerics_names_the_first_value_inside() -> None:
    with pytest.raises(PassError, match="inside the graph, the first is `h` at"):
        run(flip_one_weight, CheckNumerics())


def test_check_numerics_leaves_a_right_pass_alone() -> None:
    def commute(model: ir.Model) -> int:
        node = next(n for n in model.graph if n.name == "scale")
        a, b = node.inputs
        node.replace_input_with(0, b)
        node.replace_input_with(1, a)
        return 1

    assert not list(run(commute, CheckNumerics(), VerifyEach()).remarks)


def test_a_lossy_pass_sets_the_baseline_for_those_after_it() -> None:
    graph = model()
    PassManager([step(flip_one_weight, is_exact=False), step(nothing)], [CheckNumerics()]).run(graph, Context(graph))
    with pytest.raises(PassError, match="pass 2 `tinker` changed the numbers"):
        PassManager([step(shift_ids, is_exact=False), step(flip_one_weight)], [CheckNumerics()]).run(graph, Context(graph))


def test_an_undone_lossy_pass_leaves_the_baseline() -> None:
    """The manager may undo a lossy pass after its instruments saw it."""
    graph = model()
    ctx, check = Context(graph), CheckNumerics()
    lossy, exact = step(flip_one_weight, is_exact=False), step(nothing)
    check.before_pipeline(graph, ctx)
    kept = graph.graph.initializers["w"].const_value
    check.before(lossy, 1, graph, ctx)
    lossy.run(graph, ctx)
    check.after(lossy, 1, 1, 0.0, graph, ctx)
    graph.graph.initializers["w"].const_value = kept
    check.before(exact, 2, graph, ctx)
    check.after(exact, 2, 0, 0.0, graph, ctx)


def test_even_a_lossy_pass_must_not_give_nan() -> None:
    with pytest.raises(PassError, match="output `y` has become NaN"):
        run(divide_by_zero, CheckNumerics(), is_exact=False)


def test_check_numerics_uses_the_samples_of_the_user() -> None:
    blind = {"ids": np.zeros((1, 2), np.int64), "mask": np.ones((1, 2), np.int64), "gain": np.array(1.0, np.float32)}
    run(shift_ids, CheckNumerics(), samples=Samples([blind]))
    with pytest.raises(PassError):
        run(shift_ids, CheckNumerics(), samples=Samples([{**blind, "ids": np.array([[0, 3]])}]))
    with pytest.raises(SampleError, match="input `gain` missing"):
        run(nothing, CheckNumerics(), samples=Samples([{"ids": blind["ids"], "mask": blind["mask"]}]))


def test_a_graph_that_no_longer_runs_is_told_so() -> None:
    def break_op(model: ir.Model) -> int:
        next(n for n in model.graph if n.name == "end").op_type = "NoSuchOp"
        return 1

    with pytest.raises(PassError, match=r"after pass 2 `tinker` the graph no longer runs: .*NoSuchOp"):
        run(break_op, CheckNumerics())


RANDOM = """<ir_version: 10, opset_import: ["": 23]>
g (float[b,64] x) => (float[b,64] noisy, float[b,64] calm) <float half = {0.5}, bool yes = {1}, float[64] w> {
  [drop] noisy = Dropout(x, half, yes)
  [calm] calm = Add(x, w)
}"""


def test_live_dropout_is_neither_a_false_mismatch_nor_a_false_pass() -> None:
    graph = ir.from_onnx_text(RANDOM, initializers=[ir.tensor(np.ones(64, np.float32), name="w")])
    shapes.infer_shapes(graph)
    ctx = Context(graph)
    PassManager([step(nothing)], [CheckNumerics()]).run(graph, ctx)
    (remark,) = ctx.remarks
    assert remark.kind == "warning"
    assert "`noisy` are not checked: the graph is random" in remark.message

    def other_weight(model: ir.Model) -> int:
        model.graph.initializers["w"].const_value = ir.tensor(np.zeros(64, np.float32), name="w")
        return 1

    with pytest.raises(PassError, match="output `calm`"):
        PassManager([step(other_weight)], [CheckNumerics()]).run(graph, Context(graph))


def test_an_input_that_onnxruntime_cannot_run_is_checked_by_the_reference() -> None:
    """A rotary cache of batch 1, as exporters write it: the runtime wants the batch of x."""
    text = """<ir_version: 10, opset_import: ["": 23]>
    g (float[b,2,s,4] x, float[1,s,2] cos, float[1,s,2] sin, float[4] w) => (float[b,2,s,4] y) {
      [r] r = RotaryEmbedding(x, cos, sin)
      [a] y = Mul(r, w)
    }"""
    graph = ir.from_onnx_text(text)
    shapes.infer_shapes(graph)
    feed = {"x": np.ones((2, 2, 3, 4)), "cos": np.ones((2, 3, 2)), "sin": np.zeros((2, 3, 2)), "w": np.ones(4)}
    with pytest.raises(Exception, match="onnxruntime failed"):
        ort.session(graph, optimize=False).run({k: v.astype(np.float32) for k, v in feed.items()} | {"cos": np.ones((1, 3, 2), np.float32)})

    def swap(model: ir.Model) -> int:
        next(n for n in model.graph if n.name == "a").op_type = "Add"
        return 1

    PassManager([step(nothing)], [CheckNumerics()]).run(graph, Context(graph))
    with pytest.raises(PassError, match="output `y`"):
        PassManager([step(swap)], [CheckNumerics()]).run(graph, Context(graph))


def test_verify_each_catches_a_broken_form_and_a_dishonest_count() -> None:
    def leave_dead_weight(model: ir.Model) -> int:
        drop_mask(model)
        return 1

    with pytest.raises(PassError, match="dead: weight `last` is dead"):
        run(leave_dead_weight, VerifyEach())

    def count_nothing(model: ir.Model) -> int:
        flip_one_weight(model)
        return 0

    with pytest.raises(PassError, match="`tinker` says that it changed nothing, but the graph is another"):
        run(count_nothing, VerifyEach())

    def rename(model: ir.Model) -> int:
        model.graph.outputs[0].name = "z"
        return 1

    with pytest.raises(PassError, match="interface: the outputs were y, and are now z"):
        run(rename, VerifyEach())


def test_time_and_print_changed(capsys: pytest.CaptureFixture[str]) -> None:
    run(flip_one_weight, Time())
    words = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert [(row[0], row[3], row[5]) for row in words] == [("1", "0", "tinker"), ("2", "1", "tinker")]
    run(flip_one_weight, PrintChanged())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "--- after pass 1 `tinker`: 0 changes, the graph is the same"
    assert lines[1] == "--- after pass 2 `tinker`: 1 change"
    assert [line[:13] for line in lines[2:] if line[0] in "+-"] == ["-  %w = f32[4", "+  %w = f32[4"]


def test_print_changed_speaks_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    run(flip_one_weight, PrintChanged(), Time())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "after pass 2 `tinker`" in captured.err


def test_dump_writes_numbered_graphs_that_run(tmp_path: Path) -> None:
    run(flip_one_weight, Dump(tmp_path / "dump"))
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert names == [f"{stem}.{end}" for stem in ("00-input", "01-tinker", "02-tinker") for end in ("onnx", "txt")]
    feed = {"ids": np.ones((1, 2), np.int64), "mask": np.ones((1, 2), np.int64), "gain": np.array(1.0, np.float32)}
    first, last = (ort.session(tmp_path / "dump" / f"{n}.onnx").run(feed)["y"] for n in ("00-input", "02-tinker"))
    assert not np.array_equal(first, last)
    assert "MatMul" in (tmp_path / "dump" / "01-tinker.txt").read_text()


def test_dump_keeps_the_graph_of_a_failure(tmp_path: Path) -> None:
    def explode(model: ir.Model) -> int:
        flip_one_weight(model)
        raise RuntimeError("half way")

    with pytest.raises(PassError, match="half way"):
        run(explode, Dump(tmp_path))
    assert (tmp_path / "02-tinker.failed.txt").read_text().startswith("# half way\ngraph (")
