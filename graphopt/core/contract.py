"""The three things that graphopt is made of: passes change a graph, analyses tell facts about it, targets lower it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, Self, TypeGuard, TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.core.errors import SampleError
from graphopt.core.fuel import Fuel
from graphopt.core.options import Configurable, kebab
from graphopt.core.places import data_file
from graphopt.core.remarks import Remarks
from graphopt.core.replay import Spool
from graphopt.core.strength import Dial, Dials, in_use, switched, turned

if TYPE_CHECKING:
    from graphopt.core.machine import Machine
    from graphopt.graph.opset.versions import Rise
    from graphopt.rewrite.choices import Choices

Facts = TypeVar("Facts")
Array = np.ndarray[Any, Any]


class Pass(Configurable, ABC):
    """One change of a graph. A subclass is a frozen dataclass whose fields are its options.

    `exact` is False for a pass that may change the numbers beyond rounding (quantization, pruning, low rank).
    `dials` says which options make such a pass milder, and how far.
    `samples` says whether it reads the user's samples: `no`, `can` (for some of its options, or to tell more) or `needs`, as its options are
    by default; `data_free` are the options with which one of the latter two does without.
    """

    exact: ClassVar[bool] = True
    dials: ClassVar[Dials] = ()
    samples: ClassVar[Literal["no", "can", "needs"]] = "no"
    data_free: ClassVar[str] = ""

    @abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> int:
        """Change `model` in place; return how many changes were made (0 = untouched)."""

    @property
    def binding(self) -> bool:
        """True if a limit of the user asks for it (`opset=17`, `vnni=false`): it is never taken back, neither for being slow nor for its loss."""
        return False

    def check(self, known: Mapping[str, type[Pass]]) -> None:
        """Refuse options that name passes which are not among `known`; whoever parses a pipeline asks.

        Raises:
            PipelineError: its `option` names the option.
        """

    def weaker(self) -> Self | None:
        """A milder setting of the same pass, or None if it can only be undone."""
        return turned(self, Dial.milder) or switched(self)

    def between(self, milder: Self) -> Self | None:
        """A setting between this one and a milder one; None where there is none that is worth trying."""
        values = dict(in_use(milder))
        return turned(self, lambda dial, value: dial.between(value, values.get(dial, value)))


class Analysis(ABC, Generic[Facts]):
    """Read-only facts about a graph. A subclass is a frozen dataclass; the Context caches its facts by value."""

    @abstractmethod
    def compute(self, model: ir.Model, ctx: Context) -> Facts: ...


class Batches(Protocol):
    """Batches (name -> array) as often as you iterate, always in the same order: `graphopt.Samples`, or a list of dicts."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def _counts(samples: Iterable[Any]) -> TypeGuard[Batches]:
    """It has a length, also where the length is asked for (a DataLoader over a stream has none)."""
    try:
        return isinstance(samples, Sized) and len(samples) >= 0
    except TypeError:
        return False


class Context:
    """What a pass is given besides the graph. An explicit argument, never global.

    Args:
        samples: batches of the model's inputs; a generator, which can be read once, is written to a temporary folder.
        passes: those that the run knows, with the user's plugins; None = the installed ones.
        tune: False = lowerings time nothing, whatever the target's option says.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        target: Target | None = None,
        samples: Batches | Iterable[Mapping[str, Array]] | None = None,
        remarks: Remarks | None = None,
        fuel: Fuel | None = None,
        budget: Budget | None = None,
        original: ir.Model | None = None,
        passes: Mapping[str, type[Pass]] | None = None,
        tune: bool = True,
    ) -> None:
        self.model, self.target, self.budget, self.passes, self.tune = model, target, budget, passes, tune
        self.samples: Batches | None = samples if samples is None or _counts(samples) else Spool(samples)
        self.original = model if original is None else original
        self.remarks = Remarks() if remarks is None else remarks
        self.fuel = Fuel() if fuel is None else fuel
        self.choices: Choices | None = None  # set by choose-spellings; the rewrite driver asks
        self.step: Pass | None = None  # the pass that runs, set by the manager
        self._facts: dict[Any, Any] = {}

    def get(self, analysis: Analysis[Facts]) -> Facts:
        """The facts of an analysis about the current graph; computed once until the graph changes."""
        if analysis not in self._facts:
            self._facts[analysis] = analysis.compute(self.model, self)
        facts: Facts = self._facts[analysis]
        return facts

    def knows(self, analysis: Analysis[Any]) -> bool:
        """True if `get` need not compute it."""
        return analysis in self._facts

    def put(self, analysis: Analysis[Facts], facts: Facts) -> None:
        """The facts of an analysis about the current graph, where several are computed at once."""
        self._facts[analysis] = facts

    def invalidate(self) -> None:
        """Drop the facts of every analysis: the graph has changed."""
        self._facts = {}

    def require_samples(self) -> Batches:
        """The user's samples.

        Raises:
            SampleError: there are none; the text names the flag to add, and the options of the pass that do without.
        """
        if self.samples is not None and not len(self.samples):
            raise SampleError(f"{self.remarks.current} needs samples of the model's inputs, found 0 batches: the source is empty, or used up before")
        if self.samples is None:
            other = f"; or do without: {self.step.data_free}" if self.step is not None and self.step.data_free else ""
            raise SampleError(f"{self.remarks.current} needs samples of the model's inputs; add --samples DATA (or samples=... in Python){other}")
        return self.samples


@dataclasses.dataclass(frozen=True)
class Budget:
    """The one loss budget for all lossy passes: the relative fall of the metric, or the relative L2 distance of the outputs."""

    max_loss: float


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What a target wrote: the files (the first is the one to load) and their size together, in bytes."""

    files: tuple[Path, ...]
    nbytes: int


