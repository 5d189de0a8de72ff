"""Attention that depends on positions and the mask only: which key a head reads, whatever the text says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from graphopt.compress.attention_weights import Place
from graphopt.core.contract import Array
from graphopt.rewrite.builder import Builder


@dataclasses.dataclass(frozen=True)
class Nearest:
    """For each head the form that its weights are nearest to, and the largest difference of a weight on the samples."""

    forms: tuple[str, ...]
    deviations: tuple[float, ...]

    @classmethod
    def of(cls, gaps: Array) -> Self:
        """From the largest differences [heads, forms]."""
        best = np.argmin(gaps, axis=1)
        return cls(tuple(FORMS[k] for k in best), tuple(float(row[k]) for row, k in zip(gaps, best, strict=True)))

    def within(self, tolerance: float) -> tuple[str | None, ...]:
        return tuple(form if gap <= tolerance else None for form, gap in zip(self.forms, self.deviations, strict=True))

    def told(self, tolerance: float) -> list[dict[str, Any]]:
        """For the report."""
        rows = enumerate(zip(self.forms, self.deviations, strict=True))
        return [{"head": k, "form": form, "deviation": float(f"{gap:.4g}"), "replaced": gap <= tolerance} for k, (form, gap) in rows]


class Patterns:
    """The forms of one attention as weights [batch or 1, heads or 1, rows, keys], computed from sizes and mask.

    A row stands at position row + keys - rows, as behind a cache. `self`, `previous`, `next` read the key there, one before, one after; a row whose
    neighbour does not exist or is hidden reads itself. `first` reads the first visible key, `uniform` all visible keys alike. A row that would read
    a hidden key only reads nothing.
    """

    def __init__(self, op: Builder, place: Place) -> None:
        masks = place.masks()
        assert not isinstance(masks, str)
        self._op = op
        self._rows, self._keys = place.sizes(op)
        key = ("visible", place.causal, self._rows, self._keys, *((m.value, m.kind, m.factor) for m in masks))
        self._visible: ir.Value = op.shared(key, lambda: self._seen([m.visible(op) for m in masks], place.causal))

    def form(self, name: str) -> ir.Value:
        return self._op.shared(("form", name, self._visible), lambda: _FORMS[name](self))

    def mixed(self, forms: Sequence[str | None], weights: ir.Value | None) -> ir.Value:
        """The form of each head; `weights` for those that have none."""
        op = self._op
        named = list(dict.fromkeys(f for f in forms if f is not None))
        out = self.form(named.pop(0)) if weights is None else weights
        for name in named:
            these = np.array([f == name for f in forms]).reshape(-1, 1, 1)
            out = op.Where(op.const(these, f"heads_{name}"), self.form(name), out)
        return out

    def gaps(self, weights: ir.Value) -> ir.Value:
        """For each row the largest difference of a weight: [batch, rows, forms * heads]; what is no number counts as 1."""
        op = self._op
        found = []
        for name in FORMS:
            gap = op.Abs(op.Sub(weights, self.form(name)))
            gap = op.Where(op.IsNaN(gap), self._number(1), gap)
            found.append(op.Transpose(op.ReduceMax(gap, self._int(-1), keepdims=0), perm=[0, 2, 1]))
        return op.Concat(*found, axis=-1)

    def _seen(self, masks: Sequence[ir.Value], causal: bool) -> ir.Value:
        """Which keys a row may read, bool [.., rows, keys]."""
        op = self._op
        parts = [*masks, *([op.LessOrEqual(self._key(), self._row(0))] if causal else [])] or [op.const(np.array(True), "visible")]
        every = parts[0]
        for other in parts[1:]:
            every = op.And(every, other)
        return op.Expand(every, op.Concat(self._rows, self._keys, axis=0))

    def _first(self) -> ir.Value:
        op = self._op
        first = op.ArgMax(self._float(self._visible), axis=-1, keepdims=1)  # of equal ones the first
        return self._float(op.And(self._visible, op.Equal(self._key(), first)))

    def _uniform(self) -> ir.Value:
        op, seen = self._op, self._float(self._visible)
        return op.Div(seen, op.Max(op.ReduceSum(seen, self._int(-1), keepdims=1), self._number(1)))

    def _neighbour(self, step: int) -> ir.Value:
        op, near = self._op, self._at(step)
        alone = op.Sub(self._number(1), op.ReduceMax(near, self._int(-1), keepdims=1))
        return op.Add(near, op.Mul(self.form("self"), alone))

    def _at(self, step: int) -> ir.Value:
        op = self._op
        return self._float(op.And(self._visible, op.Equal(self._key(), self._row(step, placed=True))))

    def _key(self) -> ir.Value:
        op = self._op
        return op.shared(("keys", self._keys), lambda: self._range(self._keys))

    def _row(self, step: int, placed: bool = False) -> ir.Value:
        """[rows, 1]: each row's number plus `step`; `placed`: its position among the keys."""
        op = self._op

        def build() -> ir.Value:
            first = op.Add(op.Sub(self._keys, self._rows), self._int(step)) if placed and self._rows is not self._keys else self._int(step)
            return op.Unsqueeze(op.Add(self._range(self._rows), first), self._int(1))

        return op.shared(("rows", self._rows, self._keys, step, placed), build)

    def _range(self, size: ir.Value) -> ir.Value:
        op = self._op
        return op.Range(op.const(np.array(0, np.int64), "start"), op.Squeeze(size, self._int(0)), op.const(np.array(1, np.int64), "step"))

    def _float(self, flags: ir.Value) -> ir.Value:
        return self._op.Cast(flags, to=ir.DataType.FLOAT)

    def _int(self, number: int) -> ir.Value:
        return self._op.const(np.array([number], np.int64), "int")

    def _number(self, number: float) -> ir.Value:
        return self._op.const(np.array(number, np.float32), "number")


_FORMS: Mapping[str, Callable[[Patterns], ir.Value]] = {
    "self": lambda p: p._at(0),
    "previous": lambda p: p._neighbour(-1),
    "next": lambda p: p._neighbour(1),
    "first": Patterns._first,
    "uniform": Patterns._uniform,
}
FORMS = tuple(_FORMS)


def sentence(nearest: Nearest, tolerance: float, gone: bool) -> str:
    """What became of the heads of one attention."""
    forms = nearest.within(tolerance)
    if not any(forms):
        least = int(np.argmin(nearest.deviations))
        return f"no head is within {tolerance:g} of a form; the nearest is head {least} ({nearest.forms[least]}, {nearest.deviations[least]:.3g})"
    by_form: Mapping[str, list[str]] = {f: [str(k) for k, other in enumerate(forms) if other == f] for f in FORMS if f in forms}
    parts = [f"{', '.join(heads)}: {form}" for form, heads in by_form.items()]
    gap = max(g for g, f in zip(nearest.deviations, forms, strict=True) if f is not None)
    rest = "query and key are gone" if gone else "query and key are computed still"
    if not all(forms):
        rest = "the projections of query and key of these heads stay"
    return f"heads that depend on position and mask only ({'; '.join(parts)}; off by at most {gap:.3g}); {rest}"
