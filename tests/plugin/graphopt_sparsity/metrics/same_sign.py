"""same-sign: how many numbers of the output have the sign that was recorded."""

from __future__ import annotations

import dataclasses

import numpy as np

from graphopt.core.contract import NamedMetric, Session


@dataclasses.dataclass(frozen=True)
class SameSign(NamedMetric):
    """The share of the numbers of the output `of` with the sign that is recorded in `data`, a .npz file of inputs and of this output."""

    data: str = ""
    of: str = "y"

    def __call__(self, session: Session) -> float:
        with np.load(self.data) as file:
            feeds = {name: file[name] for name in file.files}
        recorded = feeds.pop(self.of)
        return float((np.sign(session.run(feeds)[self.of]) == np.sign(recorded)).mean())
