"""next-token: how sure a language model is of the text that really follows."""

from __future__ import annotations

import dataclasses

import numpy as np

from graphopt.core.contract import Session
from graphopt.core.errors import SampleError
from graphopt.metrics._on_data import OnData


@dataclasses.dataclass(frozen=True)
class NextToken(OnData):
    """The geometric mean of the probability of the next token, which is 1 / perplexity. It needs text, and no labels.

    Args:
        data: a .npz file or a folder of them: the inputs of the model. A token counts where `attention_mask`, if there is one, is 1 for it and
            for the one before.
        output: the name of the logits, float [batch, sequence, vocabulary]; by default the first output.
        ids: the name of the tokens, integers [batch, sequence].
    """

    ids: str = "input_ids"

    def __call__(self, session: Session) -> float:
        """Raises SampleError where the tokens are missing, or do not fit the logits."""
        total, counted = 0.0, 0
        for batch in self.batches():
            ids = self.array(batch, self.ids)
            logits = self.scores(session, batch).astype(np.float64)
            if ids.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != ids.shape:
                raise SampleError(f"{self.name}: expected logits [batch, sequence, vocabulary] for ids {list(ids.shape)}, found {list(logits.shape)}")
            mask = batch.get("attention_mask", np.ones(ids.shape)) != 0
            seen, logits = mask[:, 1:] & mask[:, :-1], logits[:, :-1]
            top = logits.max(-1, keepdims=True)
            chosen = np.take_along_axis(logits - top, ids[:, 1:, None].astype(np.int64), -1) - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            total += float(chosen[..., 0][seen].sum())
            counted += int(seen.sum())
        if not counted:
            raise SampleError(f"{self.name}: no text in {self.data} has two tokens")
        return float(np.exp(total / counted))
