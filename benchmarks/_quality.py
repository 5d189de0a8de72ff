"""Quality of a sentence encoder: a linear probe on movie reviews, cosine to the embeddings of another model, and agreement with people.

Pearson on the 50 Lee documents hardly notices damage (its 95 % interval is some 5 %), so that it never stands alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _models
import numpy as np

from graphopt.cli import demo_race as demo
from graphopt.run import race as bench
from graphopt.run.ort import session as ort_session

Array = np.ndarray[Any, Any]
FOLDS, MAX_TOKENS, BATCH = 10, 128, 32
UNDECIDED = 0.5  # reviews whose mean rating lies nearer to 0 have no label


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of one model beside a reference. `probe`: accuracy; `loss`: its relative fall, with the standard error of the paired difference."""

    probe: float
    loss: float
    error: float
    cosine: float
    pearson: float


@dataclasses.dataclass(frozen=True)
class Judge:
    """Everything that does not depend on the model: made once by `judge`.

    Attributes:
        texts, labels: reviews, and whether people found them positive (bool [reviews]).
        documents, human: the Lee documents and their [50, 50] human similarity.
        base: unit embeddings of the reference model, of the reviews and then of the documents.
        right: bool [reviews], where the probe of the reference model is right.
    """

    texts: tuple[str, ...]
    labels: Array
    documents: tuple[str, ...]
    human: Array
    base: Array
    right: Array

    def of(self, model: Any) -> Quality:
        """Of a model, given as a file or a session; embeds all texts once (about a minute in float32 on one core)."""
        return self.of_embeddings(embed(model, (*self.texts, *self.documents)))

    def of_embeddings(self, found: Array) -> Quality:
        count = len(self.texts)
        right = probe(found[:count], self.labels)
        loss, error = paired_loss(self.right, right)
        return Quality(float(right.mean()), loss, error, cosine(self.base[:count], found[:count]), demo.pearson(found[count:], self.human))


def judge(model: Any, file: Path, *, limit: int | None = None) -> Judge:
    """`model`: the reference, a file or a session; `file`: lines of mean rating, tab, review; `limit`: so many reviews, evenly picked."""
    texts, labels = reviews(file, limit)
    documents, human = demo._lee()
    base = embed(model, (*texts, *documents))
    return Judge(tuple(texts), labels, tuple(documents), human, base, probe(base[: len(texts)], labels))


def reviews(file: Path, limit: int | None = None) -> tuple[list[str], Array]:
    """Texts and labels, without the undecided ones."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        rating, _, text = line.partition("\t")
        if abs(float(rating)) >= UNDECIDED:
            found.append((text, float(rating) > 0))
    if limit is not None and limit < len(found):
        found = [found[k] for k in np.linspace(0, len(found) - 1, limit).astype(int)]
    return [text for text, _ in found], np.array([positive for _, positive in found])


def embed(model: Any, texts: Sequence[str]) -> Array:
    """Unit-length embeddings [texts, hidden] of the mean over tokens, in batches of texts of like length; `model`: a file or a session."""
    session = ort_session(Path(model), threads=1) if isinstance(model, (str, Path)) else model
    runner = session if isinstance(session, bench.Picky) else bench.Picky(session)  # an input that the model lacks is not fed
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    parts = [
        demo.embed(runner, _models.minilm_folder() / "tokenizer.json", [texts[k] for k in order[first : first + BATCH]])
        for first in range(0, len(order), BATCH)
    ]
    made = np.concatenate(parts)
    found = np.empty_like(made)
    found[order] = made
    return found


def probe(embeddings: Array, labels: Array) -> Array:
    """Where a logistic regression on frozen embeddings is right about texts that it was not fitted on: bool [texts], by 10 folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(LogisticRegression(C=10.0, max_iter=1000), embeddings, labels, cv=folds)
    right: Array = predicted == labels
    return right


def paired_loss(base: Array, right: Array) -> tuple[float, float]:
    """Relative fall of the accuracy, and its standard error over the texts, which both models judged."""
    difference = base.astype(np.float64) - right.astype(np.float64)
    return float(difference.mean() / base.mean()), float(difference.std(ddof=1) / math.sqrt(len(base)) / base.mean())


def cosine(base: Array, found: Array) -> float:
    """Mean cosine of unit embeddings [texts, hidden]."""
    return float((base * found).sum(-1).mean())
