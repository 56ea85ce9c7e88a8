"""What masking must know of each token id: where words begin, which ids are full stops and commas, which are special.

All of it is read off decoded text, so that it holds for every kind of tokenizer: no prefix or id is written here. Only
of a piece of a character, which decodes to nothing, the bytes are read off its name.

In scripts without blanks each piece is a word: a text has no other mark of where words begin.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.errors import UserError

# after which the released code draws no mask; ideographic full stop, full-width comma and full stop
MARKS = (".", ",", "\u3002", "\uff0c", "\uff0e")
# first and last of the scripts written without blanks, with their punctuation
BLANKLESS = (
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x312F),  # radicals, ideographic punctuation, kana, Bopomofo
    (0x3190, 0xA4CF),  # Chinese characters, Yi
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFF9F),  # full and half width
    (0x20000, 0x3FFFF),
)
NAMED_BYTE = re.compile("<0x([0-9A-F]{2})>")
BYTES = {name: byte for byte, name in bytes_to_unicode().items()}  # what byte-level vocabularies call them


@dataclass(frozen=True)
class TokenTables:
    """Tables over the V rows of a model's output matrix.

    A word begins with the token that brings its blank. Of a blank that is a token of its own the word's first letters
    are therefore continuations: the table knows ids, not what stood before them.
    """

    # (V,) bool: begins with a blank or line end after a letter, or in a script without blanks; or is a stop or comma
    word_start: Tensor
    punctuation: Tensor  # (V,) bool: full stop or comma, bare or with its blank
    special: Tensor  # (V,) bool: never sampled, never masked; also the rows without a token
    mask_id: int  # the [MASK] that stands for masked tokens; special itself
    has_blanks: bool = True  # whether a token begins with one

    def require_words(self) -> None:
        """Raise UserError where no token marks the beginning of a word, so that words cannot be told apart."""
        if not self.has_blanks:
            raise UserError(
                "masking.span: words are to be masked, but no token of this tokenizer begins with a space, "
                "wanted a vocabulary that marks where words begin: set masking.span=token"
            )


def token_tables(tokenizer: PreTrainedTokenizerBase, size: int) -> TokenTables:
    """The tables of `tokenizer` for an output matrix of `size` rows, which may be more than it has tokens.

    Single bytes of a longer character are continuations, but for the first ones of scripts without blanks; bytes that
    are a blank or a line end themselves begin words. Padding, EOS, BOS, UNK, [MASK] and added tokens marked as special
    are special.
    """
    assert tokenizer.mask_token_id is not None, "the tokenizer has no mask token; it is chosen before the tables"
    known = set(tokenizer.get_vocab().values())
    assert max(known) < size, f"{size} rows of the output matrix, but the tokenizer has the id {max(known)}"
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary = sorted(known - added - {*tokenizer.all_special_ids})
    texts = texts_after_a_letter(tokenizer, ordinary)
    punctuation = flags(size, ordinary, [text.strip() in MARKS for text in texts])
    blanks = flags(size, ordinary, [text[:1].isspace() for text in texts])
    names = tokenizer.convert_ids_to_tokens(ordinary)
    apart = flags(size, ordinary, [blankless(text, name) for text, name in zip(texts, names, strict=True)])
    special = ~flags(size, ordinary, [True] * len(ordinary))
    starts = blanks | apart | punctuation
    return TokenTables(starts, punctuation, special, tokenizer.mask_token_id, bool((blanks & ~punctuation).any()))


def blankless(text: str, name: str) -> bool:
    """Whether a piece that adds `text` begins a character of a script without blanks; `name`: what it is called."""
    first = text[:1]
    if first in ("", "\N{REPLACEMENT CHARACTER}"):  # a part of a character
        ends = [char for last in (b"\x80", b"\xbf") if (char := first_character(name, last))]
        return len(ends) == 2 and all(map(_in_blankless, ends))
    return _in_blankless(first) and not unicodedata.category(first).startswith("M")  # signs belong to what they sign


def _in_blankless(char: str) -> bool:
    return any(start <= ord(char) <= end for start, end in BLANKLESS)


def first_character(name: str, last: bytes) -> str:
    """What begins with the bytes of a piece called `name`, completed with `last`; nothing where no character does."""
    if named := NAMED_BYTE.fullmatch(name):
        raw = bytes.fromhex(named[1])
    elif all(char in BYTES for char in name):
        raw = bytes(BYTES[char] for char in name)
    else:
        return ""
    whole = ((raw + last * missing).decode(errors="replace")[:1] for missing in range(4))
    return next((char for char in whole if char != "\N{REPLACEMENT CHARACTER}"), "")


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
