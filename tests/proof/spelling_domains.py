"""Random spellings of norms as other exporters write them, and of scales and shifts behind a product; and what is nearly that."""

from __future__ import annotations

from equivalence import Graph  # type: ignore[import-not-found]


def folded_norm(g: Graph) -> None:
    """A variance as a difference of squares or centered, with or without a floor; gamma in the root, and the mean in the shift."""
    shape = (*g.pick(("a",), ("a", "b")), 4)
    x, axes = g.input(*shape), g.ints(-1)
    mean = g.add("ReduceMean", x, axes)
    if g.chance(0.6):
        other = g.add("ReduceMean", g.add("Abs", x), axes) if g.chance(0.1) else mean
        variance = g.add("Sub", g.add("ReduceMean", g.add("Mul", x, x), axes), g.add("Mul", other, other))
        floor = g.pick("none", "Max", "Relu", "Clip")
        if floor != "none":
            variance = g.add(floor, variance, *([g.const(0.0 if g.chance(0.9) else 0.5)] if floor != "Relu" else []))
    else:
        d = g.add("Sub", x, mean)
        variance = g.add("ReduceMean", g.add("Mul", d, d), axes)
    total = g.add("Add", variance, g.const(g.pick(1e-3, 0.1)))
    gamma, beta = g.const(g.rng.standard_normal(g.pick([4], [1, 4], [1]))), g.const(g.rng.standard_normal([4]))
    if g.chance(0.3):
        scale = g.add("Div", gamma, g.add("Sqrt", total))
    else:
        root = g.add("Pow", total, g.const(-0.5)) if g.chance(0.3) else g.add("Reciprocal", g.add("Sqrt", total))
        scale = g.add("Mul", *((root, gamma) if g.chance() else (gamma, root))) if g.chance(0.8) else root
    if g.chance():
        out = g.add("Mul", g.add("Sub", x, mean), scale)
        out = g.add("Add", out, beta) if g.chance(0.8) else out
    else:
        shift = g.add("Mul", mean if g.chance(0.95) else g.add("ReduceMean", g.add("Abs", x), axes), scale)
        whole = g.add("Mul", x, scale)
        out = g.add("Add", whole, g.add("Sub", beta, shift)) if g.chance(0.8) else g.add("Sub", whole, shift)
    g.output(g.add("Neg", out))


def affine(g: Graph) -> None:
    """A product with a stored weight, then constants for all channels, for each, or for something else, and batch normalization."""
    kind = g.pick("Conv", "Conv", "ConvTranspose", "MatMul", "Gemm")
    channels, groups = 4, g.pick(1, 2) if kind == "Conv" else 1  # the reference has no groups in ConvTranspose
    if kind in ("Conv", "ConvTranspose"):
        shape = [channels, 4 // groups, 3] if kind == "Conv" else [4, channels // groups, 3]
        bias = [g.const(g.rng.standard_normal(channels))] if g.chance() else []
        value = g.add(kind, g.input("a", 4, 6), g.const(g.rng.standard_normal(shape)), *bias, group=groups)
        each, rank, axis = [channels, 1], 3, 1
    elif kind == "MatMul":
        rank = g.pick(2, 3)
        value = g.add("MatMul", g.input(*("a", "b")[: rank - 1], 3), g.const(g.rng.standard_normal([3, channels])))
        each, axis = [channels], rank - 1
    else:
        swapped = g.pick(0, 1)
        weight = g.const(g.rng.standard_normal([channels, 3] if swapped else [3, channels]))
        bias = [g.const(g.rng.standard_normal(g.pick([channels], [1, channels], [1])))] if g.chance() else []
        value = g.add("Gemm", g.input("a", 3), weight, *bias, transB=swapped, alpha=g.pick(1.0, 0.5), beta=g.pick(1.0, 2.0))
        each, rank, axis = [channels], 2, 1
    for _ in range(int(g.rng.integers(1, 4))):
        if g.chance(0.3) and (rank == 2 or axis == 1):
            numbers = [g.const(g.rng.standard_normal(channels)) for _ in range(3)] + [g.const(g.rng.random(channels) + 0.1)]
            value = g.add("BatchNormalization", value, *numbers, epsilon=g.pick(1e-5, 0.1))
            continue
        sizes = g.pick(each, each, [1, *each], [1], [], [2, *[1] * (rank - 1), *each][: rank + 1] if g.chance(0.1) else each)
        other = g.const(g.rng.standard_normal(sizes) + 3)
        op = g.pick("Add", "Sub", "Mul", "Div")
        value = g.add(op, *((value, other) if g.chance(0.8) else (other, value)))
        if g.chance(0.1):
            g.output(g.add("Neg", value))  # something else reads it
    g.output(g.add("Abs", value))
