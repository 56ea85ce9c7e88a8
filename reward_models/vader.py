"""How positive a text sounds, in [-1, 1]: VADER's compound score (Hutto and Gilbert, ICWSM 2014), by its lexicon.

A judge that no model was trained on, and that costs nothing: for studies. It hears tone and knows nothing of sense.
It wants the package vaderSentiment: pip install 'tiffin[vader]', or vaderSentiment alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pipeline.errors import UserError

CHATS = "text"  # chats come as text, too: see reward_models/README.md


def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """The compound score of each completion; 0 where no word of the lexicon stands in it. English only."""
    lexicon = _lexicon()
    return [lexicon.polarity_scores(text)["compound"] for text in completions]


@cache
def _lexicon() -> Any:
    """Raises UserError where the package is not installed."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("the package vaderSentiment is not installed here: pip install vaderSentiment") from None
    return SentimentIntensityAnalyzer()
