"""Narrower heads: which features go, and how what stays is turned so that it holds as much as possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from graphopt.analysis.heads import Heads
from graphopt.analysis.projections import HeadOperand, Operands
from graphopt.calibration.averages import Averages, Handle, centered, leading, moments, root, squares
from graphopt.compress.weights import Editor, known, unfit
from graphopt.core.contract import Array


@dataclasses.dataclass(frozen=True)
class HeadPart:
    """Query and key, or value and output projection, of one attention.

    Attributes:
        operand: where the removal starts.
        stays: features of each head that stay (a pair more, where pairs go).
        groups: features that can only go together.
        worth: [dim], of each feature where whole features go; None where they are turned first.
        handles: what is averaged over the samples.
        turning: computes the columns and rows of the turned projections; returns the fraction lost.
    """

    what: str
    operand: HeadOperand
    stays: int
    groups: Sequence[Array]
    handles: Sequence[Handle]
    worth: Callable[[Averages], Array] | None
    turning: Callable[[Averages, Editor | None], float] | None

    def choose(self, averages: Averages) -> tuple[Array, float]:
        """The features that go, and the fraction of the sum of squares on the samples that goes with them."""
        if self.turning is not None:
            return np.arange(self.stays, self.operand.dim), self.turning(averages, None)
        assert self.worth is not None
        worth, gone = self.worth(averages), list[Array]()
        for group in sorted(self.groups, key=lambda g: float(worth[g].mean())):
            if sum(map(len, gone)) + len(group) <= self.operand.dim - self.stays:
                gone.append(group)
        chosen = np.sort(np.concatenate([np.zeros(0, np.int64), *gone]))
        return chosen, float(worth[chosen].sum() / max(float(worth.sum()), 1e-300))


def keys_of(operands: Operands, stays: int, groups: Sequence[Array], turns: bool, averages: Averages) -> HeadPart:
    """Query and key: the scores q^T k."""
    q, k, _ = operands
    free = turns and all(len(g) == 1 for g in groups) and all(o.rotary is None and unfit(o.linear) is None for o in (q, k))
    if not free:
        handles = [averages.ask(o.value, "squares", squares, o.by_head) for o in (q, k)]
        return HeadPart("query and key", q, stays, groups, handles, lambda a: _scores(a[handles[0]], a[handles[1]]), None)
    query, key = (averages.ask(known(o.linear).output, f"moments {o.columns[0, 0]}", moments(o.columns, means=o is k)) for o in (q, k))

    def turning(a: Averages, editor: Editor | None) -> float:
        """q^T k = (K^1/2 q)^T (K^-1/2 k), K the covariance of k: the leading directions of K^1/2 E[q q^T] K^1/2 hold most of E(q^T k)^2."""
        lost = []
        for head, own in enumerate(np.split(np.arange(len(q.columns)), len(k.columns))):
            half, inverse = root(centered(a[key][head]))
            basis, rest = leading(half @ a[query][own].sum(0) @ half, stays)
            lost.append(rest)
            if editor is None:
                continue
            for h in own:
                editor.columns(known(q.linear), q.columns[h], half @ basis, q.columns[h, :stays])
            editor.columns(known(k.linear), k.columns[head], inverse @ basis, k.columns[head, :stays])
        return float(np.mean(lost))

    return HeadPart("query and key", q, stays, groups, (query, key), None, turning)


def _scores(query: Array, key: Array) -> Array:
    """E[q^2] E[k^2] of each feature, over heads that meet."""
    if len(query) % len(key) == 0:
        return np.asarray((query * np.repeat(key, len(query) // len(key), axis=0)).sum(0))
    return np.asarray(query.sum(0) * key.sum(0))


def values_of(unit: Heads, v: HeadOperand, stays: int, turns: bool, averages: Averages) -> HeadPart:
    """Value and output projection: what a head adds, c W with c the result of attention."""
    groups = [np.array([d]) for d in range(v.dim)]
    out = unit.output
    if out is None:
        handle = averages.ask(v.value, "squares", squares, v.by_head)
        return HeadPart("value", v, stays, groups, (handle,), lambda a: a[handle].sum(0), None)
    places = np.arange(unit.heads * v.dim).reshape(unit.heads, v.dim)
    moment = averages.ask(out.x, "moments", moments(places))
    weight = out.matrix().astype(np.float64).reshape(unit.heads, v.dim, -1)
    if not turns or unfit(v.linear) is not None or unfit(out) is not None:
        norms = np.square(weight).sum(2)
        return HeadPart("value", v, stays, groups, (moment,), lambda a: (np.diagonal(a[moment], axis1=1, axis2=2) * norms).sum(0), None)

    def turning(a: Averages, editor: Editor | None) -> float:
        """C^1/2 W = U S V^T with C = E[c c^T]: U holds what the head adds; each head that shares the value is fitted to it."""
        lost = []
        for head, own in enumerate(np.split(np.arange(unit.heads), len(v.columns))):
            half, inverse = root(a[moment][own].sum(0))
            basis, rest = leading(half @ sum(weight[h] @ weight[h].T for h in own) @ half, stays)
            lost.append(rest)
            if editor is None:
                continue
            turn = inverse @ basis
            editor.columns(known(v.linear), v.columns[head], turn, v.columns[head, :stays])
            for h in own:
                inner = turn.T @ a[moment][h]
                editor.rows(out, places[h, :stays], np.linalg.lstsq(inner @ turn, inner @ weight[h], rcond=None)[0])
        return float(np.mean(lost))

    return HeadPart("value", v, stays, groups, (moment,), None, turning)
