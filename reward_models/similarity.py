"""How near a response is to what should have been said: the cosine of two texts' embeddings, in [-1, 1].

It wants a sentence-embedding model, so it is named by a file of yours of two lines:

    from reward_models.similarity import judged_by

    reward = judged_by("sentence-transformers/all-MiniLM-L6-v2")

and the package sentence-transformers: pip install 'tiffin[similarity]', or sentence-transformers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from pipeline.errors import UserError
from reward_models._references import References, runs


def judged_by(model: str) -> Callable[..., list[float]]:
    """A reward: a response's cosine similarity to the nearest of its row's references, by the sentence embeddings of
    `model`, a directory or a name on the hub, which is loaded at the first call, on the CPU.

    (Reimers and Gurevych, EMNLP 2019.) Raises UserError where the package is not there, ValueError for a row without a
    reference.
    """

    @cache
    def embedder() -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError("the package sentence-transformers is not installed here: pip install it") from None
        return SentenceTransformer(model, device="cpu")

    def reward(completions: Sequence[Any], references: References = None, **columns: Sequence) -> list[float]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]  # of chats messages
        values: list[float] = []
        for near, own in runs(texts, references, "similarity"):
            vectors = embedder().encode([*near, *own], normalize_embeddings=True, show_progress_bar=False)
            cosines = vectors[len(near) :] @ vectors[: len(near)].T  # (completions, references)
            values += cosines.max(axis=1).tolist()
        return values

    return reward
