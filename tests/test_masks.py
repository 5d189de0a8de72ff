"""What masks mean, proved through the chains that exporters emit, and their shortest form."""

from __future__ import annotations

import numpy as np
import pytest
from test_attention import build, fuse

from graphopt.analysis.formulas.masks import MaskFacts, Masks
from graphopt.run.ort import session

INDICES = """  n = Shape <start = 1, end = 2> (m)
  count = Squeeze (n, zero1)
  index = Range (zero, count, one)
  row = Unsqueeze (index, a1)
  key = Unsqueeze (index, zero1)
  keep2 = Cast <to = 9> (m)
  pad = Unsqueeze (keep2, a12)
"""
CONSTANTS = "int64 zero = {0}, int64 one = {1}, int64[1] zero1 = {0}, int64[1] a1 = {1}, int64[2] a12 = {1,2}, int64 w = {3}, float f0 = {0}, float low = {-1e30}"
BODIES = {
    "padding": "  keep = Identity (pad)\n",
    "causal": "  c = LessOrEqual (key, row)\n  keep = And (c, pad)\n",
    "causal_from_greater": "  c = Greater (key, row)\n  d = GreaterOrEqual (row, key)\n  keep = And (d, pad)\n",
    "window": "  c = LessOrEqual (key, row)\n  e = Sub (row, key)\n  d = Less (e, w)\n  cd = And (c, d)\n  keep = And (cd, pad)\n",
    "upper_triangle": "  c = GreaterOrEqual (key, row)\n  keep = And (c, pad)\n",
}


def model_of(body: str) -> object:
    # the mask passes through a longer chain than needed: And with a condition that always holds
    text = f"""g (int64[B,S] m) => (float[B,1,S,S] y)
<{CONSTANTS}>
{{
{INDICES}{body}  sure0 = GreaterOrEqual (row, zero)
  sure1 = GreaterOrEqual (key, zero)
  sure = And (sure0, sure1)
  full = And (keep, sure)
  y = Where (full, f0, low)
}}"""
    return build(text)


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    return {"m": (np.random.default_rng(length).random((batch, length)) < 0.7).astype(np.int64)}


@pytest.mark.parametrize(
    ("name", "causal", "window"),
    [("padding", False, None), ("causal", True, None), ("causal_from_greater", True, None), ("window", True, 3), ("upper_triangle", None, None)],
)
def test_meaning(name: str, causal: bool | None, window: int | None) -> None:
    model = model_of(BODIES[name])
    keep = next(n for n in model.graph if n.op_type == "Where").inputs[0]  # type: ignore[attr-defined]
    facts = Masks().facts(keep)
    if causal is None:
        assert facts is None, "a mask that is not understood is not guessed"
        return
    assert facts == MaskFacts((model.graph.inputs[0],), causal, window)  # type: ignore[attr-defined]
    assert facts.axes == (("batch", "row", "key") if causal else ("batch", "key"))


@pytest.mark.parametrize("name", BODIES)
def test_the_short_form_hides_the_same_keys(name: str) -> None:
    model = model_of(BODIES[name])
    before = [session(model, optimize=False).run(feeds(*size))["y"] for size in ((2, 5), (3, 8))]
    nodes = len(model.graph)  # type: ignore[attr-defined]
    fuse(model, "simplify-masks")  # type: ignore[arg-type]
    for size, expected in zip(((2, 5), (3, 8)), before, strict=True):
        np.testing.assert_array_equal(session(model, optimize=False).run(feeds(*size))["y"], expected)
    assert (len(model.graph) < nodes) == (name != "upper_triangle")  # type: ignore[attr-defined]
    left = len(model.graph)  # type: ignore[attr-defined]
    fuse(model, "simplify-masks")  # type: ignore[arg-type]
    assert len(model.graph) == left, "a second run changes nothing"  # type: ignore[attr-defined]
