"""How telling the words of a response are, by TF-IDF: a reward for diversity, as in A-LOL's runs on dialogue.

It wants responses from which it learns how common each word is, so it is named by a file of yours of two lines:

    from reward_models.tfidf import learned_from

    reward = learned_from("rows/train.jsonl", "completion")

A stage that goes on, and what is cached of rewards, know your file, and the rows if they are among the data too. With
other rows in a file of the same name give yours another name, or V and samples stay those of the words before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from pipeline.data.files import raw_rows
from pipeline.errors import UserError

FEW, WHOLE = 5, 10  # a response of fewer than FEW known words gets a share of them in WHOLE: one rare word is no answer


def learned_from(file: str, column: str = "completion") -> Callable[..., list[float]]:
    """A reward that knows the words of the responses in `column` of a file of rows, which is read at the first call.

    It is the mean of a response's TF-IDF values over its different words, times n / 10 where it has n < 5 that occur in
    the file: in 0 .. 1, around 1 / sqrt(n). Words are of two letters or more, inverse frequencies smoothed, as
    scikit-learn does. Rows without a text are left out; a UserError if all are.
    """

    @cache
    def vectorizer() -> TfidfVectorizer:
        texts = [text for row in raw_rows(file) if isinstance(text := row.columns.get(column), str)]
        if not texts:
            raise UserError(f"{file}: no row has a text in the column {column!r}, wanted responses to learn words from")
        return TfidfVectorizer().fit(texts)

    def reward(completions: Sequence[Any], **columns: Sequence) -> list[float]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]  # of chats messages
        return _values(vectorizer(), texts)

    return reward


def _values(vectorizer: TfidfVectorizer, texts: Sequence[str]) -> list[float]:
    """One per text; 0 for one without a known word."""
    found = vectorizer.transform(texts)  # (B, words)
    words, sums = np.diff(found.indptr), np.asarray(found.sum(axis=1)).ravel()  # (B,)
    means = sums / np.maximum(words, 1)
    return np.where(words < FEW, means * words / WHOLE, means).tolist()
