"""accuracy: how often the largest score is that of the right class."""

from __future__ import annotations

import dataclasses

from graphopt.core.contract import Session
from graphopt.core.errors import SampleError
from graphopt.metrics._on_data import OnData


@dataclasses.dataclass(frozen=True)
class Accuracy(OnData):
    """The share of labels whose class has the largest score.

    Args:
        data: a .npz file or a folder of them: the inputs of the model, and beside them the labels.
        output: the name of the scores, float [..., classes]; by default the first output.
        labels: the name of the labels, integers of the shape of the scores without classes; one below 0 (such as -100) does not count.
    """

    labels: str = "labels"

    def __call__(self, session: Session) -> float:
        """Raises SampleError where labels are missing, or do not fit the scores."""
        right = counted = 0
        for batch in self.batches():
            labels = self.array(batch, self.labels)
            scores = self.scores(session, {name: array for name, array in batch.items() if name != self.labels})
            if scores.shape[:-1] != labels.shape:
                raise SampleError(
                    f"{self.name}: expected labels {list(scores.shape[:-1])} for scores {list(scores.shape)}, found {list(labels.shape)}"
                )
            right += int(((scores.argmax(-1) == labels) & (labels >= 0)).sum())
            counted += int((labels >= 0).sum())
        if not counted:
            raise SampleError(f"{self.name}: every label in {self.data} is below 0, and counts nowhere")
        return right / counted
