"""What a model is fed: named batches, from files, Python objects or text, checked against the inputs of the model; and a typed random fallback."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.core.contract import Array, Session
from graphopt.core.errors import GraphoptError, SampleError
from graphopt.core.replay import Batch, Spool
from graphopt.graph.dims import Bindings, dim_at, fed_inputs, fits, limits, size_of, symbols
from graphopt.graph.questions import is_tensor
from graphopt.run import each
from graphopt.run.roles import random_feed
from graphopt.run.sources import TEXT_INPUTS, encode, open_path, with_empty_past

Prepare = Callable[[Any, int], Batch]  # an item of a source and its number -> a batch


class Samples:
    """Batches (name -> array), in order, as often as you iterate; one at a time is in memory.

    `Samples(batches)` takes dicts as they are; `Samples.load` reads any source and checks it against a model. A list is read where it lies, and
    files when their turn comes; what may not come twice, or not in the same order (a generator, a DataLoader), is written to a temporary folder.
    `optional` names are dropped by `fit` where the model has no such input.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]], *, optional: Iterable[str] = ()) -> None:
        self._read(batches, lambda batch, number: _named(batch, f"batch {number}"), frozenset(optional))

    def __iter__(self) -> Iterator[Batch]:
        return (self._again(batch, number) for number, batch in enumerate(self._source, start=1))

    def __len__(self) -> int:
        return len(self._source)

    @classmethod
    def load(
        cls, data: Any, model: ir.Model, *, tokenizer: Any = None, batch: int = 8, max_length: int | None = None, limit: int | None = None
    ) -> Samples:
        """Read samples of any kind and fit them to `model`.

        Args:
            data: Samples; a .npz file (one batch) or a folder of them; one dict of arrays; an iterable (list, generator, DataLoader) of
                dicts, of tuples in the order of the inputs, or of text lines; or a text file, one sample a line.
            tokenizer: for text, a `tokenizers.Tokenizer` or its tokenizer.json. A cache of keys and values is fed empty.
            batch: lines of text in one batch.
            max_length: tokens of a text, at most; by default what the tokenizer and the position table of the model allow, 128 at most.
            limit: batches, at most.

        Raises:
            SampleError: nothing there, or something that does not fit an input; one line that names it.
        """
        if isinstance(data, Samples):
            return data.fit(model)
        if isinstance(data, (str, os.PathLike)):
            data = open_path(Path(data))
        if isinstance(data, Mapping):
            data = [data]
        if not isinstance(data, Iterable):
            raise SampleError(f"samples must be a path or an iterable of batches, found {type(data).__name__}")
        if isinstance(data, Sequence) and not (data and isinstance(data[0], str)):
            return cls._checked(data if limit is None else data[:limit], model)
        items = itertools.islice(data, limit) if limit is not None else iter(data)
        first = next(items, None)
        if isinstance(first, str):
            texts = [first, *map(str, items)]
            bound = min(limits(model).values(), default=128)
            tokens = encode(texts, tokenizer, batch, max_length or min(128, bound))
            return cls(with_empty_past(tokens, model), optional=TEXT_INPUTS).fit(model)
        if first is None:
            return cls(())
        head = [first]
        del first  # or it would be in memory until the last batch is read
        return cls._checked(itertools.chain(_emptied(head), items), model)

    def fit(self, model: ir.Model) -> Samples:
        """The same samples with every array of the dtype that the model declares.

        int32 and int64, and float widths, are exchanged where no value changes.

        Raises:
            SampleError: an input is missing or unknown, or has another dtype, rank or size than the model declares.
        """
        return self._checked(self._source, model, self._again, self._optional)

    @classmethod
    def _checked(cls, source: Iterable[Any], model: ir.Model, named: Prepare | None = None, optional: frozenset[str] = frozenset()) -> Samples:
        """Fitted samples of batches that `named` makes of the items of `source`."""
        names = [str(v.name) for v in fed_inputs(model)]
        forms = {str(v.name): (_dtype(v), _is_sequence(v)) for v in model.graph.inputs}

        def name(item: Any, number: int) -> Batch:
            return _named(_by_name(item, names, number), f"batch {number}") if named is None else named(item, number)

        def again(item: Any, number: int) -> Batch:  # checked before; and the model may be another by then
            batch = name(item, number)
            return {key: _formed(batch[key], *form) for key, form in forms.items() if key in batch}

        made = cls.__new__(cls)
        made._read(source, lambda item, number: _fit(name(item, number), model, optional, f"batch {number}"), optional, again)
        return made

    def _read(self, source: Iterable[Any], first: Prepare, optional: frozenset[str], again: Prepare | None = None) -> None:
        """`first` names and checks each item, once and now; `again` makes the same batch of it each time that it is needed."""
        prepared = (first(item, number) for number, item in enumerate(source, start=1))
        if isinstance(source, Sequence):
            self._source, self._again = source, again or first
            collections.deque(prepared, maxlen=0)
        else:
            self._source, self._again = Spool(prepared), _as_it_is
        self._optional = optional
        if not self._source:
            raise SampleError("samples gave 0 batches: the source is empty, or a generator that was used before")


