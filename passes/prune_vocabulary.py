"""prune-vocabulary: tokens that are never used leave the embedding table and the output layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.linear import Embedding, Embeddings, Linear, Linears
from graphopt.core.contract import Array, Context, Pass
from graphopt.core.errors import PipelineError
from graphopt.core.options import option_error
from graphopt.graph.questions import consumers, is_constant, producer
from graphopt.rewrite.insert import Inserter
from graphopt.rewrite.slicing.apply import apply
from graphopt.rewrite.slicing.close import Slicing
from graphopt.rewrite.slicing.plan import Refusal, Slot
from graphopt.run import Feeds

KEPT = "graphopt.vocabulary"  # model metadata: the old ids that stay, in the order of the new ones, as JSON


@dataclasses.dataclass(frozen=True)
class PruneVocabulary(Pass):
    """Keep the rows of the token table that are used; the model goes on to take the ids of its tokenizer, and translates them by a table inside.

    An output layer (tied or not) loses the same rows: its scores are then by new ids. The old id of each new one is in the model's metadata,
    key `graphopt.vocabulary`, as a JSON list.

    Args:
        ids: a file of ids that stay, separated by white space; without it those that the samples contain.
        keep: further ids that stay, such as special tokens.
        unknown: the id (one that stays) that a removed id is read as; none: a removed id makes the runtime fail, out of the table's bounds.
        input: the input that holds token ids; none: the integer input that looks up the largest table.
        output: also prune the output layer.

    Raises:
        PipelineError: the file cannot be read, or an id is not in the table.
        SampleError: neither a file nor samples.
    """

    ids: str = ""
    keep: tuple[int, ...] = ()
    unknown: int | None = None
    input: str = ""
    output: bool = True
    exact: ClassVar[bool] = False
    samples = "needs"
    data_free = "ids=FILE"

    def run(self, model: ir.Model, ctx: Context) -> int:
        lookup = self._lookup(ctx)
        if lookup is None:
            ctx.remarks.missed("", f"no table is looked up by {f'the input `{self.input}`' if self.input else 'an integer input'}")
            return 0
        kept = self._kept(ctx, lookup)
        if len(kept) == lookup.rows:
            ctx.remarks.missed(lookup.node.name or "", f"all {lookup.rows} rows of the table are used")
            return 0
        mask = np.ones(lookup.rows, bool)
        mask[kept] = False
        head = self._head(ctx, lookup) if self.output else None
        try:
            s = _plan(model, ctx, lookup, head, mask)
        except Refusal as refusal:
            ctx.remarks.missed(lookup.node.name or "", f"not pruned: {refusal}")
            return 0
        if not ctx.fuel.burn():
            return 0
        outputs = [str(v.name) for v in s.removed if v.is_graph_output()]
        apply(s)
        ctx.invalidate()
        translate = np.full(lookup.rows, len(kept) if self.unknown is None else int(np.searchsorted(kept, self.unknown)), np.int64)
        translate[kept] = np.arange(len(kept))
        _translate(model, lookup.node, translate)
        model.metadata_props[KEPT] = json.dumps(kept.tolist())
        told = f"vocabulary: {lookup.rows} -> {len(kept)} tokens" + (f"; {', '.join(outputs)} gives scores by new ids" if outputs else "")
        ctx.remarks.applied(lookup.node.name or "", told, before=lookup.rows, after=len(kept))
        return 1

    def _lookup(self, ctx: Context) -> Embedding | None:
        found = [e for e in ctx.get(Embeddings(casts=True)) if (source := _source(e.ids)) is not None and self.input in ("", source.name)]
        return max(found, key=lambda e: e.rows, default=None)

    def _kept(self, ctx: Context, lookup: Embedding) -> Array:
        source = _source(lookup.ids)
        assert source is not None
        found = _read(self.name, self.ids) if self.ids else _seen(ctx.require_samples(), str(source.name))
        found |= {*self.keep, *([] if self.unknown is None else [self.unknown])}
        wrong = sorted(i for i in found if not 0 <= i < lookup.rows)
        if wrong:
            raise PipelineError(f"{self.name}: id {wrong[0]} is not in the table of {lookup.rows} tokens")
        if not found:
            raise option_error(self.name, "ids", "one id at least", "none")
        return np.array(sorted(found), np.int64)

    def _head(self, ctx: Context, lookup: Embedding) -> Linear | None:
        """The multiply that scores every token: of the table itself, or one as wide that ends in an output."""
        fitting = [x for x in ctx.get(Linears(casts=True)) if (x.out_features, x.in_features) == (lookup.rows, lookup.width) and not x.batch]
        return next((x for x in fitting if x.weight is lookup.table or _is_scores(x.output)), None)


def _translate(model: ir.Model, lookup: ir.Node, table: Array) -> None:
    """The ids of a lookup go through `table` (int64 [old vocabulary]) first."""
    inserter = Inserter(model)
    op = inserter.builder(lookup.graph)
    ids = op.Gather(inserter.constant(table, "new_ids"), lookup.inputs[1], axis=0)
    inserter.before(lookup, op)
    lookup.replace_input_with(1, ids)


def _plan(model: ir.Model, ctx: Context, lookup: Embedding, head: Linear | None, mask: Array) -> Slicing:
    s = Slicing(model, resize=[str(v.name) for v in model.graph.outputs])
    first = lookup.path[0] if lookup.path else lookup.node
    others = [e for e in ctx.get(Embeddings(casts=True)) if e.table is lookup.table and e.node is not lookup.node]
    if others:
        raise Refusal(f"`{others[0].node.name}` looks up the same table by other ids")
    s.remapped.add(lookup.node)
    if head is not None:
        s.remove(head.output, -1, mask)
    s.remove_stored(Slot(first, 0), 0, mask)
    return s


def _is_scores(value: ir.Value) -> bool:
    """True for an output of the model, perhaps capped, scaled or cast."""
    while not value.is_graph_output():
        readers = consumers(value)
        if len(readers) != 1 or readers[0].op_type not in ("Cast", "Identity", "Mul", "Div", "Tanh"):
            return False
        value = readers[0].outputs[0]
    return True


def _source(ids: ir.Value) -> ir.Value | None:
    """The graph input that ids come from, unchanged."""
    value: ir.Value | None = ids
    while value is not None and not value.is_graph_input():
        node = producer(value, "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
        value = None if node is None else node.inputs[0]
    return value if value is not None and not is_constant(value) else None


def _read(name: str, file: str) -> set[int]:
    try:
        return {int(word) for word in Path(file).read_text(encoding="utf-8").split()}
    except (OSError, ValueError) as error:
        raise option_error(name, "ids", "a file of whole numbers", f"{file}: {error}") from None


def _seen(samples: Iterable[Feeds], name: str) -> set[int]:
    found: set[int] = set()
    for feed in samples:
        found |= set(np.unique(feed[name]).tolist())
    return found
