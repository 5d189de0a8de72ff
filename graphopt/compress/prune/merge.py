"""Similar heads of an attention become one: how similar they are on the samples, and the weights of the one that stays for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from graphopt.analysis.heads import Heads
from graphopt.calibration.averages import Averages, Handle, centered, moments
from graphopt.compress.prune.align import linked, planes_of, scores, values
from graphopt.compress.weights import Editor, known, unfit
from graphopt.core.contract import Array


def unmergeable(unit: Heads) -> str | None:
    """Why the heads of an attention cannot become one another's."""
    if unit.group > 1:
        return f"{unit.group} query heads share a key head; merge key heads with kv-heads=N, or remove groups with prune-heads"
    value = unit.operands[2]
    if value.linear is None:
        return f"the value: {value.reason}"
    return unfit(value.linear) or unfit(unit.output)


@dataclasses.dataclass(frozen=True, eq=False)
class Merging:
    """What merging needs to know of one attention, after the samples were seen.

    Attributes:
        turns: query and key are averaged in a common basis; otherwise the head that stays keeps its own.
        distance: [heads, heads], of attention maps, or of scores.
        energy: [heads], the share of each head in the block's output.
    """

    unit: Heads
    turns: bool
    query: Array
    key: Array
    result: Array
    distance: Array
    energy: Array

    def steps(self) -> list[tuple[float, int, int]]:
        return linked(self.distance, self.energy)

    def stays(self, cluster: Sequence[int]) -> int:
        """The head that stands for `cluster` afterwards: the one that contributes most."""
        return max(cluster, key=lambda h: float(self.energy[h]))

    def write(self, editor: Editor, cluster: Sequence[int]) -> float:
        """Write the weights of the head that stays; returns the fraction of what the cluster added that is lost."""
        v, out = self.unit.operands[2], known(self.unit.output)
        members = list(cluster)
        kept = self.stays(members)
        wide = np.arange(self.unit.heads * v.dim).reshape(-1, v.dim)
        rows = wide[members].reshape(-1)
        weight = out.matrix().astype(np.float64)[rows]
        turn, back, lost = values(self.result[np.ix_(rows, rows)], weight @ weight.T, v.dim)
        editor.columns(known(v.linear), v.columns[members].reshape(-1), turn, v.columns[kept])
        editor.rows(out, wide[kept], back @ weight)
        if self.turns:
            self._keys(editor, members, kept)
        return lost

    def _keys(self, editor: Editor, members: list[int], kept: int) -> None:
        """The mean of the scores of all members, weighted by what they contribute."""
        q, k, _ = self.unit.operands
        places = np.arange(self.unit.heads * q.dim).reshape(-1, q.dim)[members].reshape(-1)
        share = np.repeat(self.energy[members] / self.energy[members].sum(), q.dim)
        query = self.query[np.ix_(places, places)] * np.outer(share, share)
        turn_q, turn_k = scores(query, self.key[np.ix_(places, places)], planes_of(q.rotary, q.dim), q.dim)
        editor.columns(known(q.linear), q.columns[members].reshape(-1), share[:, None] * turn_q, q.columns[kept])
        editor.columns(known(k.linear), k.columns[members].reshape(-1), turn_k, k.columns[kept])


class Asked:
    """What of one attention is averaged over the samples."""

    def __init__(self, unit: Heads, averages: Averages) -> None:
        q, k, _ = unit.operands
        self.unit = unit
        self.turns = all(unfit(o.linear) is None for o in (q, k)) and (q.rotary is None) == (k.rotary is None)
        self.output = known(unit.output)
        everything = np.arange(self.output.in_features)[None]
        self.result = averages.ask(self.output.x, "moments", moments(everything))
        if self.turns:
            self.query = averages.ask(known(q.linear).output, f"moments {q.columns[0, 0]}", moments(q.columns.reshape(1, -1)))
            self.key = averages.ask(known(k.linear).output, f"moments {k.columns[0, 0]}", moments(k.columns.reshape(1, -1), means=k.rotary is None))

    @property
    def handles(self) -> tuple[Handle, ...]:
        """What was asked for."""
        return (self.result, self.query, self.key) if self.turns else (self.result,)

    def found(self, averages: Averages, maps: Array | None) -> Merging:
        """`maps`: [heads, heads] distance of attention maps; None: that of the scores is used."""
        heads = self.unit.heads
        result = averages[self.result][0]
        nothing = np.zeros((0, 0))
        query, key = nothing, nothing
        if self.turns:
            query, key = averages[self.query][0], averages[self.key][0]
            key = key if self.unit.operands[1].rotary is not None else centered(key)
        weight = self.output.matrix().astype(np.float64).reshape(heads, -1, self.output.out_features)
        blocks = result.reshape(heads, self.unit.value_dim, heads, self.unit.value_dim)
        energy = np.array([float(np.sum((blocks[h, :, h] @ weight[h]) * weight[h])) for h in range(heads)])
        distance = _apart(query, key, heads) if maps is None else maps
        return Merging(self.unit, self.turns, query, key, result, distance, energy / max(float(energy.sum()), 1e-300))


def _apart(query: Array, key: Array, heads: int) -> Array:
    """1 - correlation of the scores of two heads, over independent rows: E[(q_i . k_i)(q_j . k_j)] = sum of E[q_i q_j^T] * E[k_i k_j^T]."""
    size = len(query) // heads
    products = (query * key).reshape(heads, size, heads, size).sum((1, 3))
    norms = np.sqrt(np.maximum(np.diag(products), 1e-300))
    return np.asarray(1 - products / np.outer(norms, norms))
