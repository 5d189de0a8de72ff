"""What metrics over the user's own data share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from graphopt.core.contract import Array, NamedMetric, Session
from graphopt.core.errors import SampleError
from graphopt.core.options import option_error
from graphopt.core.replay import Batch
from graphopt.run.sources import Files, open_path


@dataclasses.dataclass(frozen=True)
class OnData(NamedMetric):
    """Over batches of a .npz file or a folder of them; `data` must be given. `output`: the one that is judged, by default the first."""

    data: str = ""
    output: str | None = None

    def __post_init__(self) -> None:
        """Raises PipelineError or SampleError where there are no such data: before any work, not at the first lossy pass."""
        super().__post_init__()
        if not self.data or not isinstance(open_path(Path(self.data)), Files):
            raise option_error(self.name, "data", "a .npz file or a folder of them", self.data or "nothing")

    def batches(self) -> Iterator[Batch]:
        """Read anew each time, one in memory."""
        for batch in open_path(Path(self.data)):
            assert not isinstance(batch, str)
            yield batch

    def array(self, batch: Batch, name: str) -> Array:
        """Raises SampleError where the batch has none of this name."""
        if name not in batch:
            raise SampleError(f"{self.name}: {self.data} has no array `{name}`; it has {', '.join(batch)}")
        array: Array = batch[name]
        return array

    def scores(self, session: Session, feeds: Batch) -> Array:
        """The output that is judged, of one batch.

        Raises:
            SampleError: there is none of this name.
        """
        outputs = session.run(feeds)
        name = next(iter(outputs)) if self.output is None else self.output
        if name not in outputs:
            raise SampleError(f"{self.name}: the model has no output `{name}`; it has {', '.join(outputs)}")
        if not isinstance(outputs[name], np.ndarray):
            raise SampleError(f"{self.name}: the output `{name}` is no tensor, and cannot be judged; name another one by `output`")
        scores: Array = outputs[name]
        return scores