class Session(Protocol):
    """A model that runs: named arrays in, named arrays out."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...


class Target(Configurable, ABC):
    """A runtime with one way of running a model; `cpu{threads=2}` parses exactly like a pass.

    What every target has; a subclass makes an option of it by a field of that name:
        shapes: BATCHxLENGTH sizes to time at, such as `("1x16", "8x64")`; none = the default ones.
        threads: of the runtime.
        opset: that the artifact must not exceed.
        tune: whether its spellings may be timed (`on`), are taken from what was timed before (`cache`), or from its table (`off`).
        processor: the name of another processor that it is for; then nothing is timed here.
        writes_onnx: the artifact is an ONNX file, so that a model which no pass changed is written as the bytes that it came as.
    """

    shapes: tuple[str, ...] = ()
    threads: int = 1
    opset: int | None = None
    tune: Literal["on", "cache", "off"] = "on"
    processor: str | None = None
    writes_onnx: ClassVar[bool] = True

    @abstractmethod
    def pipeline(self, level: int) -> str:
        """What -O0 .. -O3 mean here, as pipeline text."""

    @abstractmethod
    def lowerings(self) -> Sequence[Pass]:
        """Ordinary passes that spell the graph as this target runs it best; every debugging tool works on them too."""

    @abstractmethod
    def supports(self, node: ir.Node) -> bool:
        """True if the runtime has a kernel for this node."""

    def finish(self, model: ir.Model) -> tuple[ir.Model, tuple[Rise, ...]]:
        """A lowered model as it will be shipped, and which versions of it rose above those of the input, and why.

        Raises:
            TargetError: it cannot be written within `opset`.
        """
        return model, ()

    def files(self, path: Path) -> Sequence[Path]:
        """The files that `save` to `path` may write. For a folder: the folder itself and what will be in it."""
        return path, data_file(path)

    def size(self, model: ir.Model) -> int | None:
        """Bytes of a finished model as an artifact; None = those of an ONNX file."""
        return None

    @abstractmethod
    def save(self, model: ir.Model, path: Path) -> Artifact:
        """Write the lowered model, whole or not at all."""

    @abstractmethod
    def session(self, model: ir.Model) -> Session:
        """Run the lowered model here.

        Raises:
            TargetError: the runtime is not on this machine.
        """

    def probe(self, model: ir.Model, feed: Mapping[str, Array] | None = None) -> Mapping[str, Any]:
        """Open a finished model as it will be opened in service, run it once, and give its outputs by name; without a feed only open it.

        The gate asks this of everything before it is written, and of candidates before they are timed. A target whose runtime can crash
        does it in a process of its own (`graphopt.run.guarded.probe` for ONNX Runtime); by default it is a session in this process.

        Raises:
            TargetError: it cannot be opened or run; one line that says why.
        """
        session = self.session(model)
        return {} if feed is None else session.run(feed)

    def spellings(self) -> Sequence[Alternative]:
        """The table of equivalent spellings, the default of each kind first; `lowerings` must begin with `choose-spellings` to use it."""
        return ()

    def runs_here(self) -> bool:
        """True if `session` can run a model on this machine, as far as is known without a model."""
        return True

    def machine(self) -> Machine | None:
        """What its timings depend on: the key under which they are kept, and how they are clocked. None = they are not kept."""
        return None

    def report(self, model: ir.Model) -> dict[str, Any]:
        """What this target has to say about the lowered model (JSON values); a list of texts under `warnings` becomes remarks."""
        return {}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Nodes of one graph, in topological order, that are timed and spelled together."""

    nodes: tuple[ir.Node, ...]


PieceKind = Analysis[tuple[Piece, ...]]


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One row of a target's table: `passes` turn a piece of `kind` into this spelling; no pass = as the passes before left it.

    The first row of a kind is its default: it decides where nothing was measured, and where no other is faster beyond the noise.
    """

    kind: PieceKind
    name: str
    passes: tuple[Pass, ...] = ()

    @property
    def label(self) -> str:
        """`residual-norm: sum`."""
        return f"{self.kind_name}: {self.name}"

    @property
    def kind_name(self) -> str:
        """`ResidualNorm()` -> `residual-norm`."""
        return kebab(type(self.kind).__name__)


Metric = Callable[[Session], float]  # larger for better models


class NamedMetric(Configurable, ABC):
    """A metric that has a name and options as text, as `accuracy{data=dev.npz}`: a frozen dataclass whose fields are its options."""

    @abstractmethod
    def __call__(self, session: Session) -> float:
        """How good the model is."""
