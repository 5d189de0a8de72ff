"""Kind 11: what was left over from the first round of faults, and siblings."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from models import parse  # type: ignore[import-not-found]

import graphopt
from graphopt.driver import loss as losses
from graphopt.driver.loss import Loss
from graphopt.report.elements import Line
from graphopt.run import ort
from graphopt.run.samples import Samples

Array = np.ndarray[Any, Any]


# ---- the loss streams over samples ---------------------------------------------------------------------------------------------------------


class Counted:
    """A session that knows how many of its outputs are alive."""

    alive = most = 0

    def __init__(self, model: Any) -> None:
        self.session = ort.session(model)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        outputs = self.session.run(feeds)
        for array in outputs.values():
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)
            weakref.finalize(array, self._gone)
        return outputs

    @staticmethod
    def _gone() -> None:
        Counted.alive -= 1


@pytest.mark.parametrize("small", [True, False])
def test_the_loss_streams(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small outputs of the original are remembered; of large ones, as logits are, two batches of each model are alive at most."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 64)).astype(np.float32)
    source, other = (
        parse('<ir_version: 10, opset_import: ["": 21]> g (float[b,8] x) => (float[b,64] y) { y = MatMul(x, w) }', w=array) for array in (w, 1.25 * w)
    )
    model = graphopt.load(source)
    samples = Samples([{"x": rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(40)])
    monkeypatch.setattr(losses, "_HELD", 40 * 4 * 64 * 4 if small else 5 * 4 * 64 * 4)

    class Here:
        session = staticmethod(Counted)

    loss = Loss(Here(), model, samples, None)  # type: ignore[arg-type]
    for _ in range(2):
        Counted.alive = Counted.most = 0
        assert loss.of(Counted(other)) == pytest.approx(0.25)  # type: ignore[arg-type]
        assert Counted.most <= (44 if small else 9)


def test_the_report_says_how_much_was_read() -> None:
    source = parse('<ir_version: 10, opset_import: ["": 21]> g (float[b,8] x) => (float[b,4] y) { y = MatMul(x, w) }', w=np.ones((8, 4), np.float32))
    batches = [{"x": np.ones((n, 8), np.float32)} for n in (3, 5)]
    report = graphopt.optimize(source, samples=batches, promise=False).report
    assert report.as_dict()["samples"] == {"batches": 2, "rows": 8}
    assert Line("samples: 2 batches, 8 tokens or rows") in report.elements()
    assert graphopt.optimize(source, promise=False).report.as_dict()["samples"] is None


# ---- caches that change with their heads ---------------------------------------------------------------------------------------------------

CACHED = """<ir_version: 10, opset_import: ["": 23]> g (float[B,S,32] x, float[B,4,P,8] past_k, float[B,4,P,8] past_v)
    => (float[B,S,32] y, float[B,4,T,8] present_k, float[B,4,T,8] present_v) {
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    a, present_k, present_v = Attention<q_num_heads=4, kv_num_heads=4, is_causal=1>(q, k, v, "", past_k, past_v)
    y = MatMul(a, wo) }"""


@pytest.mark.parametrize("pipeline", ["merge-heads{kv-heads=2", "prune-heads{ratio=0.5 importance=magnitude"])
def test_samples_with_a_cache_of_heads(pipeline: str) -> None:
    """An empty cache fits in any size, also for the refit; a full one is refused in one line that says what to do."""
    rng = np.random.default_rng(0)
    source = parse(CACHED, **{n: (rng.standard_normal((32, 32)) / 6).astype(np.float32) for n in ("wq", "wk", "wv", "wo")})

    def batches(past: int) -> list[dict[str, Array]]:
        shapes = {"x": (4, 6, 32), "past_k": (4, 4, past, 8), "past_v": (4, 4, past, 8)}
        return [{n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()} for _ in range(5)]

    text = pipeline + " resize=past_k+past_v+present_k+present_v}"
    result = graphopt.optimize(source, text, samples=batches(0), promise=False)
    assert any("refitted: error" in r.message for record in result.report.passes for r in record.remarks)
    with pytest.raises(graphopt.GraphoptError, match=r"feed `past_k` as .* give samples with an empty `past_k`, or refit=false"):
        graphopt.optimize(source, text, samples=batches(3), promise=False)
