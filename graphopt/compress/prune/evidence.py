"""What criteria judge by, collected in one run over the samples: moments of inputs and gradients of the output projections, masks, maps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import Heads
from graphopt.analysis.linear import Embeddings
from graphopt.calibration.attention_maps import mean_maps
from graphopt.calibration.enough import too_few
from graphopt.calibration.moments import within
from graphopt.calibration.padding import Kept, Paddings
from graphopt.compress.prune.criterion import LossFunction, Question
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array, Context
from graphopt.core.errors import GraphoptError
from graphopt.graph.questions import all_nodes, bodies, consumers, static_dim
from graphopt.rewrite.dead import remove_dead
from graphopt.run import Feeds, each

if TYPE_CHECKING:
    import torch

    from graphopt.run.torch.model import TorchModel

F = TypeVar("F")
BYTES = 2**30  # of moments that are held at a time; more means another run over the samples


def mask_gradients(candidates: Sequence[Candidate], asked: Question, of: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[Candidate, Array]]:
    """For each candidate float64 [groups]: the sum of `of(dL/dm)` over sequences for a mask m on each group, by the number of rows.

    Args:
        of: elementwise, such as `torch.abs`; is given float64 [sequences, groups].
    """
    return _walked(candidates, asked, lambda group: _MaskGradients(group, asked, of))


def second_moments(candidates: Sequence[Candidate], asked: Question) -> Iterator[tuple[Candidate, Array, Array]]:
    """For each candidate, of its output projection: E[x x^T] of the inputs, float64 [in, in], over its own rows; and the sum of g g^T of the
    gradients of the loss with respect to its result, float64 [out, out], in one unit for all candidates. Padding does not count."""
    for c, (inputs, gradients) in _walked(candidates, asked, lambda group: _SecondMoments(group, asked)):
        yield c, inputs, gradients


def _walked(candidates: Sequence[Candidate], asked: Question, collector: Callable[[list[Candidate]], _Collector[F]]) -> Iterator[tuple[Candidate, F]]:
    """The samples are iterated once for each group of candidates whose moments fit into `BYTES`."""
    samples = asked.samples()
    for group in within(candidates, _bytes, BYTES):
        collected = collector(group)
        for feed in samples:
            collected.add(feed)
        if collected.rows:
            yield from collected.judged(asked)


def _bytes(c: Candidate) -> int:
    output = c.units[0].output
    return 0 if output is None else 8 * (output.in_features**2 + output.out_features**2)


class _Collector(ABC, Generic[F]):
    """Gradients by torch: no parameter needs one, so that the backward pass costs about as much as the forward pass."""

    def __init__(self, candidates: Sequence[Candidate], asked: Question) -> None:
        ctx, model = asked.ctx, asked.ctx.model
        try:
            import torch
        except ImportError:
            why = f"importance={asked.criterion} needs gradients, and torch is not installed"
            raise GraphoptError(f"{why}; install it, or use reconstruction") from None
        self.own_loss, self.rows = callable(asked.loss), 0
        self.follows = False  # from any of the projections, on any batch
        self.torch, self.random = torch, torch.Generator().manual_seed(asked.seed)
        self.model, model = _differentiable(model, ctx, whole=self.own_loss)
        self.loss = loss_of(model, asked.loss)
        have = {v.name for node in model.graph for v in node.outputs}
        self.candidates = candidates = [c for c in candidates if all(u.output is None or u.output.node.outputs[0].name in have for u in c.units)]
        self.linears = [u.output for c in candidates for u in c.units if u.output is not None]
        shown = [*(str(v.name) for x in self.linears for v in (x.x, x.node.outputs[0])), *(str(v.name) for v in model.graph.outputs)]
        self.padding = ctx.get(Paddings()).about(shown)
        self.seen = [0] * len(self.linears)  # rows of each

    @abstractmethod
    def _sum(self, k: int, x: torch.Tensor, g: torch.Tensor, kept: Kept) -> None:
        """The inputs x and the gradients g of the result of projection k, of one batch."""

    @abstractmethod
    def _of(self, ks: range) -> F:
        """What was found for the projections of one candidate."""

    def judged(self, asked: Question) -> Iterator[tuple[Candidate, F]]:
        """What was found for each candidate that enough rows have reached; a remark for the others.

        Raises:
            GraphoptError: the loss follows from none of them.
        """
        if not self.follows:
            raise GraphoptError("the loss does not depend on any head or neuron: no float output of the model follows from them")
        place = 0
        for c in self.candidates:
            own = range(place, place + len(c.units))
            few = too_few(sum(self.seen[k] for k in own), self.linears[place].in_features)
            if few is None:
                yield c, self._of(own)
            else:
                asked.unjudged(c, few)
            place += len(c.units)

    def add(self, feed: Feeds) -> None:
        """One batch: forward, a loss, and the gradients of the projections' results."""
        torch = self.torch
        probes: dict[str, Any] = {}

        def probed(name: str) -> Any:
            def edit(value: Any) -> Any:
                probes[name] = torch.zeros_like(value, requires_grad=True)
                return value + probes[name]

            return edit

        results = [str(x.node.outputs[0].name) for x in self.linears]
        reads = [str(x.x.name) for x in self.linears]
        feeds = {name: each(array, lambda x: torch.from_numpy(np.ascontiguousarray(x))) for name, array in feed.items()}
        outputs = self.model(feeds, observe=reads, edit={name: probed(name) for name in results})
        kept = self.padding.kept(feed)
        self.rows += len(kept.rows(results[0], probes[results[0]]))
        named = {p.name: outputs[p.name] for p in self.model.outputs}
        wanted = named if self.own_loss else kept.counted(named)
        loss = self.loss(wanted, feeds, self.random)
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            return  # a batch on which a branch reads no block
        self.follows = True
        gradients = torch.autograd.grad(loss, [probes[name] for name in results], allow_unused=True)
        for k, (name, result, gradient) in enumerate(zip(reads, results, gradients, strict=True)):
            x = outputs[name].detach()
            self.seen[k] += len(kept.rows(name, x))
            self._sum(k, x, torch.zeros_like(probes[result]) if gradient is None else gradient, kept)


