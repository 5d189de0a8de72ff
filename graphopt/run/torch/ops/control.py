"""Control flow in Python, which reads its conditions, and sequences of tensors, which are lists. A body gives a list of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.core.errors import TargetError
from graphopt.run.torch.table import enter, op
from graphopt.run.torch.types import Tensor, integers

Body = Callable[..., list[Tensor]]


@op("If")
def if_(condition: Tensor, *, then_branch: Body, else_branch: Body) -> tuple[Tensor, ...]:
    return tuple(then_branch() if bool(condition) else else_branch())


@op("Loop")
def loop(count: Tensor | None, condition: Tensor | None, *carried: Tensor, body: Body, _outputs: int) -> tuple[Tensor, ...]:
    limit = None if count is None else int(count)
    going, step, state = condition is None or bool(condition), 0, list(carried)
    scans: list[list[Tensor]] = [[] for _ in range(_outputs - len(carried))]
    while going and (limit is None or step < limit):
        again, *results = body(torch.tensor(step, dtype=torch.int64), torch.tensor(True), *state)
        state, made = results[: len(carried)], results[len(carried) :]
        for scan, value in zip(scans, made, strict=False):
            scan.append(value)
        going, step = bool(again), step + 1
    if scans and not step:
        raise TargetError("a Loop ran 0 times: the shape of what it collects is unknown here; run this model by graphopt.run.ort")
    return (*state, *(torch.stack(scan) for scan in scans))


@op("Scan")
def scan(
    *inputs: Tensor,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: list[int] | None = None,
    scan_input_directions: list[int] | None = None,
    scan_output_axes: list[int] | None = None,
    scan_output_directions: list[int] | None = None,
) -> tuple[Tensor, ...]:
    carried = len(inputs) - num_scan_inputs
    state, sequences = list(inputs[:carried]), inputs[carried:]
    axes, backward = scan_input_axes or [0] * num_scan_inputs, scan_input_directions or [0] * num_scan_inputs
    rows = [x.unbind(axis)[::-1] if back else x.unbind(axis) for x, axis, back in zip(sequences, axes, backward, strict=True)]
    made: list[list[Tensor]] = []
    for step in zip(*rows, strict=True):
        results = body(*state, *step)
        state = results[:carried]
        made = made or [[] for _ in results[carried:]]
        for column, value in zip(made, results[carried:], strict=True):
            column.append(value)
    out_axes, out_back = scan_output_axes or [0] * len(made), scan_output_directions or [0] * len(made)
    stacked = [torch.stack(column[::-1] if back else column, axis) for column, axis, back in zip(made, out_axes, out_back, strict=True)]
    return (*state, *stacked)


# ---- sequences of tensors: Python lists ---------------------------------------------------------------------------------------------------


enter(
    {
        "SequenceConstruct": lambda *parts: list(parts),
        "SequenceEmpty": lambda *, dtype=1: [],
        "SequenceAt": lambda sequence, position: sequence[int(position)],
        "SequenceLength": lambda sequence: torch.tensor(len(sequence), dtype=torch.int64),
        "ConcatFromSequence": lambda sequence, *, axis, new_axis=0: torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis),
    }
)


@op("SequenceInsert")
def sequence_insert(sequence: list[Tensor], x: Tensor, position: Tensor | None = None) -> list[Tensor]:
    place = len(sequence) if position is None else int(position)
    return [*sequence[:place], x, *sequence[place:]]


@op("SequenceErase")
def sequence_erase(sequence: list[Tensor], position: Tensor | None = None) -> list[Tensor]:
    gone = (-1 if position is None else int(position)) % len(sequence)
    return sequence[:gone] + sequence[gone + 1 :]


@op("SplitToSequence")
def split_to_sequence(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    if sizes is None:
        parts = torch.split(x, 1, axis)
        return list(parts) if keepdims else [part.squeeze(axis) for part in parts]
    return list(torch.split(x, integers(sizes) if sizes.dim() else int(sizes), axis))
