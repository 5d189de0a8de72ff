"""Measured lowering: what is slow is rejected, what was measured is kept, and a broken cache is a warning."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import parse

import graphopt
from graphopt import Match, RewritePass, Target
from graphopt.analysis.pieces import Activation, AttentionCore, IntegerMatmul, Projections, ResidualNorm
from graphopt.core.contract import Alternative, Context, Pass
from graphopt.core.errors import GraphoptError, TargetError
from graphopt.core.machine import Machine
from graphopt.core.registry import targets
from graphopt.core.remarks import Remark
from graphopt.driver.job import parse_target
from graphopt.driver.lowering.cache import Cache, Timed
from graphopt.driver.lowering.choose import ChooseSpellings
from graphopt.driver.lowering.extract import cost, extract, signature

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
# Two equal residual blocks around a feed-forward part; wide enough that a kernel, not a call, is what the clock sees.
BLOCKS = f"""{HEADER} g (float[batch, seq, 64] x) => (float[batch, seq, 64] y)
<float[64] gamma, float[64] beta, float[64, 256] up, float[256] up_bias, float[256, 64] down, float[64] down_bias>
{{
  h = MatMul(x, up)  hb = Add(h, up_bias)  a = Gelu(hb)  d = MatMul(a, down)  db = Add(d, down_bias)  r = Add(db, x)
  n = LayerNormalization(r, gamma, beta)
  h2 = MatMul(n, up)  hb2 = Add(h2, up_bias)  a2 = Gelu(hb2)  d2 = MatMul(a2, down)  db2 = Add(d2, down_bias)  r2 = Add(db2, n)
  y = LayerNormalization(r2, gamma, beta)
}}"""
ATTENTION = f"""{HEADER} g (float[batch, seq, 64] x) => (float[batch, seq, 64] y)
<float[64, 64] wq, float[64, 64] wk, float[64, 64] wv>
{{ q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)  y = Attention<q_num_heads: int = 4, kv_num_heads: int = 4>(q, k, v) }}"""


def model(text: str = BLOCKS) -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    shapes = {"gamma": (64,), "beta": (64,), "up": (64, 256), "up_bias": (256,), "down": (256, 64), "down_bias": (64,)}
    shapes |= dict.fromkeys(("wq", "wk", "wv"), (64, 64))
    return parse(text, **{n: (0.1 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items() if f" {n}" in text.partition("{")[0]})


@dataclasses.dataclass(frozen=True)
class SlowGelu(RewritePass[Match]):
    """A "fused" Gelu that does the work of twenty: Sin and its undoing, again and again, and then the Gelu; the numbers stay."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Gelu"})

    def match(self, node: ir.Node, ctx: Context) -> Match | None:
        return Match((node,), (node.outputs[0],))

    def build(self, op: Any, m: Match) -> Sequence[ir.Value]:
        x = wave = m.nodes[0].inputs[0]
        for _ in range(20):
            wave = op.Sin(wave)
        return [op.Gelu(op.Add(x, op.Mul(wave, op.const(np.zeros((), np.float32), "zero"))))]

    def run(self, model: ir.Model, ctx: Context) -> int:
        """One round: the Gelu that it writes is an anchor too."""
        from graphopt.rewrite.engine import Driver

        applied, _ = Driver(model, ctx).round(self)
        return applied


@dataclasses.dataclass(frozen=True)
class QuickNothing(RewritePass[Match]):
    """Takes the Gelu away: faster than anything, and only the clock is asked here."""

    anchors: ClassVar[frozenset[str]] = frozenset({"Gelu"})

    def match(self, node: ir.Node, ctx: Context) -> Match | None:
        return Match((node,), (node.outputs[0],))

    def build(self, op: Any, m: Match) -> Sequence[ir.Value]:
        return [op.Identity(m.nodes[0].inputs[0])]


def planted(*table: Alternative, first: Pass | None = None, **options: Any) -> Target:
    """The cpu target with another table."""
    base: Any = targets()["cpu"]

    class Planted(base):  # type: ignore[misc]
        def spellings(self) -> Sequence[Alternative]:
            return table

    made: Target = dataclasses.dataclass(frozen=True)(Planted)(**{"shapes": ("4x32",)} | options)
    return made


SLOW = (Alternative(Activation(), "plain"), Alternative(Activation(), "fused", (SlowGelu(),)))
SLOW_DEFAULT = SLOW[::-1]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "tuning.sqlite"
    monkeypatch.setenv("GRAPHOPT_CACHE", str(path))
    return path


def lowered(where: Target, text: str = BLOCKS) -> graphopt.Result:
    """Without the gate, which would take back what is planted to be wrong: only what the clock chooses is looked at."""
    return graphopt.optimize(model(text), "", target=where, gate=False)


def told(result: graphopt.Result, kind: str) -> list[Remark]:
    return [r for r in result.report.remarks(kind) if r.pass_name == "choose-spellings"]


def ops(graph: ir.Model) -> list[str]:
    return [n.op_type for n in graph.graph]


