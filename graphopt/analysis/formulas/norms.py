"""A layer or RMS norm in elementwise operators, from the mean of squares on: what is normalized, and what scales and shifts it.

The variance is mean((x - mean)^2), or mean(x^2) - mean^2 (with or without a floor of 0), or mean(x^2) alone. The quotient is
(x - mean) / root, the same with a scale that the root was multiplied by first, or x * scale + (shift - mean * scale).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.graph.questions import consumers, producer, scalar


@dataclasses.dataclass(frozen=True)
class NormFormula:
    """numerator / sqrt(variance + epsilon) [* gamma [+ beta]]: `path` computes it from the mean of squares on, `side` what else it reads.

    Attributes:
        centered: the numerator is x - mean(x), and not x itself.
        epsilon: None where it is not one constant number; `epsilon_name` is its name.
        gamma, beta: what the spelling itself has folded into the quotient. More may follow `path`.
    """

    x: ir.Value
    centered: bool
    epsilon: float | None
    epsilon_name: str
    path: tuple[ir.Node, ...]
    side: tuple[ir.Node, ...]
    gamma: ir.Value | None = None
    beta: ir.Value | None = None


def norm_of(mean: ir.Node, square: ir.Node) -> NormFormula | None:
    """The norm whose variance is the ReduceMean `mean` of the node `square`, or None."""
    numerator = square.inputs[0]
    if numerator is None:
        return None
    x, center = _centered(numerator)
    side: list[ir.Node] = []
    path = [mean]
    if center is not None:
        side += [center, numerator.producer()]  # type: ignore[list-item]
    elif (less := _less_square(mean, x)) is not None:
        difference, squared, center = less
        side += [center, squared]
        path.append(difference)
    floor = only_reader(path[-1], "Max", "Relu", "Clip")
    if floor is not None and center is not None and _floors_at_zero(floor, path[-1].outputs[0]):
        path.append(floor)
    variance = path[-1].outputs[0]
    add = only_reader(path[-1], "Add")
    root = None if add is None else only_reader(add, "Sqrt", "Pow")
    if add is None or root is None:
        return None
    epsilon = other_operand(add, variance)
    number = scalar(epsilon)
    formula = NormFormula(x, center is not None, None if number is None else float(number), str(epsilon and epsilon.name), (*path, add), tuple(side))
    return _Quotient(formula, center).of(root)


def square_of(node: ir.Node) -> ir.Node | None:
    """The node that squares (or raises to another constant power) what `node` averages."""
    square = producer(node.inputs[0], "Mul", "Pow")
    if square is None:
        return None
    if square.op_type == "Mul":
        return square if square.inputs[0] is square.inputs[1] else None
    return square if scalar(square.inputs[1]) is not None else None


def only_reader(node: ir.Node, *op_types: str) -> ir.Node | None:
    """The only node that reads the output of `node`, in the same graph, if it is one of `op_types`. (The driver sees to public outputs.)"""
    uses = list(node.outputs[0].uses())
    reader = uses[0].node if len(uses) == 1 else None
    return reader if reader is not None and reader.graph is node.graph and reader.domain == "" and reader.op_type in op_types else None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _centered(value: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """(x, the mean) if the value is x minus a mean of x; else (the value, None)."""
    difference = producer(value, "Sub")
    mean = None if difference is None else producer(difference.inputs[1], "ReduceMean")
    if difference is None or mean is None or mean.inputs[0] is not difference.inputs[0] or difference.inputs[0] is None:
        return value, None
    return difference.inputs[0], mean


def _less_square(mean: ir.Node, x: ir.Value) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """mean(x^2) - mean(x)^2: the Sub, the square and the mean."""
    difference = only_reader(mean, "Sub")
    squared = None if difference is None or difference.inputs[0] is not mean.outputs[0] else producer(difference.inputs[1], "Mul", "Pow")
    if difference is None or squared is None or (squared.op_type == "Pow" and scalar(squared.inputs[1]) != 2):
        return None
    center = producer(squared.inputs[0], "ReduceMean")
    if center is None or center.inputs[0] is not x or (squared.op_type == "Mul" and squared.inputs[1] is not squared.inputs[0]):
        return None
    return difference, squared, center


def _floors_at_zero(node: ir.Node, value: ir.Value) -> bool:
    """Max(value, 0), Relu or Clip from 0 on: it undoes what rounding may do to a difference of squares."""
    if node.op_type == "Relu":
        return True
    if node.op_type == "Max":
        return len(node.inputs) == 2 and scalar(other_operand(node, value)) == 0
    low, high = (*node.inputs[1:], None, None)[:2]
    return node.inputs[0] is value and scalar(low) == 0 and high is None


@dataclasses.dataclass(frozen=True)
class _Quotient:
    """Follows the root of a variance down to the normalized value."""

    formula: NormFormula
    center: ir.Node | None

    def of(self, root: ir.Node) -> NormFormula | None:
        exponent = 0.5 if root.op_type == "Sqrt" else scalar(root.inputs[1])
        if exponent == -0.5:
            return self._times(root, (root,))
        if exponent != 0.5:
            return None
        inverse = only_reader(root, "Reciprocal", "Div")
        if inverse is None:
            return None
        if inverse.op_type == "Reciprocal" or (scalar(inverse.inputs[0]) == 1 and inverse.inputs[1] is root.outputs[0]):
            return self._times(inverse, (root, inverse))
        if inverse.inputs[1] is not root.outputs[0] or inverse.inputs[0] is None:
            return None
        if self._is_numerator(inverse.inputs[0]):
            return self._whole((root, inverse), inverse.inputs[0])
        return self._times(inverse, (root, inverse), inverse.inputs[0])  # gamma / root

    def _times(self, scale: ir.Node, path: tuple[ir.Node, ...], gamma: ir.Value | None = None) -> NormFormula | None:
        """The products of the numerator and `scale`, which is 1 / root, times `gamma`."""
        product = only_reader(scale, "Mul")
        if product is None:
            return self._apart(scale, path, gamma)
        operand = other_operand(product, scale.outputs[0])
        if operand is None or operand is scale.outputs[0]:
            return None
        if self._is_numerator(operand):
            return self._whole((*path, product), operand, gamma)
        return self._times(product, (*path, product), operand) if gamma is None else None

    def _apart(self, scale: ir.Node, path: tuple[ir.Node, ...], gamma: ir.Value | None) -> NormFormula | None:
        """x * scale + (beta - mean * scale), or x * scale - mean * scale."""
        made = scale.outputs[0]
        products = [n for n in consumers(made) if n.op_type == "Mul" and n.domain == "" and n.graph is scale.graph]
        if len(products) != 2 or len(made.uses()) != 2 or self.center is None:
            return None
        operands = [other_operand(n, made) for n in products]
        whole = next((n for n, v in zip(products, operands, strict=True) if v is self.formula.x), None)
        center = next((n for n, v in zip(products, operands, strict=True) if self._is_mean(v)), None)
        shift = None if center is None else only_reader(center, "Sub")
        if whole is None or center is None or shift is None or shift.inputs[1] is not center.outputs[0]:
            return None
        side = producer(other_operand(center, made))
        if shift.inputs[0] is whole.outputs[0]:
            return self._end((*path, whole, center, shift), side, gamma)
        total = only_reader(shift, "Add")
        if total is None or other_operand(total, shift.outputs[0]) is not whole.outputs[0]:
            return None
        return self._end((*path, whole, center, shift, total), side, gamma, shift.inputs[0])

    def _is_numerator(self, value: ir.Value) -> bool:
        if self.center is None:
            return value is self.formula.x
        x, mean = _centered(value)
        return mean is not None and x is self.formula.x

    def _is_mean(self, value: ir.Value | None) -> bool:
        mean = producer(value, "ReduceMean")
        return mean is not None and mean.inputs[0] is self.formula.x

    def _whole(self, path: tuple[ir.Node, ...], numerator: ir.Value, gamma: ir.Value | None = None) -> NormFormula:
        difference = numerator.producer() if self.center is not None else None
        mean = None if difference is None else producer(difference.inputs[1])
        return dataclasses.replace(self._end(path, mean, gamma), side=tuple(n for n in (*self.formula.side, difference, mean) if n is not None))

    def _end(self, path: tuple[ir.Node, ...], side: ir.Node | None, gamma: ir.Value | None, beta: ir.Value | None = None) -> NormFormula:
        more = () if side is None else (side,)
        return dataclasses.replace(self.formula, path=(*self.formula.path, *path), side=(*self.formula.side, *more), gamma=gamma, beta=beta)
