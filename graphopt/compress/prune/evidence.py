"""What importance is judged by, collected in one run over the samples: moments of inputs and gradients of the output projections, and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis.heads import Heads
from graphopt.analysis.linear import Embeddings
from graphopt.calibration.attention_maps import Reduce, observe_maps
from graphopt.calibration.moments import input_moments
from graphopt.calibration.padding import Kept, Paddings
from graphopt.compress.prune.removable import Candidate
from graphopt.core.contract import Array, Context
from graphopt.core.errors import GraphoptError
from graphopt.graph.questions import static_dim
from graphopt.run import Feeds
from graphopt.run.observe import limited

if TYPE_CHECKING:
    import torch

Loss = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]  # (outputs, feeds), torch tensors by name -> one number
BYTES = 2**30  # of moments that are held at a time; more means another run over the samples


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Of one candidate, summed over its units. Padding does not count.

    Attributes:
        inputs: E[x x^T], float64 [in, in], of the output projection, over its own rows.
        gradients: sum of g g^T, float64 [out, out], of the loss with respect to its result, in one unit for all candidates.
        masks: float64 [groups]: what the criterion says about a mask on each group.
    """

    inputs: Array
    gradients: Array
    masks: Array


def gather(
    ctx: Context, candidates: Sequence[Candidate], criterion: str, loss: str | Loss, rows: int, seed: int
) -> Iterator[tuple[Candidate, Evidence]]:
    """The evidence that a criterion needs (see `importance.CRITERIA`), candidate by candidate; what it does not need is zeros.

    Args:
        ctx: its samples are iterated once for each group of candidates whose moments fit into `BYTES`.
        rows: stop after the batch in which so many rows (tokens) were seen.
    """
    nothing = np.zeros((0, 0))
    if criterion == "reconstruction":
        values = dict.fromkeys(u.output.x for c in candidates for u in c.units if u.output is not None)
        moments = {v: m.astype(np.float64) for v, m in input_moments(ctx, list(values), rows=rows)}
        for c in candidates:
            yield c, Evidence(sum((moments[u.output.x] for u in c.units if u.output is not None), np.zeros(())), nothing, nothing)
        return
    few = limited(ctx.require_samples(), rows)
    if criterion in ("attention", "entropy"):
        for c, scores in head_scores(ctx.model, few, candidates, criterion).items():
            yield c, Evidence(nothing, nothing, scores)
        return
    for group in _groups(candidates):
        collector = _Collector(ctx, group, criterion, loss, seed)
        for feed in few:
            collector.add(feed)
        if collector.rows:
            yield from collector.found()


