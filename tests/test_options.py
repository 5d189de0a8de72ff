"""Options state their range and what excludes them; lossy passes state how far they go, and everything that weakens reads that."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest

from graphopt.core.contract import Context, Pass
from graphopt.core.errors import PipelineError
from graphopt.core.options import exclusive, option
from graphopt.core.pipeline import parse
from graphopt.core.registry import passes
from graphopt.core.strength import Dial, Switch


@dataclasses.dataclass(frozen=True)
class Shrink(Pass):
    """A pass that does nothing."""

    ratio: float | None = option(None, above=0, below=1, what="a fraction")
    width: int | None = option(None, least=1)
    by: str = option("mean", one_of=("mean", "max"))
    layers: tuple[int, ...] = option((), least=0, most=7)
    loss: float = option(0.5, above=0)
    share: float = option(1.0, above=0, most=1)
    keep: float | None = None
    fast: bool = True
    exact: ClassVar[bool] = False
    ways = exclusive("ratio", "width", says="how much goes")
    dials = (Dial("ratio"), Dial("width", mild=100, by=2 / 3, rises=True), Dial("keep", mild=0.999, rest=True), Switch("fast", True, {"fast": False}))

    def run(self, model: Any, ctx: Context) -> int:
        return 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio=1.0", "shrink: option `ratio` expects a fraction between 0 and 1, found 1"),
        ("width=0", "shrink: option `width` expects 1 or more, found 0"),
        ("by=sum", "shrink: option `by` expects one of mean, max, found `sum`"),
        ("layers=3+8", "shrink: option `layers` expects a number from 0 to 7, found 8"),
        ("loss=0.0", "shrink: option `loss` expects a number above 0, found 0"),
        ("share=1.5", "shrink: option `share` expects more than 0 and at most 1, found 1.5"),
        ("ratio=0.5 width=3", "shrink: option `width` expects to stand alone, without ratio; both are given"),
    ],
)
def test_what_is_out_of_its_range_is_refused_with_a_caret(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as raised:
        parse(f"shrink{{{text}}}", {"shrink": Shrink})
    head, line, caret = str(raised.value).split("\n")
    assert head == message
    assert line[caret.index("^") :].startswith(message.split("`")[1])


def test_from_python_too_and_defaults_are_always_allowed() -> None:
    with pytest.raises(PipelineError, match="a fraction between 0 and 1"):
        Shrink(ratio=2.0)
    assert Shrink() == Shrink(ratio=None, layers=())


def test_ranges_are_shown() -> None:
    assert "ratio: float | None = none (a fraction between 0 and 1), width: int | None = none (1 or more), by: str = mean (one of mean, max)" in (
        Shrink.describe()
    )


def test_one_of_several_can_be_required() -> None:
    assert Shrink.ways.require(Shrink(width=3)) == "width"
    with pytest.raises(PipelineError, match=r"option `ratio` expects how much goes \(or width\), found `nothing`"):
        Shrink.ways.require(Shrink())


# ---- strength -------------------------------------------------------------------------------------------------------------------------


def chain(step: Any) -> list[Any]:
    found = [step]
    while (milder := found[-1].weaker()) is not None:
        found.append(milder)
        assert len(found) < 60
    return found


def test_dials_go_to_their_mild_end_and_then_switches_turn() -> None:
    assert [s.ratio for s in chain(Shrink(ratio=0.1))] == [0.1, 0.05, 0.025, 0.0125, 0.01, 0.01]
    assert [s.width for s in chain(Shrink(width=40, fast=False))] == [40, 60, 90, 100]
    assert [s.keep for s in chain(Shrink(keep=0.996, fast=False))] == [0.996, 0.998, 0.999]
    assert chain(Shrink()) == [Shrink(), Shrink(fast=False)]
    assert Shrink(ratio=0.001, fast=False).weaker() is None, "what is milder than the mildest is not made stronger"


def test_between_two_settings() -> None:
    assert Shrink(ratio=0.4).between(Shrink(ratio=0.1)) == Shrink(ratio=0.2)
    assert Shrink(width=40).between(Shrink(width=60)) == Shrink(width=50)
    assert Shrink(keep=0.9).between(Shrink(keep=0.975)) == Shrink(keep=0.95)
    assert Shrink(ratio=0.105).between(Shrink(ratio=0.1)) is None
    assert Shrink(width=40).between(Shrink(width=41)) is None
    assert Shrink().between(Shrink(fast=False)) is None


LOSSY = ["quantize", "quantize{mode=static per-channel=false}", "quantize{mode=weight-only bits=4 codes=nf4}", "factorize", "factorize{rank=4}",
    "factorize{energy=0.5}", "prune-heads{ratio=0.5}", "prune-ffn{flops=0.5}", "prune{latency=0.3}", "prune-hidden{ratio=0.5}",
    "prune-head-dim{ratio=0.5}", "merge-heads{ratio=0.5}", "drop-layers{count=9}", "drop-layers{layers=3+1+2}", "threshold-attention",
    "threshold-attention{sparsity=0.9 constant=0.5}", "quantize-probabilities{codes=log bits=3}", "mix-precision{loss=0.1}"]  # fmt: skip


@pytest.mark.parametrize("text", LOSSY)
def test_every_lossy_pass_weakens_to_an_end_through_settings_that_parse(text: str) -> None:
    (step,) = parse(text, passes())
    settings = chain(step)
    assert len(settings) > 1
    assert len(set(settings)) == len(settings)
    for one in settings:
        assert parse(str(one), passes()) == [one]


def test_lossy_passes_state_their_options_once() -> None:
    """A dial names an option that there is, and a switch a setting that can be."""
    known = passes()
    for name in known:
        cls: Any = known[name]
        fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        assert not (cls.dials and cls.exact), name
        assert {d.option for d in cls.dials} | set(cls.ways.keys) <= fields, name
        assert not fields & {"dials", "ways"}, name