def _differentiable(model: ir.Model, ctx: Context, *, whole: bool) -> tuple[TorchModel, ir.Model]:
    """What torch computes of a graph, as a module and as a graph: where it lacks an operator, what that reads is an output instead.

    Raises:
        MissingOp: an operator is missing and the `whole` graph is wanted, or nothing is left in front of it.
    """
    from graphopt.run.torch.model import TorchModel
    from graphopt.run.torch.table import MissingOp

    while True:
        try:
            return TorchModel(model, trainable=()), model
        except MissingOp as missing:
            part = None if whole else _in_front_of(model, missing.node)
            if part is None:
                raise
            told = f"torch has no {missing.op_type}: importance is judged by what it reads, and nothing behind it is judged"
            ctx.remarks.missed(missing.node, told)
            model = part


def _in_front_of(model: ir.Model, name: str) -> ir.Model | None:
    """A copy without a node and all that follows from it; the floats that these read are outputs. None where there are none."""
    copy = model.clone()
    owner = {inner: node for node in copy.graph for body in bodies(node) for inner in ir.traversal.RecursiveGraphIterator(body)}
    gone = {owner.get(node, node) for node in all_nodes(copy) if node.name == name}
    todo = list(gone)
    while todo:
        for reader in {owner.get(r, r) for v in todo.pop().outputs for r in consumers(v)} - gone:
            gone.add(reader)
            todo.append(reader)
    read = [v for node in all_nodes(copy) if owner.get(node, node) in gone for v in node.inputs if v is not None]
    outputs = [v for v in (*copy.graph.outputs, *read) if (made := v.producer()) is not None and made.graph is copy.graph and made not in gone]
    floats = [v for v in dict.fromkeys(outputs) if v.dtype is not None and v.dtype.is_floating_point()]
    copy.graph.outputs[:] = floats
    remove_dead(copy)
    return copy if floats and gone else None