# ---- pieces ---------------------------------------------------------------------------------------------------------------------------


def test_pieces_are_found_and_equal_ones_are_one() -> None:
    graph = graphopt.load(model())
    norms, gelus = (Context(graph).get(kind) for kind in (ResidualNorm(), Activation()))
    assert [[n.op_type for n in p.nodes] for p in norms] == [["Add", "Add", "LayerNormalization"]] * 2
    assert [[n.op_type for n in p.nodes] for p in gelus] == [["Add", "Gelu"]] * 2
    texts = {signature(small, {"batch": 2, "seq": 8}) for p in norms if (small := extract(p, graph)) is not None}
    assert len(texts) == 1
    small = extract(norms[0], graph)
    assert small is not None
    assert cost(small, {"batch": 2, "seq": 8}) == 4 * 2 * 8 * 64 * 5
    assert signature(small, {"batch": 2, "seq": 8}) != signature(small, {"batch": 2, "seq": 9})


def test_attention_and_its_projections() -> None:
    graph = graphopt.load(model(ATTENTION))
    ctx = Context(graph)
    assert [len(p.nodes) for p in ctx.get(AttentionCore())] == [1]
    assert [[n.op_type for n in p.nodes] for p in ctx.get(Projections())] == [["MatMul"] * 3 + ["Attention"]]


def test_an_integer_piece_holds_all_readers_of_one_activation() -> None:
    result = graphopt.optimize(model(ATTENTION), "quantize{mode=dynamic}", target="cpu{tune=off}")
    (piece,) = Context(result.graph).get(IntegerMatmul())
    kinds = [n.op_type for n in piece.nodes]
    assert (kinds.count("MatMul"), kinds.count("DynamicQuantizeLinear")) == (3, 1)


# ---- choosing -------------------------------------------------------------------------------------------------------------------------


def test_a_planted_slow_spelling_is_rejected() -> None:
    result = lowered(planted(*SLOW))
    assert "Sin" not in ops(result.model)
    (remark,) = told(result, "applied")
    assert "`plain`, the default, for 2 pieces" in remark.message
    (row,) = remark.facts["milliseconds"].values()
    assert row["fused"] > 2 * row["plain"]


def test_a_slow_default_loses() -> None:
    result = lowered(planted(*SLOW_DEFAULT))
    assert "Sin" not in ops(result.model)
    assert "`plain` for 2 pieces" in told(result, "applied")[0].message


def test_a_quick_spelling_wins_and_is_written_everywhere() -> None:
    table = (*SLOW_DEFAULT, Alternative(Activation(), "quick", (QuickNothing(),)))
    assert "Gelu" not in ops(lowered(planted(*table)).model)


@pytest.mark.parametrize("option", [{"tune": "off"}, {"tune": "cache"}, {"processor": "another one"}])
def test_without_measurement_the_default_decides_and_the_report_says_so(option: dict[str, str], empty_cache: Path) -> None:
    first, second = (lowered(planted(*SLOW_DEFAULT, **option)) for _ in range(2))
    assert ops(first.model).count("Sin") == 40
    assert str(first.model) == str(second.model)
    (remark,) = told(first, "missed")
    assert "the default table decides: activation `fused`" in remark.message
    assert remark.facts == {"activation": "fused"}
    assert not Cache().rows()


def test_a_target_that_cannot_run_here_takes_the_defaults() -> None:
    where: Any = planted(*SLOW_DEFAULT)
    type(where).runs_here = lambda self: False
    (remark,) = told(lowered(where), "missed")
    assert "planted cannot run here: the default table decides" in remark.message


def test_a_spelling_that_does_not_run_is_not_chosen() -> None:
    @dataclasses.dataclass(frozen=True)
    class Unknown(QuickNothing):
        def build(self, op: Any, m: Match) -> Sequence[ir.Value]:
            return [op.node("NoSuchOperator", [m.nodes[0].inputs[0]], _domain="nowhere")]

    table = (Alternative(Activation(), "plain"), Alternative(Activation(), "unknown", (Unknown(),)))
    result = lowered(planted(*table))
    assert "NoSuchOperator" not in ops(result.model)
    assert "unknown does not run" in told(result, "applied")[0].message


def test_lowering_without_a_target_says_what_is_missing() -> None:
    with pytest.raises(TargetError, match="the context has none"):
        ChooseSpellings().run(graphopt.load(model()), Context(graphopt.load(model())))


@pytest.mark.parametrize("text", [BLOCKS, ATTENTION])
@pytest.mark.parametrize("name", ["cpu", "cpu{vendor=false}"])
def test_every_spelling_of_the_table_gives_the_same_numbers(text: str, name: str) -> None:
    """Each spelling is forced by a table of its own, and compared with the input."""
    where: Any = parse_target(name)
    source = model(text)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 7, 64)).astype(np.float32)}
    from graphopt.run.ort import session

    base = session(source, optimize=False).run(feed)["y"]
    for spelling in where.spellings():
        result = lowered(planted(spelling, vendor="false" not in name), text)
        got = session(result.model).run(feed)["y"]
        assert np.abs(got - base).max() <= 1e-5 * (1 + np.abs(base).max()), spelling.label


