"""Which positions of a batch are padding, so that what nobody reads does not count in what samples are asked for.

Nothing is taken from names, sizes or patterns of mask operators. An input says where padding is if it looks like a 0/1 mask [batch, positions] and
the model behaves so: other contents at the masked positions change nothing in the outputs of the others, other contents at the others do. A value
inside the model has padded rows if, in the same trial, just the rows that belong to masked positions change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array
from graphopt.core.errors import GraphoptError
from graphopt.graph.dims import fed_inputs
from graphopt.graph.questions import rank, same_dim
from graphopt.run import Feeds
from graphopt.run.distance import compare_outputs
from graphopt.run.observe import exposed
from graphopt.run.roles import role

_TOLERANCE = 1e-4  # what is read moves a value by far more
_KINDS = ("positions", "heads", "flat")  # [batch, positions, ..], [batch, heads, positions, ..], [batch * positions, ..]
_NOTHING = np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What counts in one batch: for each mask that hides something its positions, bool [batch, positions], and the values that have them as rows."""

    masks: tuple[tuple[Array, Mapping[str, str]], ...] = ()

    def lead(self, name: str, shape: Sequence[int]) -> Array | None:
        """Which rows of the value [.., K] of this name and shape count, bool [..]; None: all."""
        found = [_lead(kinds[name], mask, shape) for mask, kinds in self.masks if name in kinds]
        fitting = [lead for lead in found if lead is not None]
        return fitting[0] if fitting and all(np.array_equal(lead, fitting[0]) for lead in fitting) else None

    def rows(self, name: str, array: Array) -> Array:
        """[.., K] -> float32 [rows, K] without padding."""
        flat, lead = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False), self.lead(name, array.shape)
        return flat if lead is None else flat[lead.reshape(-1)]

    def counted(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays by name, those with padding as [rows, K] without it; one number for each position counts as K = 1."""
        return {name: self._counted(name, array) for name, array in outputs.items()}

    def _counted(self, name: str, array: Array) -> Array:
        wide = _wide(array) if isinstance(array, np.ndarray) else _NOTHING
        lead = self.lead(name, wide.shape) if wide.ndim > 1 else None
        return array if lead is None else wide.reshape(-1, wide.shape[-1])[lead.reshape(-1)]


class Padding:
    """The padding of one model's batches; decided on the first batch that has any, by three runs of two of its rows.

    A mask that does not behave so (a convolution over positions, a mask that only blanks what comes out) hides nothing: every position counts.

    Args:
        names: of the values that will be asked for, by default the outputs of the model.
        by_size: also a value that no content changes has padded rows if its sizes are those of the mask, as weights that depend on positions only.
    """

    def __init__(self, model: ir.Model, names: Iterable[str] = (), *, by_size: bool = False) -> None:
        self._by_size = by_size
        self._model = model
        self._outputs = [str(v.name) for v in model.graph.outputs]
        self._names = list(dict.fromkeys(names)) or self._outputs
        self._masks = [str(v.name) for v in fed_inputs(model) if rank(v) == 2 and v.dtype is not None and role(v, {}).kind == "mask"]
        self._known: dict[str, tuple[bool, dict[str, str]]] = {}  # mask -> what stands for "kept", and the values; none: it hides nothing
        self._shapes = {str(v.name): v.shape for v in model.graph.inputs}
        self._now = Kept()

    def watch(self, samples: Iterable[Feeds]) -> Iterator[Feeds]:
        """The samples as they are; `now` is about the one that was handed out last."""
        for feed in samples:
            self._now = self.kept(feed)
            yield feed

    @property
    def now(self) -> Kept:
        return self._now

    def kept(self, feed: Feeds) -> Kept:
        """What counts in this batch."""
        found = []
        for name in self._masks:
            mask = np.asarray(feed.get(name, _NOTHING)) != 0
            if mask.all() or not mask.any():
                continue
            if name not in self._known:
                verdict = self._try(name, feed)
                if verdict is None:
                    continue
                self._known[name] = verdict
            value, kinds = self._known[name]
            if kinds:
                found.append((mask == value, kinds))
        return Kept(tuple(found))

    def _try(self, name: str, feed: Feeds) -> tuple[bool, dict[str, str]] | None:
        """The verdict about a mask; None where this batch says nothing."""
        whole = {key: np.asarray(array) for key, array in feed.items()}
        for probe in (_two_rows(name, whole), whole):
            try:
                return self._verdict(name, probe)
            except GraphoptError:  # two rows alone, or such contents, are nothing that it takes
                continue
        return True, {}

    def _verdict(self, name: str, probe: Feeds) -> tuple[bool, dict[str, str]] | None:
        mask = probe[name] != 0
        contents = {key: array for key, array in probe.items() if key not in self._masks and self._alike(name, key)}
        for value in (True, False):
            kept = mask == value
            hidden, own = ({**probe, **{key: _replaced(array, where, kept) for key, array in contents.items()}} for where in (~kept, kept))
            if any(all(changed[key] is probe[key] for key in probe) for changed in (hidden, own)):
                return None
            base, other, moved = self._run(probe, hidden, own)
            if all(_unmoved(base[n], other[n], kept) for n in self._outputs) and not all(_unmoved(base[n], moved[n], kept) for n in self._outputs):
                kinds = {n: kind for n in self._names if n in base and (kind := _kind(base[n], other[n], kept, self._by_size)) is not None}
                return value, kinds
        return True, {}

    def _alike(self, mask: str, name: str) -> bool:
        """False where the model says that the positions of an input are others than those of the mask, whatever their number is now."""
        dims = [shape[1] for shape in (self._shapes.get(mask), self._shapes.get(name)) if shape is not None and len(shape) > 1]
        known = [d for d in dims if isinstance(d, int) or d.value is not None]
        return len(known) < 2 or same_dim(*known)

    def _run(self, *feeds: Feeds) -> list[dict[str, Array]]:
        from graphopt.run import ort

        given = {str(v.name) for v in self._model.graph.inputs}
        shown = [n for n in dict.fromkeys((*self._names, *self._outputs)) if n not in given]
        session = ort.session(exposed(self._model, shown))
        return [{**{n: np.asarray(feed[n]) for n in (*self._names, *self._outputs) if n in feed}, **session.run(feed)} for feed in feeds]


def _two_rows(name: str, feed: Feeds) -> dict[str, Array]:
    """Two rows of a batch whose masks differ, so that the order of batch and positions shows in what is made of them."""
    mask = feed[name] != 0
    first = next(k for k, row in enumerate(mask) if (not row.all() and row.any()) or k == len(mask) - 1)
    second = next((k for k, row in enumerate(mask) if not np.array_equal(row, mask[first])), first)
    probe = {key: array[[first, second]] if array.ndim and len(array) == len(mask) else array for key, array in feed.items()}
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


def _unmoved(before: Array, after: Array, kept: Array) -> bool:
    """An output is the same, or has these positions and is the same at those that are kept."""
    if not isinstance(before, np.ndarray):
        return False
    if _same(before, after):
        return True
    wide, then = _wide(before), _wide(after)
    lead = _lead("positions", kept, wide.shape) if wide.ndim > 1 and wide.shape == then.shape else None
    return lead is not None and _same(wide[lead], then[lead])


def _kind(before: Array, after: Array, kept: Array, by_size: bool) -> str | None:
    """How the rows of a value are positions: those that are kept stay, and others change."""
    before, after = (_wide(x) if isinstance(x, np.ndarray) else _NOTHING for x in (before, after))
    if before.ndim < 2 or before.shape != after.shape or before.dtype.kind != "f":
        return None
    for kind in _KINDS:
        lead = _lead(kind, kept, before.shape)
        if lead is not None and _same(before[lead], after[lead]) and (by_size or not _same(before[~lead], after[~lead])):
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


def _lead(kind: str, kept: Array, shape: Sequence[int]) -> Array | None:
    """`kept` for the axes in front of the last of a value of this kind; None where the sizes are others."""
    batch, positions = kept.shape
    lead = tuple(shape[:-1])
    if kind == "positions" and lead[:2] == (batch, positions):
        return np.broadcast_to(kept.reshape(batch, positions, *[1] * (len(lead) - 2)), lead)
    if kind == "heads" and len(lead) == 3 and (lead[0], lead[2]) == (batch, positions):
        return np.broadcast_to(kept[:, None], lead)
    if kind == "flat" and lead[:1] == (batch * positions,):
        return np.broadcast_to(kept.reshape(-1, *[1] * (len(lead) - 1)), lead)
    return None
