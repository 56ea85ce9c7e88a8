"""What can be told of a number from a text: ridge regression on words and pairs of words, out of fold.

It needs no model and no GPU, and takes seconds for thousands of rows. What it cannot predict a language model may.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

FOLDS = 5
PENALTIES = (0.3, 3.0, 30.0, 300.0)
MOST_FEATURES = 20_000
WORDS = r"(?u)\b\w+\b|[^\w\s]"  # signs count: a list, a question


def out_of_fold(texts: Sequence[str], numbers: Sequence[float], groups: Sequence[object]) -> NDArray[np.float64]:
    """(n,) predictions of `numbers`, each by a regression that saw no row of the same group.

    Of PENALTIES the one with the least error out of fold. With fewer than FOLDS groups each is left out in turn; with
    one alone, and where no text has a word, the mean is all that is known.
    """
    wanted = np.asarray(numbers, dtype=np.float64)
    names = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    predicted = np.full((len(PENALTIES), len(wanted)), wanted.mean() if len(wanted) else 0.0)
    if len(names) < 2:
        return predicted[0]
    owners = np.array([names[group] for group in groups])
    for seen, left in GroupKFold(min(FOLDS, len(names))).split(wanted, groups=owners):
        predicted[:, left] = _fitted([texts[i] for i in seen], wanted[seen], [texts[i] for i in left])
    return predicted[((predicted - wanted) ** 2).sum(1).argmin()]


def r2(numbers: Sequence[float], predicted: NDArray[np.float64]) -> float:
    """1 - squared error / variance: at most 1, below 0 where the mean is the better guess, NaN where nothing varies."""
    wanted = np.asarray(numbers, dtype=np.float64)
    total = float(((wanted - wanted.mean()) ** 2).sum())
    return 1.0 - float(((wanted - predicted) ** 2).sum()) / total if total > 0 else float("nan")


def _fitted(texts: Sequence[str], numbers: NDArray[np.float64], others: Sequence[str]) -> NDArray[np.float64]:
    """(penalties, others) predictions of regressions on `texts`."""
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=WORDS, max_features=MOST_FEATURES, sublinear_tf=True)
    try:
        known = words.fit_transform(texts)
    except ValueError as error:  # no text has a word
        if "empty vocabulary" not in str(error):
            raise
        return np.full((len(PENALTIES), len(others)), numbers.mean())
    asked = words.transform(others)
    return np.stack([Ridge(alpha, solver="sparse_cg").fit(known, numbers).predict(asked) for alpha in PENALTIES])