# ---- the cache ------------------------------------------------------------------------------------------------------------------------

HERE = Machine("a processor", "a runtime 1.0", "CPU", 1)
ROW = Timed("piece", "kind: name (Op)", "8x64", 0.001, "Op of float[8,64]")


def test_what_was_timed_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lowered(planted(*SLOW))
    monkeypatch.setattr("graphopt.run.race.latency", None)  # whoever calls the clock now fails
    second = lowered(planted(*SLOW))
    assert told(first, "applied")[0].facts == told(second, "applied")[0].facts
    assert lowered(planted(*SLOW, tune="cache")).report.changes == 0


def test_the_key_holds_machine_and_threads() -> None:
    cache = Cache()
    cache.add(HERE, [ROW])
    assert cache.find(HERE, ["piece"]) == {("piece", ROW.spelling): 0.001}
    for field, value in {"processor": "x", "provider": "x", "threads": 2, "runtime": "x"}.items():
        assert not cache.find(dataclasses.replace(HERE, **{field: value}), ["piece"])
    assert cache.find(dataclasses.replace(HERE, runtime="2.0"), ["piece"], any_runtime=True)


def test_export_and_import(tmp_path: Path) -> None:
    Cache().add(HERE, [ROW])
    other = Cache(tmp_path / "other.sqlite")
    assert other.take(Cache().export()) == 1
    assert other.rows() == Cache().rows()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not a tuning profile"), ("[]", "of the format"), ('{"format": "graphopt-tuning-2", "timings": [{}]}', "row 1: expected processor")],
)
def test_a_wrong_profile_is_refused(text: str, reason: str) -> None:
    with pytest.raises(GraphoptError, match=reason):
        Cache().take(text)
    assert not Cache().rows()


def test_a_profile_of_the_device_decides_on_the_build_machine() -> None:
    """The imported timings say that the planted slow spelling is the quick one there; nothing is timed here."""
    lowered(planted(*SLOW))
    profile = json.loads(Cache().export())
    for row in profile["timings"]:
        row["processor"], row["runtime"] = "the device", "onnxruntime of last year"
        row["seconds"] = 0.001 if "fused" in row["spelling"] else 0.002
    Cache().clear()
    Cache().take(json.dumps(profile))
    result = lowered(planted(*SLOW, processor="the device"))
    assert "Sin" in ops(result.model)
    assert "`fused` for 2 pieces" in told(result, "applied")[0].message
    assert "Sin" not in ops(lowered(planted(*SLOW)).model)


def test_a_corrupt_cache_is_a_warning(empty_cache: Path) -> None:
    empty_cache.parent.mkdir()
    empty_cache.write_bytes(b"this is no database" * 100)
    result = lowered(planted(*SLOW))
    (warning,) = told(result, "warning")
    assert "cannot be used" in warning.message
    assert "graphopt tune clear" in warning.message
    assert "Sin" not in ops(result.model)
    Cache().clear()
    assert not told(lowered(planted(*SLOW)), "warning")


def test_a_locked_cache_is_a_warning(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.driver.lowering.cache._PATIENCE", 0.05)
    Cache().add(HERE, [ROW])
    holder = sqlite3.connect(empty_cache)
    holder.execute("begin exclusive")
    assert "locked" in told(lowered(planted(*SLOW)), "warning")[0].message
    holder.close()


def test_processes_write_side_by_side(empty_cache: Path) -> None:
    code = (
        "import sys; from graphopt.driver.lowering.cache import *; from graphopt.core.machine import Machine\n"
        "for k in range(40): Cache().add(Machine('p', 'r', 'c', 1), [Timed(f'{sys.argv[1]}.{k}', 's', '1', 1.0, '')])"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(k)]) for k in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert len(Cache().rows()) == 120


def test_the_commands(tmp_path: Path, empty_cache: Path) -> None:
    source, profile = tmp_path / "in.onnx", tmp_path / "profile.json"
    onnx.save(model(), source)

    def tune(*arguments: str | Path, code: int = 0) -> str:
        done = subprocess.run([sys.executable, "-m", "graphopt", "tune", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "new timings" in tune("fill", source, "--shapes", "2x32")
    rows = json.loads(tune("show", "--json"))
    assert rows
    assert {row["shape"] for row in rows} == {"2x32"}
    assert "sum" in tune("show")
    tune("export", profile)
    assert "is gone" in tune("clear")
    assert not empty_cache.exists()
    assert f"{len(rows)} timings" in tune("import", profile)
    assert json.loads(tune("show", "--json")) == rows
    assert "cannot read" in tune("import", tmp_path / "absent.json", code=1)
    empty_cache.write_bytes(b"no database" * 200)
    assert "cannot be used" in tune("show", code=1)