def _as_it_is(batch: Batch, number: int) -> Batch:
    return dict(batch)


def _emptied(items: list[Any]) -> Iterator[Any]:
    while items:
        yield items.pop(0)


def random_samples(model: ir.Model, sizes: Sequence[Bindings] | None = None, *, seed: int = 0) -> Samples:
    """Typed random samples: ids inside the tables that they index, 0/1 masks with holes and padding, seeded normal floats.

    Args:
        sizes: for each batch, a size for every symbol of the inputs; by default three batches in which every symbol has at least two
            sizes, all symbols differ, and the first axis is also 1.

    Raises:
        SampleError: an input has no shape, or a symbol no size.
    """
    sizes = sizes if sizes is not None else next(_proposals(model))
    try:
        return Samples([random_feed(model, bindings, seed=seed, turn=turn) for turn, bindings in enumerate(sizes)]).fit(model)
    except ValueError as error:
        raise SampleError(f"cannot make up samples: {error}; add --samples DATA (or samples=... in Python)") from error


def runnable_samples(model: ir.Model, session: Session, *, seed: int = 0) -> Samples:
    """Random samples that `session` accepts: if all sizes different fails, axes share sizes, and then everything is larger.

    Raises:
        SampleError: no proposal runs; the text has the reason of the first.
    """
    reason: GraphoptError | None = None
    for sizes in _proposals(model):
        samples = random_samples(model, sizes, seed=seed)
        try:
            for feed in samples:
                session.run(feed)
        except GraphoptError as error:
            reason = reason or error
            continue
        return samples
    raise SampleError(f"the model runs on none of the made-up samples ({reason}); add --samples DATA (or samples=... in Python)")


def _proposals(model: ir.Model) -> Iterator[list[dict[str, int]]]:
    """Sizes for three batches, the most telling first."""
    axes, bound = symbols(model), limits(model)
    for factor in (1, 8):
        for distinct in (True, False):
            rows = [_sizes(axes, turn, factor, distinct, bound) for turn in range(3)]
            for _ in range(6):
                if all(fits(model, row) for row in rows):
                    break
                rows = [{name: size * 3 if axes[name] else size for name, size in row.items()} for row in rows]
            yield rows if axes else rows[:2]


def _sizes(axes: Mapping[str, int], turn: int, factor: int, distinct: bool, bound: Mapping[str, int]) -> dict[str, int]:
    """One size for every symbol. Symbols of the first axis are batches and stay small."""
    batches, lengths = ((2, 3, 1), (4, 2, 3), (5, 6, 2)), ((5, 8, 6), (7, 9, 10), (11, 4, 13), (6, 12, 7), (9, 5, 4))
    sizes, count = {}, {True: 0, False: 0}
    for name, axis in axes.items():
        first = axis == 0
        table = batches if first else lengths
        column = count[first] % len(table) if distinct else 0
        count[first] += 1
        size = table[column][turn] * (1 if first else factor)
        sizes[name] = min(size, bound.get(name, size))
    return sizes


def _by_name(item: Any, names: Sequence[str], number: int) -> Mapping[str, Any]:
    """A batch as a mapping; a tuple or a bare array is taken in the order of the inputs."""
    if isinstance(item, Mapping):
        return item
    parts = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(parts) != len(names):
        raise SampleError(f"samples, batch {number}: a tuple of {len(parts)}; the model needs {len(names)}: {', '.join(names)}")
    return dict(zip(names, parts, strict=True))


def _named(batch: Mapping[str, Any], where: str) -> Batch:
    if not isinstance(batch, Mapping):
        raise SampleError(f"samples, {where}: expected a dict of arrays, found {type(batch).__name__}")
    return {str(name): _array(value, f"{where}: input `{name}`") for name, value in batch.items()}


