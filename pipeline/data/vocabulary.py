"""What masking must know of each token id: where words begin, which ids are full stops and commas, which are special.

All of it is read off decoded text, so that it holds for every kind of tokenizer: no prefix or id is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError

MARKS = (".", ",")  # after which the released code draws no mask


@dataclass(frozen=True)
class TokenTables:
    """Tables over the V rows of a model's output matrix.

    A word begins with the token that brings its blank. Of a blank that is a token of its own the word's first letters
    are therefore continuations: the table knows ids, not what stood before them.
    """

    word_start: Tensor  # (V,) bool: begins with a blank or line end after a letter, or is a full stop or comma
    punctuation: Tensor  # (V,) bool: full stop or comma, bare or with its blank
    special: Tensor  # (V,) bool: never sampled, never masked; also the rows without a token
    mask_id: int  # the [MASK] that stands for masked tokens; special itself

    def require_words(self) -> None:
        """Raise UserError where no token marks the beginning of a word, so that words cannot be told apart."""
        if not (self.word_start & ~self.punctuation).any():
            raise UserError(
                "masking.span: words are to be masked, but no token of this tokenizer begins with a space, "
                "wanted a vocabulary that marks where words begin: set masking.span=token"
            )


def token_tables(tokenizer: PreTrainedTokenizerBase, size: int) -> TokenTables:
    """The tables of `tokenizer` for an output matrix of `size` rows, which may be more than it has tokens.

    Single bytes of a longer character are continuations, as they decode to no blank; bytes that are a blank or a line
    end themselves begin words. Padding, EOS, BOS, UNK, [MASK] and added tokens marked as special are special.
    """
    assert tokenizer.mask_token_id is not None, "the tokenizer has no mask token; it is chosen before the tables"
    known = set(tokenizer.get_vocab().values())
    assert max(known) < size, f"{size} rows of the output matrix, but the tokenizer has the id {max(known)}"
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary = sorted(known - added - {*tokenizer.all_special_ids})
    texts = texts_after_a_letter(tokenizer, ordinary)
    punctuation = flags(size, ordinary, [text.strip() in MARKS for text in texts])
    blanks = flags(size, ordinary, [text[:1].isspace() for text in texts])
    special = ~flags(size, ordinary, [True] * len(ordinary))
    return TokenTables(blanks | punctuation, punctuation, special, tokenizer.mask_token_id)


def texts_after_a_letter(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each id adds to a text that ends with a letter: a decoder drops the blank at the beginning of a text.

    Blanks that decoding would clean up (before question marks and the like) stay. A vocabulary without a letter has
    no such text: there the ids are decoded alone.
    """
    letter = next(([i] for i in ids if tokenizer.decode([i]).strip().isalpha()), [])
    before = len(tokenizer.decode(letter)) if letter else 0
    texts = tokenizer.batch_decode([[*letter, i] for i in ids], clean_up_tokenization_spaces=False)
    return [text[before:] for text in texts]


def flags(size: int, ids: Sequence[int], values: Sequence[bool]) -> Tensor:
    """(size,) bool: `values` at `ids`, False elsewhere."""
    table = torch.zeros(size, dtype=torch.bool)
    table[torch.tensor(ids, dtype=torch.int64)] = torch.tensor(values, dtype=torch.bool)
    return table
