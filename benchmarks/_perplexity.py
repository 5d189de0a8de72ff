"""Perplexity of a decoder (input_ids, attention_mask -> logits) on rows of token ids."""

from __future__ import annotations

from typing import Any

import numpy as np


def feed_of(ids: Any) -> dict[str, Any]:
    """All tokens count."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def perplexity(runner: Any, rows: Any) -> float:
    """`runner`: a session of graphopt; `rows`: int64 [rows, length], each a text of its own."""
    loss, count = 0.0, 0
    for row in rows:
        logits = runner.run(feed_of(row[None]))["logits"][0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        loss -= float((logits[np.arange(len(row) - 1), row[1:]] - np.log(np.exp(logits).sum(-1))).sum())
        count += len(row) - 1
    return float(np.exp(loss / count))
