"""Which positions of a batch are padding, so that what nobody reads does not count in what samples are asked for.

Nothing is taken from names, sizes or patterns of mask operators. An input says where padding is if it looks like a 0/1 mask [batch, positions] and
the model behaves so: other contents at the masked positions change nothing in the outputs of the others, other contents at the others do. A value
inside the model has padded rows if, in the same trial, just the rows that belong to masked positions change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Analysis, Array, Context
from graphopt.core.errors import GraphoptError
from graphopt.graph.dims import fed_inputs
from graphopt.graph.questions import is_tensor, rank, same_dim
from graphopt.run import Feeds
from graphopt.run.distance import compare_outputs
from graphopt.run.observe import exposed
from graphopt.run.roles import role

Layout = Callable[[Array], Array]  # an array of the graph -> its rows [rows, ..]

_TOLERANCE = 1e-4  # what is read moves a value by far more
# [batch, positions, ..], [batch, heads, positions, ..], [batch * positions, ..], [batch, .., positions]
_KINDS = ("positions", "heads", "flat", "columns")
_NOTHING = np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What counts in one batch: for each mask that hides something its positions, bool [batch, positions], and the values that have them.

    Arrays may be numpy's or torch's.
    """

    masks: tuple[tuple[Array, Mapping[str, str]], ...] = ()

    def where(self, name: str, shape: Sequence[int]) -> Array | None:
        """Which elements of the value of this name and shape count: bool, with as many axes, of size 1 where all are alike; None: all."""
        found = [_where(kinds[name], mask, shape) for mask, kinds in self.masks if name in kinds]
        fitting = [where for where in found if where is not None]
        return fitting[0] if fitting and all(np.array_equal(where, fitting[0]) for where in fitting) else None

    def lead(self, name: str, shape: Sequence[int]) -> Array | None:
        """Which rows of the value [.., K] of this name and shape count, bool [..]; None: all."""
        where = self.where(name, shape)
        return None if where is None or where.shape[-1] != 1 else np.broadcast_to(where[..., 0], tuple(shape[:-1]))

    def counts(self, name: str, shape: Sequence[int], by: Layout | None = None) -> Array | None:
        """Which of the rows count that `by` (by default: the last axis stays) makes of the value, bool [rows]; None: all."""
        if by is None:
            lead = self.lead(name, shape)
            return None if lead is None else lead.reshape(-1)
        where = self.where(name, shape)
        if where is None:
            return None
        made = by(np.broadcast_to(where, tuple(shape)))
        return np.asarray(made.any(tuple(range(1, made.ndim))))  # a row that is padding in part cannot be left out

    def rows(self, name: str, array: Any) -> Any:
        """[.., K] -> [rows, K] without padding."""
        flat, counts = array.reshape(-1, array.shape[-1]), self.counts(name, array.shape)
        return flat if counts is None else flat[counts]

    def counted(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by name, those with padding as [rows, K] without it; one number for each position counts as K = 1. So in a sequence, each."""
        return {name: self._counted(name, array) for name, array in outputs.items()}

    def _counted(self, name: str, array: Any) -> Any:
        if isinstance(array, list):
            return [self._counted(name, element) for element in array]
        wide = _wide(array) if getattr(array, "ndim", 0) > 1 else _NOTHING  # a map has none
        return array if wide.ndim < 2 or self.lead(name, wide.shape) is None else self.rows(name, wide)


@dataclasses.dataclass(frozen=True)
class Paddings(Analysis["Padding"]):
    """The padding of the batches that the graph is fed as it is now; all that looks at samples for one Context asks the same."""

    def compute(self, model: ir.Model, ctx: Context) -> Padding:
        return Padding(model)


@dataclasses.dataclass
class _Verdict:
    """About one mask. `value`: what stands for "kept"; `feeds`: the batch that showed it, with other contents at hidden and at kept positions (none:
    the mask hides nothing); `kinds`: how values have its positions, None: not."""

    value: bool = True
    feeds: tuple[Feeds, ...] = ()
    kinds: dict[str, str | None] = dataclasses.field(default_factory=dict)


class Padding:
    """The padding of one model's batches; decided on the first batch that has any, by three runs of two of its rows.

    A mask that does not behave so (a convolution over positions, a mask that only blanks what comes out) hides nothing: every position counts.
    It knows about the outputs of the model, and about the values that it was told of.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._outputs = [str(v.name) for v in model.graph.outputs]
        self._asked = dict.fromkeys(self._outputs, False)  # name -> whether sizes are enough
        tensors = [v for v in fed_inputs(model) if is_tensor(v) and v.dtype is not None]
        self._masks = [str(v.name) for v in tensors if rank(v) == 2 and role(v, {}).kind == "mask"]
        self._known: dict[str, _Verdict] = {}
        self._shapes = {str(v.name): v.shape for v in model.graph.inputs}

    def about(self, names: Iterable[str], *, by_size: bool = False) -> Self:
        """Be ready to tell about values of the main graph; those that are named together are tried together.

        Args:
            by_size: also a value that no content changes has padded rows if its sizes are those of the mask, as weights that positions decide.
        """
        for name in names:
            self._asked.setdefault(name, by_size)
        return self

    def kept(self, feed: Feeds) -> Kept:
        """What counts in this batch."""
        found = []
        for name in self._masks:
            mask = np.asarray(feed.get(name, _NOTHING)) != 0
            if name not in self._known:
                if mask.all():
                    continue
                verdict = self._try(name, feed if mask.any() else {**feed, name: _half(feed[name])})
                if verdict is None:
                    continue
                self._known[name] = verdict
            verdict = self._known[name]
            self._learn(name, verdict)
            if verdict.feeds and not (mask == verdict.value).all():
                found.append((mask == verdict.value, {n: kind for n, kind in verdict.kinds.items() if kind is not None}))
        return Kept(tuple(found))

    def _try(self, name: str, feed: Feeds) -> _Verdict | None:
        """The verdict about a mask; None where this batch says nothing."""
        whole = {key: array if isinstance(array, list) else np.asarray(array) for key, array in feed.items()}
        for probe in (_two_rows(name, whole), whole):
            try:
                return self._verdict(name, probe)
            except GraphoptError:  # two rows alone, or such contents, are nothing that it takes
                continue
        return _Verdict()

    def _verdict(self, name: str, probe: Feeds) -> _Verdict | None:
        mask = probe[name] != 0
        contents = {k: x for k, x in probe.items() if k not in self._masks and isinstance(x, np.ndarray) and self._alike(name, k)}
        for value in (True, False):
            kept = mask == value
            hidden, own = ({**probe, **{key: _replaced(array, where, kept) for key, array in contents.items()}} for where in (~kept, kept))
            if any(all(changed[key] is probe[key] for key in probe) for changed in (hidden, own)):
                return None
            base, other, moved = self._run((probe, hidden, own), self._asked)
            if all(_unmoved(base[n], other[n], kept) for n in self._outputs) and not all(_unmoved(base[n], moved[n], kept) for n in self._outputs):
                return _Verdict(value, (probe, hidden), self._kinds(kept, base, other, self._asked))
        return _Verdict()

    def _learn(self, name: str, verdict: _Verdict) -> None:
        """The values that were named since the mask was tried, in the same trial."""
        new = [n for n in self._asked if n not in verdict.kinds]
        if not new or not verdict.feeds:
            return
        try:
            base, other = self._run(verdict.feeds, new)
        except GraphoptError:  # it does not run with these shown
            verdict.kinds |= dict.fromkeys(new)
            return
        verdict.kinds |= self._kinds((verdict.feeds[0][name] != 0) == verdict.value, base, other, new)

    def _kinds(self, kept: Array, base: Mapping[str, Array], other: Mapping[str, Array], names: Iterable[str]) -> dict[str, str | None]:
        return {n: _kind(base[n], other[n], kept, self._asked[n]) if n in base else None for n in names}

    def _alike(self, mask: str, name: str) -> bool:
        """False where the model says that the positions of an input are others than those of the mask, whatever their number is now."""
        dims = [shape[1] for shape in (self._shapes.get(mask), self._shapes.get(name)) if shape is not None and len(shape) > 1]
        known = [d for d in dims if isinstance(d, int) or d.value is not None]
        return len(known) < 2 or same_dim(*known)

    def _run(self, feeds: Sequence[Feeds], names: Iterable[str]) -> list[dict[str, Array]]:
        from graphopt.run import ort

        given, names = {str(v.name) for v in self._model.graph.inputs}, list(names)
        shown = [n for n in names if n not in given]
        session = ort.session(exposed(self._model, shown)) if shown else None
        return [{**{n: feed[n] for n in names if n in feed}, **(session.run(feed) if session else {})} for feed in feeds]


def _half(mask: Array) -> Array:
    """Ones for the first half of the positions, in place of a mask that keeps none."""
    kept = np.arange(mask.shape[1]) < (mask.shape[1] + 1) // 2
    return np.broadcast_to(kept, mask.shape).astype(mask.dtype)


def _two_rows(name: str, feed: Feeds) -> dict[str, Array]:
    """Two rows of a batch whose masks differ, so that the order of batch and positions shows in what is made of them."""
    mask = feed[name] != 0
    first = next(k for k, row in enumerate(mask) if (not row.all() and row.any()) or k == len(mask) - 1)
    second = next((k for k, row in enumerate(mask) if not np.array_equal(row, mask[first])), first)
    rows = {key for key, array in feed.items() if isinstance(array, np.ndarray) and array.ndim and len(array) == len(mask)}
    probe = {key: array[[first, second]] if key in rows else array for key, array in feed.items()}
    if second == first:  # the second row is then kept or hidden throughout
        probe[name] = np.concatenate([probe[name][:1], np.broadcast_to(probe[name][:1].max(), probe[name][:1].shape)])
    return probe


def _replaced(array: Array, where: Array, kept: Array) -> Array:
    """[batch, positions, ..] with other contents at some positions: what stands at a kept one of the row, and differs.

    The same object where nothing was there to exchange.
    """
    if array.shape[:2] != kept.shape:
        return array
    made, changed = array.copy(), False
    for row in range(len(kept)):
        for k in np.flatnonzero(where[row]):
            unlike = np.flatnonzero(kept[row] & np.any((array[row] != array[row, k]).reshape(len(kept[row]), -1), axis=1))
            if len(unlike):
                made[row, k], changed = array[row, unlike[k % len(unlike)]], True
    return made if changed else array


def _unmoved(before: Any, after: Any, kept: Array) -> bool:
    """An output is the same, or has these positions and is the same at those that are kept."""
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(_unmoved(x, y, kept) for x, y in zip(before, after, strict=True))
    if not isinstance(before, np.ndarray):
        return False
    if _same(before, after):
        return True
    wide, then = _wide(before), _wide(after)
    where = _where("positions", kept, wide.shape) if wide.ndim > 1 and wide.shape == then.shape else None
    return where is not None and _same(*(x[np.broadcast_to(where, x.shape)] for x in (wide, then)))


def _kind(before: Any, after: Any, kept: Array, by_size: bool) -> str | None:
    """How the rows of a value are positions: those that are kept stay, and others change."""
    if isinstance(before, list) and isinstance(after, list):
        kinds = {_kind(x, y, kept, by_size) for x, y in zip(before, after, strict=False)}
        return kinds.pop() if len(kinds) == 1 else None
    before, after = (_wide(x) if isinstance(x, np.ndarray) else _NOTHING for x in (before, after))
    if before.ndim < 2 or before.shape != after.shape or before.dtype.kind != "f":
        return None
    for kind in _KINDS[: 3 if by_size else 4]:
        where = _where(kind, kept, before.shape)
        if where is None:
            continue
        full = np.broadcast_to(where, before.shape)
        if _same(before[full], after[full]) and (by_size or not _same(before[~full], after[~full])):
            return kind
    return None


def _same(before: Array, after: Array) -> bool:
    if before.dtype.kind == "f":
        size = np.abs(before[np.isfinite(before) & (before != 0)])
        unit = before.dtype.type(np.median(size) if size.size else 1)
        before, after = before / unit, after / unit
    return compare_outputs({"": before}, {"": after}, _TOLERANCE) is None


def _wide(array: Array) -> Array:
    """[batch, positions] is a number for each position."""
    return array[..., None] if array.ndim == 2 else array


def _where(kind: str, kept: Array, shape: Sequence[int]) -> Array | None:
    """`kept` on the axes of a value of this kind, of size 1 where all are alike; None where the sizes are others."""
    batch, positions = kept.shape
    rest = len(shape) - 1
    if kind == "positions" and rest > 1 and tuple(shape[:2]) == (batch, positions):
        return kept.reshape(batch, positions, *[1] * (rest - 1))
    if kind == "heads" and rest == 3 and (shape[0], shape[2]) == (batch, positions):
        return kept[:, None, :, None]
    if kind == "flat" and rest > 0 and shape[0] == batch * positions:
        return kept.reshape(-1, *[1] * rest)
    if kind == "columns" and rest > 1 and (shape[0], shape[-1]) == (batch, positions):
        return kept.reshape(batch, *[1] * (rest - 1), positions)
    return None
