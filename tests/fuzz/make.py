"""Kind and seed -> case: what makes every input again. `keep` leaves out parts, for minimizing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random

from fuzz import blocks, corpus, mutate_bytes, mutate_structure, pipelines, schemas  # type: ignore[import-not-found]
from fuzz.case import Case  # type: ignore[import-not-found]

Keep = Collection[int] | None
_HEAVY = (corpus.exports, corpus.backend)  # to make, the first time on a machine, or to run
_FILES = (corpus.texts,) * 10 + (corpus.backend,) * 10 + (corpus.written,) * 4 + (corpus.exports,)
_TARGETS = ("cpu{tune=off}",) * 6 + ("cpu{tune=off vendor=false}", "cpu{tune=off opset=17}", "quantized{tune=off}", "cpu")


def make(kind: str, seed: int, keep: Keep = None, *, light: bool = False) -> Case:
    """The case of a kind and seed, with only the parts whose numbers are in `keep` (None = all). `light`: of the smallest models only.

    Raises:
        KeyError: there is no such kind.
    """
    return KINDS[kind](kind, seed, _Light(f"{kind} {seed}") if light else Random(f"{kind} {seed}"), keep)


class _Light(Random):
    """Marks a case that must not take long."""


def kept(parts: Sequence[str], keep: Keep) -> tuple[str, ...]:
    return tuple(part for number, part in enumerate(parts) if keep is None or number in keep)


def _pipelines(kind: str, seed: int, rng: Random, keep: Keep) -> Case:
    """The tiny models come twice as often as the exports, which take longer."""
    name, model = _base(rng, (corpus.texts,) * 20 + (corpus.written,) * 6 + (corpus.exports,))
    chosen = kept(pipelines.pipeline(rng), keep)
    level = rng.choice((0, 1, 1, 2)) if rng.random() < 0.15 else None
    return Case(
        kind, seed, model, name, ", ".join(chosen) if level is None else None, level or 0, target=rng.choice(_TARGETS), samples=rng.random() < 0.8, check=rng.random() < 0.8, parts=chosen
    )  # fmt: skip


def _bytes(kind: str, seed: int, rng: Random, keep: Keep) -> Case:
    name, model = _base(rng, _FILES)
    _, other = _base(rng, _FILES)
    chosen = kept(mutate_bytes.plan(rng), keep)
    return Case(kind, seed, mutate_bytes.apply(model, chosen, other), name, level=rng.choice((0, 1, 1)), parts=chosen)


def _structure(kind: str, seed: int, rng: Random, keep: Keep) -> Case:
    name, model = _base(rng, _FILES)
    chosen = kept(mutate_structure.plan(rng), keep)
    return Case(kind, seed, mutate_structure.apply(model, chosen), name, level=rng.choice((0, 1, 1, 1, 2)), parts=chosen)


def _graphs(kind: str, seed: int, rng: Random, keep: Keep) -> Case:
    return _made(kind, seed, rng, schemas.graph(rng))


def _blocks(kind: str, seed: int, rng: Random, keep: Keep) -> Case:
    return _made(kind, seed, rng, blocks.blocks(rng))


def _made(kind: str, seed: int, rng: Random, model: bytes) -> Case:
    """At a level, or, one in four, by one pass."""
    target = rng.choice(_TARGETS[:9])
    if rng.random() < 0.25:
        return Case(kind, seed, model, kind, pipelines.pipeline(rng)[0], target=target, samples=True, check=True)
    level = rng.choice((0, 1, 1, 1, 1, 2))
    return Case(kind, seed, model, kind, level=level, target=target, samples=level == 2, check=True)


def _base(rng: Random, sources: Sequence[Callable[[], Mapping[str, bytes]]]) -> tuple[str, bytes]:
    light = [source for source in sources if source not in _HEAVY] if isinstance(rng, _Light) else sources
    models = rng.choice(light)()
    name = rng.choice(list(models))
    return name, models[name]


KINDS: Mapping[str, Callable[[str, int, Random, Keep], Case]] = {
    "pipelines": _pipelines,
    "bytes": _bytes,
    "structure": _structure,
    "graphs": _graphs,
    "blocks": _blocks,
}
