"""How many rows (tokens) of the samples a fit needs. What fewer rows reach is not fitted to them, and a remark says so.

n rows of K numbers have second moments of rank n at most. Along the other K - n directions a fit has nothing but its ridge to go by, which holds as
long as n is no small part of K: factors of MiniLM at a given rank are still better from 16 rows than without any (cosine 0.50 beside 0.45, at 384 and
1,536 features). A rank or an error, though, that is read off the moments is at most n, and 0, whatever is there (0.11 beside 0.56, at energy=0.95).
"""

from __future__ import annotations

import math

_PART = 16  # a fit needs a row for so many features
_LEAST = 2  # one row is always its own mean


def too_few(rows: int, features: int, *, ranks: bool = False) -> str | None:
    """Why nothing is fitted to so many rows; None where they are enough.

    Args:
        features: K, the numbers of a row; 1 for what all numbers of all rows decide together, such as a range.
        ranks: the rank or the error of the moments themselves is read, which wants K rows.
    """
    need = max(_LEAST, features if ranks else math.ceil(features / _PART))
    if rows >= need:
        return None
    of = f"its {features} features" if features > 1 else "it"
    return f"the samples show {rows} row{'' if rows == 1 else 's'} of {of}, and {need} are needed; add samples that reach it"
