"""Which positions of a batch are padding, so that what nobody reads does not count in what samples are asked for.

Nothing is taken from names or from a pattern of mask operators. An input says where padding is if it looks like a 0/1 mask [batch, positions] and
the model behaves so: other contents at the masked positions change nothing at the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.core import Array, Session
from graphopt.errors import GraphoptError
from graphopt.feeds import role
from graphopt.graph import rank
from graphopt.run import Feeds
from graphopt.sizes import fed_inputs

_TOLERANCE = 1e-4  # of the largest number of an output; what is read moves outputs by far more


class Padding:
    """The padding of one model's batches; decided on the first batch that has any, by two runs of the model.

    A mask that does not behave so (a convolution over positions, a model that reads its mask in another way) hides nothing: every position counts.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._masks = [str(v.name) for v in fed_inputs(model) if rank(v) == 2 and v.dtype is not None and role(v, {}).kind == "mask"]
        self._hiding: dict[str, bool | None] = {}  # mask -> the value that stands for "kept"; None: it hides nothing
        self._session: Session | None = None
        self._now: tuple[Array, ...] = ()

    def watch(self, samples: Iterable[Feeds]) -> Iterator[Feeds]:
        """The samples as they are; `rows` is about the one that was handed out last."""
        for feed in samples:
            self._now = self.kept(feed)
            yield feed

    def rows(self, array: Array) -> Array:
        """`rows_of` for the batch of `watch`."""
        return rows_of(array, self._now)

    def kept(self, feed: Feeds) -> tuple[Array, ...]:
        """For each mask that hides something in this batch the positions that count, bool [batch, positions]."""
        found = []
        for name in self._masks:
            mask = np.asarray(feed[name]) != 0
            if mask.all() or not mask.any():
                continue
            if name not in self._hiding:
                self._hiding[name] = self._decide(name, feed)
            if self._hiding[name] is not None:
                found.append(mask == self._hiding[name])
        return tuple(found)

    def _decide(self, name: str, feed: Feeds) -> bool | None:
        mask = np.asarray(feed[name]) != 0
        return next((value for value in (True, False) if self._unread(name, feed, mask == value)), None)

    def _unread(self, name: str, feed: Feeds, kept: Array) -> bool:
        """Nothing at the kept positions depends on what stands at the others."""
        other = {key: _replaced(array, kept) if key != name else array for key, array in feed.items()}
        if all(other[key] is array for key, array in feed.items()):
            return False
        from graphopt.run import ort

        try:
            self._session = self._session or ort.session(self._model)
            before, after = self._session.run(feed), self._session.run(other)
        except GraphoptError:  # it does not run, or does not take what was put there, so nothing is proved
            return False
        return all(_same(before[key], after[key], kept) for key in before)


def _replaced(array: Array, kept: Array) -> Array:
    """Where [batch, positions, ...] is hidden: what stands at a kept position of its row and differs; the same object where there is nothing."""
    if array.shape[:2] != kept.shape:
        return array
    made, changed = array.copy(), False
    for row, keeps in enumerate(kept):
        for k in np.flatnonzero(~keeps):
            unlike = np.flatnonzero(keeps & np.any((array[row] != array[row, k]).reshape(len(keeps), -1), axis=1))
            if len(unlike):
                made[row, k], changed = array[row, unlike[k % len(unlike)]], True
    return made if changed else array


def _same(before: Array, after: Array, kept: Array) -> bool:
    if before.shape[:2] == kept.shape:
        before, after = before[kept], after[kept]
    if before.dtype.kind != "f":
        return np.array_equal(before, after)
    top = float(np.max(np.abs(before), initial=0.0, where=np.isfinite(before)))
    return bool(np.allclose(before, after, rtol=0.0, atol=_TOLERANCE * top, equal_nan=True))


def rows_of(array: Array, kept: Sequence[Array]) -> Array:
    """[..., K] -> float32 [rows, K], without the rows of padding where the axes in front are [batch, positions], or these two flattened."""
    flat = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
    mask = positions(array.shape, kept)
    return flat if mask is None else flat[mask.reshape(-1)]


def counted(outputs: Mapping[str, Array], kept: Sequence[Array]) -> dict[str, Array]:
    """Outputs by name; those [batch, positions, K] as [rows, K] without the rows of padding."""
    found = {}
    for name, array in outputs.items():
        mask = positions(array.shape, kept) if array.ndim else None
        found[name] = array if mask is None else array.reshape(-1, array.shape[-1])[mask.reshape(-1)]
    return found


def positions(shape: Sequence[int], kept: Sequence[Array]) -> Array | None:
    """The one mask [batch, positions] whose positions are the rows of an array of this shape [..., K]; None: all of them count."""
    lead = tuple(shape[:-1])
    fitting = [mask for mask in kept if lead in (mask.shape, (mask.size,))]
    return fitting[0] if fitting and all(np.array_equal(mask, fitting[0]) for mask in fitting) else None
