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