def _array(value: Any, where: str) -> Any:
    """An array; as it is what only an input that is no tensor takes: nothing, a map, or arrays that do not stack."""
    if value is None or isinstance(value, Mapping):
        return value
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        if all(hasattr(x, "dtype") for x in value):
            return [_array(x, where) for x in value]
        raise SampleError(f"samples, {where} is ragged; pad its rows to one length") from error
    if array.dtype.kind in "US":
        return array.astype(object)
    if array.dtype.kind == "O" and not all(isinstance(x, str) for x in array.flat):
        raise SampleError(f"samples, {where} is not an array of numbers or strings, found {type(value).__name__}")
    return array


def _fit(batch: Batch, model: ir.Model, optional: frozenset[str], where: str) -> Batch:
    inputs = {str(v.name): v for v in model.graph.inputs}
    needed = [str(v.name) for v in fed_inputs(model)]
    missing = [name for name in needed if name not in batch]
    if missing:
        raise SampleError(f"samples, {where}: input {', '.join(f'`{m}`' for m in missing)} missing; the model needs {', '.join(needed)}")
    extra = sorted(set(batch) - set(inputs) - optional)
    if extra:
        raise SampleError(f"samples, {where}: the model has no input {', '.join(f'`{e}`' for e in extra)}; it needs {', '.join(needed) or 'none'}")
    bindings: dict[str, int] = {}
    out = {}
    for name, value in inputs.items():
        if name in batch:
            out[name] = _checked_form(_formed(batch[name], None, _is_sequence(value)), value, bindings, f"{where}: input `{name}`")
    return out


def _is_sequence(value: ir.Value) -> bool:
    kind = value.type.elem_type if isinstance(value.type, ir.OptionalType) else value.type
    return isinstance(kind, ir.SequenceType)


def _formed(given: Any, dtype: np.dtype[Any] | None, sequence: bool) -> Any:
    """In the dtype of an input, and, for a sequence, as the list that the runtime takes."""
    given = list(given) if sequence and isinstance(given, np.ndarray) else given
    return given if dtype is None else each(given, lambda array: array.astype(dtype, copy=False))


def _checked_form(given: Any, value: ir.Value, bindings: dict[str, int], where: str) -> Any:
    """What an input is fed, in its dtype. Each array of a sequence has sizes of its own."""
    tensor = is_tensor(value) and value.type is not None
    if tensor and isinstance(given, list):
        raise SampleError(f"samples, {where} is ragged; pad its rows to one length")
    if tensor and not isinstance(given, np.ndarray):
        raise SampleError(f"samples, {where} is not an array of numbers or strings, found {type(given).__name__}")
    if _is_sequence(value) and given is not None and not isinstance(given, list):
        raise SampleError(f"samples, {where} is a sequence, and takes a list of arrays, found {type(given).__name__}")
    cast = each(given, lambda array: _cast(array, value, where))
    each(cast, lambda array: _check_shape(array, value, {} if isinstance(cast, list) else bindings, where))
    return cast


def _dtype(value: ir.Value) -> np.dtype[Any] | None:
    """What an input takes; None where the model does not say."""
    if value.dtype is None:
        return None
    return np.dtype(object) if value.dtype == ir.DataType.STRING else value.dtype.numpy()


def _cast(array: Array, value: ir.Value, where: str) -> Array:
    want = _dtype(value)
    if want is None or array.dtype == want:
        return array
    assert value.dtype is not None
    floats = value.dtype.is_floating_point() and array.dtype.kind == "f"
    if not floats and not (array.dtype.kind in "iu" and want.kind in "iu"):
        raise SampleError(f"samples, {where} must be {want.name}, found {array.dtype.name}")
    with np.errstate(over="ignore"):
        cast = array.astype(want)
    if not np.array_equal(cast.astype(array.dtype), array, equal_nan=floats):
        raise SampleError(
            f"samples, {where} must be {want.name}; as {want.name} its {array.dtype.name} values would change, so convert them yourself"
        )
    return cast


def _check_shape(array: Array, value: ir.Value, bindings: dict[str, int], where: str) -> Array:
    """The array, of the declared rank and static sizes; one symbol has one size in the whole batch."""
    if value.shape is None:
        return array
    found, declared = list(array.shape), str(value.shape)
    if array.ndim != len(value.shape):
        raise SampleError(f"samples, {where} must have {len(value.shape)} axes {declared}, found {array.ndim}: {found}")
    for axis, size in enumerate(found):
        dim = dim_at(value, axis)
        expected = size_of(dim, bindings)
        if expected is None and isinstance(dim, str):
            bindings[dim] = size
        elif expected != size:
            bound = "" if dim == expected else f" with {dim} = {expected}"
            raise SampleError(f"samples, {where} must be {declared}{bound}, found {found}")
    return array
