"""How many attention blocks a torch model computes: seen on the operators of one forward pass, whatever module they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

_KEEPS = {  # operators behind which a value still counts as scores, or as probabilities
    "mul", "div", "add", "sub", "rsub", "masked_fill", "where", "tanh", "view", "_unsafe_view", "reshape", "clone", "expand", "_to_copy", "slice",
    "unsqueeze", "squeeze", "transpose", "permute", "contiguous", "detach", "alias", "maximum", "clamp", "nan_to_num", "dropout", "native_dropout",
    "copy_", "add_", "mul_", "div_", "masked_fill_", "sub_", "gather", "cat", "constant_pad_nd", "as_strided", "clamp_min", "select", "flip",
}  # fmt: skip
_PRODUCTS = {"bmm", "baddbmm", "matmul"}
_SOFTMAX = {"_softmax", "_safe_softmax", "softmax"}


def blocks(call: Any) -> tuple[int, Any]:
    """(attention blocks that reach what `call()` gives, what it gives). A block is softmax(product, changed elementwise) times a third operand."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.scores: set[int] = set()
            self.shares: dict[int, int] = {}  # tensor -> softmax whose probabilities it holds
            self.reach: dict[int, frozenset[int]] = {}  # tensor -> blocks that it depends on
            self.alive: list[Any] = []  # so that no id is used twice
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            name = func._schema.name.split("::")[1]
            self.alive += [*given, *made]
            reach = frozenset[int]().union(*(self.reach.get(id(t), frozenset()) for t in given))
            written = made if not name.endswith("_") else [*made, *given[:1]]
            if name.startswith("_scaled_dot_product") or name in _PRODUCTS:
                reach |= self._product(name, given)
            if name in _PRODUCTS:
                self.scores |= {id(t) for t in made}
            elif name in _SOFTMAX and id(given[0]) in self.scores:
                self.count += 1
                self.shares |= {id(t): self.count for t in made}
            elif name in _KEEPS:
                self._follow(given, written)
            for tensor in written:
                self.reach[id(tensor)] = reach | self.reach.get(id(tensor), frozenset())
            return out

        def _product(self, name: str, given: list[Any]) -> frozenset[int]:
            if name not in _PRODUCTS:
                self.count += 1
                return frozenset([self.count])
            return frozenset(self.shares[id(t)] for t in given if id(t) in self.shares)

        def _follow(self, given: list[Any], made: list[Any]) -> None:
            if any(id(t) in self.scores for t in given):
                self.scores |= {id(t) for t in made}
            shares = [self.shares[id(t)] for t in given if id(t) in self.shares]
            if shares:
                self.shares |= {id(t): shares[0] for t in made}

        def reaching(self, results: Iterable[Any]) -> int:
            return len(frozenset[int]().union(*(self.reach.get(id(t), frozenset()) for t in results)))

    watch = Watch()
    with torch.no_grad(), watch:
        result = call()
    return watch.reaching(t for t in tree_leaves(result) if isinstance(t, torch.Tensor)), result


def apart(first: Any, second: Any) -> float:
    """The largest difference between two tuples of tensors, relative to the largest number."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return math.inf
        if a.numel() and a.is_floating_point():
            worst = max(worst, float((a - b).abs().nan_to_num().max() / (1e-9 + b.abs().nan_to_num().max())))
    return worst