def _groups(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    group, size = list[Candidate](), 0
    for c in candidates:
        output = c.units[0].output
        need = 0 if output is None else 8 * (output.in_features**2 + output.out_features**2)
        if group and size + need > BYTES:
            yield group
            group, size = [], 0
        group.append(c)
        size += need
    if group:
        yield group


class _Collector:
    """Gradients by torch: no parameter needs one, so that the backward pass costs about as much as the forward pass."""

    def __init__(self, ctx: Context, candidates: Sequence[Candidate], criterion: str, loss: str | Loss, seed: int) -> None:
        model = ctx.model
        try:
            import torch
        except ImportError:
            raise GraphoptError(f"importance={criterion} needs gradients, and torch is not installed; install it, or use reconstruction") from None
        from graphopt.run.torch.model import TorchModel

        self.candidates, self.criterion = candidates, criterion
        self.loss, self.own_loss, self.rows = loss_of(model, loss), callable(loss), 0
        self.torch, self.random = torch, torch.Generator().manual_seed(seed)
        self.model = TorchModel(model, trainable=())
        self.linears = [u.output for c in candidates for u in c.units if u.output is not None]
        shown = [*(str(v.name) for x in self.linears for v in (x.x, x.node.outputs[0])), *(str(v.name) for v in model.graph.outputs)]
        self.padding = ctx.get(Paddings()).about(shown)
        self.weights = [torch.from_numpy(np.ascontiguousarray(x.matrix().T, np.float32)) for x in self.linears]
        self.inputs: list[Any] = [0.0] * len(self.linears)
        self.gradients: list[Any] = [0.0] * len(self.linears)
        self.masks: list[Any] = [0.0] * len(self.linears)
        self.seen = [0] * len(self.linears)  # rows of each
        self.counts = [c.count for c in candidates for u in c.units if u.output is not None]

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
        feeds = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feed.items()}
        outputs = self.model(feeds, observe=reads, edit={name: probed(name) for name in results})
        kept = self.padding.kept(feed)
        named = {p.name: outputs[p.name] for p in self.model.outputs}
        wanted = named if self.own_loss else kept.counted(named)
        loss = self.loss(wanted, feeds, self.random)
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise GraphoptError("the loss does not depend on any head or neuron: no float output of the model follows from them")
        gradients = torch.autograd.grad(loss, [probes[name] for name in results], allow_unused=True)
        for k, (name, result, gradient) in enumerate(zip(reads, results, gradients, strict=True)):
            self._sum(k, outputs[name].detach(), torch.zeros_like(probes[result]) if gradient is None else gradient, kept)
        self.rows += len(kept.rows(results[0], probes[results[0]]))

    def _sum(self, k: int, x: torch.Tensor, g: torch.Tensor, kept: Kept) -> None:
        if self.criterion == "obs":
            linear = self.linears[k]
            flat, grad = kept.rows(str(linear.x.name), x), kept.rows(str(linear.node.outputs[0].name), g)
            self.inputs[k] = self.inputs[k] + (flat.T @ flat).double()
            self.seen[k] += len(flat)
            self.gradients[k] = self.gradients[k] + (grad.T @ grad).double()
            return
        effect = x * (g @ self.weights[k])  # dL/dm for a mask m on each input feature of the projection, row by row
        per_sequence = effect.reshape(len(effect), -1, effect.shape[-1]).sum(1)
        on_groups = per_sequence.reshape(len(effect), self.counts[k], -1).sum(-1).double()
        self.masks[k] = self.masks[k] + (on_groups.abs() if self.criterion == "taylor" else on_groups.square()).sum(0)

    def found(self) -> Iterator[tuple[Candidate, Evidence]]:
        place = 0
        for c in self.candidates:
            ks = range(place, place + len(c.units))
            place += len(c.units)
            inputs = np.sum([_array(self.inputs[k]) for k in ks], axis=0) / max(sum(self.seen[k] for k in ks), 1)
            gradients, masks = (np.sum([_array(store[k]) for k in ks], axis=0) / self.rows for store in (self.gradients, self.masks))
            yield c, Evidence(inputs, gradients, masks)


def _array(value: Any) -> Array:
    return np.zeros(()) if isinstance(value, float) else np.asarray(value.numpy())


def loss_of(model: ir.Model, loss: str | Loss) -> Any:
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


def head_scores(model: ir.Model, samples: Iterable[Feeds], candidates: Sequence[Candidate], criterion: str) -> dict[Candidate, Array]:
    """For each group of heads the mean over rows that are no padding: `attention`: of the largest weight; `entropy`: of 1 - entropy / log(keys)."""
    heads = {u.node: u.heads for c in candidates for u in c.units if isinstance(u, Heads)}
    sums: dict[ir.Node, tuple[Array, int]] = {}

    def reducer(node: ir.Node) -> Reduce:
        def add(weights: Array) -> None:
            total, count = sums.get(node, (np.zeros(heads[node]), 0))
            sums[node] = total + _by_row(weights, criterion).sum(0, dtype=np.float64), count + len(weights)

        return add

    observe_maps(model, samples, {node: (count, reducer(node)) for node, count in heads.items()})
    found = {}
    for c in candidates:
        scores = [sums[u.node][0] / sums[u.node][1] for u in c.units if sums.get(u.node, (None, 0))[1]]
        if len(scores) == len(c.units):
            found[c] = np.sum(scores, axis=0).reshape(c.count, -1).mean(1)
    return found


def _by_row(weights: Array, criterion: str) -> Array:
    """[rows, heads, keys] -> [rows, heads]"""
    if criterion == "attention":
        return np.asarray(weights.max(-1))
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1)
    seen = np.log(np.maximum((weights > 0).sum(-1), 1))  # of the keys that a row may read
    return np.asarray(1 - entropy / np.maximum(seen, 1e-9))