class _MaskGradients(_Collector[Array]):
    def __init__(self, candidates: Sequence[Candidate], asked: Question, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(candidates, asked)
        self.of = of
        self.masks: list[Any] = [0.0] * len(self.linears)
        self.weights = [self.torch.from_numpy(np.ascontiguousarray(x.matrix().T, np.float32)) for x in self.linears]
        self.counts = [c.count for c in candidates for u in c.units if u.output is not None]

    def _sum(self, k: int, x: torch.Tensor, g: torch.Tensor, kept: Kept) -> None:
        effect = x * (g @ self.weights[k])  # dL/dm for a mask m on each input feature of the projection, row by row
        sequences, count = len(effect), self.counts[k]
        per_sequence = effect.reshape(sequences, math.prod(effect.shape[1:-1]), effect.shape[-1]).sum(1)
        on_groups = per_sequence.reshape(sequences, count, effect.shape[-1] // count).sum(-1).double()
        self.masks[k] = self.masks[k] + self.of(on_groups).sum(0).numpy()

    def _of(self, ks: range) -> Array:
        return np.asarray(np.sum([self.masks[k] for k in ks], axis=0) / self.rows)


class _SecondMoments(_Collector[tuple[Array, Array]]):
    def __init__(self, candidates: Sequence[Candidate], asked: Question) -> None:
        super().__init__(candidates, asked)
        self.inputs: list[Any] = [0.0] * len(self.linears)
        self.gradients: list[Any] = [0.0] * len(self.linears)

    def _sum(self, k: int, x: torch.Tensor, g: torch.Tensor, kept: Kept) -> None:
        linear = self.linears[k]
        flat, grad = kept.rows(str(linear.x.name), x), kept.rows(str(linear.node.outputs[0].name), g)
        self.inputs[k] = self.inputs[k] + (flat.T @ flat).double().numpy()
        self.gradients[k] = self.gradients[k] + (grad.T @ grad).double().numpy()

    def _of(self, ks: range) -> tuple[Array, Array]:
        inputs = np.sum([self.inputs[k] for k in ks], axis=0) / max(sum(self.seen[k] for k in ks), 1)
        return inputs, np.sum([self.gradients[k] for k in ks], axis=0) / self.rows


def loss_of(model: ir.Model, loss: str | LossFunction) -> Any:
    """loss(outputs, feeds, generator) -> one number; see `Importance`.

    Raises:
        GraphoptError: there is no such loss.
    """
    if callable(loss):
        return lambda outputs, feeds, generator: loss(outputs, feeds)
    if loss == "auto":
        loss = "sampled" if _has_logits(model) else "projection"
    if loss == "projection":
        return _projection
    if loss == "sampled":
        return _sampled
    raise GraphoptError(f"a loss is auto, projection, sampled, or a function, found `{loss}`")


def _has_logits(model: ir.Model) -> bool:
    """The first output has as many features as an embedding that the model looks up has rows: scores of tokens."""
    width = static_dim(model.graph.outputs[0], -1) if model.graph.outputs and model.graph.outputs[0].shape else None
    return width is not None and any(e.rows == width for e in Embeddings(casts=True).compute(model, Context(model)))


def _projection(outputs: dict[str, Any], feeds: dict[str, Any], generator: Any) -> Any:
    """Float outputs, each element times a random sign: the expected square of its gradient is that of all outputs together."""
    import torch

    floats = [y for y in outputs.values() if isinstance(y, torch.Tensor) and y.is_floating_point()]
    return sum((y * torch.randint(0, 2, y.shape, generator=generator).mul(2).sub(1).to(y.dtype)).sum() for y in floats)


def _sampled(outputs: dict[str, Any], feeds: dict[str, Any], generator: Any) -> Any:
    """Log-likelihood of classes drawn from the model's own distribution: its squared gradient is the Fisher information."""
    import torch

    likely = torch.log_softmax(next(iter(outputs.values())).flatten(0, -2), -1)
    drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
    return likely.gather(1, drawn).sum()


def map_scores(candidates: Sequence[Candidate], asked: Question, of: Callable[[Array], Array]) -> Iterator[tuple[Candidate, Array]]:
    """For each group of heads the mean over rows that are no padding.

    Args:
        of: attention weights [rows, heads, keys] -> [rows, heads].
    """
    heads = {u.node: u.heads for c in candidates for u in c.units if isinstance(u, Heads)}
    found = mean_maps(asked.ctx.model, asked.samples(), heads, lambda weights: of(weights).sum(0, dtype=np.float64))
    for c in candidates:
        if not all(u.node in found for u in c.units):
            asked.unjudged(c, "the samples do not show its attention weights")
        else:
            yield c, np.sum([found[u.node] for u in c.units], axis=0).reshape(c.count, -1).mean(1)
