"""Which tokens are masked, against a loop over tokens; which ids begin words, for every kind of tokenizer."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5Tokenizer

from pipeline.config.schema import Masking
from pipeline.data.masking import masked_positions
from pipeline.data.vocabulary import TokenTables, blankless, token_tables
from pipeline.errors import UserError
from pipeline.models import scratch
from pipeline.tasks import assistant
from tests import tiny

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"  # real vocabularies, where there are any
SPECIAL = ["<pad>", "</s>", "<unk>", "[MASK]"]
NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "[MASK]"}
SPANS = ("token", "word", "whole_word")


def masking(**changes) -> Masking:
    """RL's masking, at the rate of the released runs."""
    return tiny.settings("rl", "algo=semi_offline").masking.model_copy(update={"rate": 0.4, **changes})


def numbers_of(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the tables


def wrapped(model: models.Model, decoder: decoders.Decoder | None, **words) -> PreTrainedTokenizerBase:
    bare = Tokenizer(model)
    if decoder is not None:
        bare.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=bare, **NAMES, **words)


def spelled(*pieces: str) -> dict[str, int]:
    return {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}


def byte_level() -> PreTrainedTokenizerBase:
    # Ċ: line end; Ã and ©: the two bytes of é
    vocab = spelled("!", "a", "Ġa", "Ġ", "Ċ", ".", "Ġ.", ",", "Ġ,", "Ġ!", "Ã", "©", "Ġ.a")
    return wrapped(models.BPE(vocab, []), decoders.ByteLevel())


def sentence_piece() -> PreTrainedTokenizerBase:
    pieces = ["▁a", "a", "▁", ".", "▁.", ",", "<0x0A>", "<0xC3>", "?", "▁?"]
    vocab = spelled(*pieces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return wrapped(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"), decoders.Sequence(steps))


def word_piece(**words) -> PreTrainedTokenizerBase:
    vocab = spelled("##b", "a", "b", ".", "##.", ",", "?", "##?", "(")
    return wrapped(models.WordPiece(vocab, unk_token="<unk>"), decoders.WordPiece(cleanup=False), **words)


def characters(*pieces: str) -> PreTrainedTokenizerBase:
    return wrapped(models.WordLevel(spelled(*pieces), unk_token="<unk>"), decoders.Fuse())


TABLES = {
    # pieces that begin words without being marks; marks; all others are continuations
    "byte_level": (byte_level, ["Ġa", "Ġ", "Ċ", "Ġ!", "Ġ.a"], [".", "Ġ.", ",", "Ġ,"]),
    "sentence_piece": (sentence_piece, ["▁a", "▁", "<0x0A>", "▁?"], [".", "▁.", ","]),
    "word_piece": (word_piece, ["a", "b", "?", "("], [".", "##.", ","]),
    # decodes "a ?" as "a?" if it may
    "cleaned_up": (lambda: word_piece(clean_up_tokenization_spaces=True), ["a", "b", "?", "("], [".", "##.", ","]),
    "characters": (lambda: characters("a", "b", " ", "\n", ".", "!"), [" ", "\n"], ["."]),
}


@pytest.mark.parametrize("name", TABLES)
def test_words_begin_where_decoding_puts_a_blank(name: str):
    make, starts, marks = TABLES[name]
    tokenizer = make()
    table = token_tables(tokenizer, len(tokenizer) + 3)

    def pieces(flags: torch.Tensor) -> set[str]:
        return set(tokenizer.convert_ids_to_tokens(flags.nonzero().flatten().tolist()))

    assert pieces(table.word_start) == {*starts, *marks}
    assert pieces(table.punctuation) == set(marks)
    assert pieces(table.special[: len(tokenizer)]) == set(SPECIAL)
    assert table.special[len(tokenizer) :].tolist() == [True] * 3  # rows of the matrix without a token
    assert table.mask_id == 3
    assert {flags.shape for flags in (table.word_start, table.punctuation, table.special)} == {(len(tokenizer) + 3,)}
    table.require_words()


def test_single_bytes():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    table = token_tables(tokenizer, len(tokenizer))
    # byte b has id b + 3; Python's blanks below 128: tab to carriage return, four separators, space
    starts = {*range(9, 14), *range(28, 32), 32, ord("."), ord(",")}
    starts |= {*range(0xE3, 0xEA)}  # with which ideographic punctuation, kana and Chinese characters begin
    assert {i - 3 for i in table.word_start.nonzero().flatten().tolist()} == starts
    assert {i - 3 for i in table.punctuation.nonzero().flatten().tolist()} == {ord("."), ord(",")}
    assert table.special.nonzero().flatten().tolist() == [0, 1, 2, *range(259, len(tokenizer))]


def test_added_and_missing_ids():
    tokenizer = characters("a", " ")
    tokenizer.add_tokens(["plain"])
    tokenizer.add_tokens(["<turn>"], special_tokens=True)  # has no role
    table = token_tables(tokenizer, 9)
    # 0-3 special; a, blank, "plain" are not; <turn> is; 8 has no token
    assert table.special.tolist() == [True] * 4 + [False] * 3 + [True] * 2
    holes = wrapped(models.WordLevel({**spelled("a"), " ": 7}, unk_token="<unk>"), decoders.Fuse())
    assert token_tables(holes, 8).special.tolist() == [True] * 4 + [False] + [True] * 2 + [False]


def test_vocabularies_without_words():
    for pieces in (["天", "地", "。", ".", ","], ["1", "2"]):
        table = token_tables(characters(*pieces), 9)
        with pytest.raises(UserError) as error:
            table.require_words()
        assert str(error.value).startswith("masking.span: ") and str(error.value).endswith("set masking.span=token")
        assert int(table.word_start.sum()) == len({"天", "地", "。", ".", ","} & set(pieces))


def test_pieces_of_scripts_without_blanks():
    """Each begins a word; so does the first piece of a character that has several, but for one of another script."""
    # the bytes of 天 (E5 A4 A9) as byte-level vocabularies call them; those of é (C3 A9); ་ ends Tibetan syllables
    begin, go_on = ["天", "公园", "。", "\uff0c", "」", "カ", "ท", "།"], ["\u0e34", "한", "é", "!", "a天", "a", "Ġ"]
    assert all(blankless(name, name) for name in begin) and not any(blankless(name, name) for name in go_on)
    parts = {"å": True, "å¤": True, "¤©": False, "Ã": False, "à\xb8": True, "à": False, "<0xE5>": True, "<0xA4>": False}
    parts["á"] = False  # of Burmese, and of Vietnamese
    assert {name: blankless("\N{REPLACEMENT CHARACTER}", name) for name in parts} == parts


def test_the_rate_in_chinese():
    """As in English: 0.4 of the characters, within 3 standard errors; no byte of one is seen after a hidden one."""
    text = "今天天气很好\uff0c我们去公园散步。我们今天在家里吃饭\uff0c然后看书。"
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
    )
    bare.train_from_iterator([text, *texts()[:40]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, **NAMES)
    table = token_tables(tokenizer, len(tokenizer))
    table.require_words()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    drawn, starts = [], table.word_start[ids]
    for seed in range(200):
        masked = masked_positions(ids, table, masking(after_punctuation=True), numbers_of(seed), spans=True)
        drawn.append(masked[starts])
        assert not (masked[:-1] & ~starts[1:] & ~masked[1:]).any()
    rate = float(torch.stack(drawn).float().mean())
    assert abs(rate - 0.4) < 3 * math.sqrt(0.4 * 0.6 / (200 * int(starts.sum())))


# --- the draw


def by_hand(ids, table: TokenTables, settings: Masking, numbers, spans: bool) -> list[bool]:
    """What `draw` does, one token at a time."""
    special, mark = [bool(table.special[i]) for i in ids], [bool(table.punctuation[i]) for i in ids]
    places = [t for t in range(len(ids)) if not special[t]]
    if spans and not settings.after_punctuation:
        places = [t for t in places if t == 0 or not mark[t - 1]]
    if settings.exact:
        chosen = sorted(places, key=lambda t: numbers[t])[: math.floor(len(places) * settings.rate + 1e-9)]
    else:
        chosen = [t for t in places if numbers[t] < settings.rate]
    masked = set(chosen)
    for t in chosen if spans else []:
        right = t + 1
        while settings.span != "token" and right < len(ids) and not (table.word_start[ids[right]] or special[right]):
            masked.add(right)
            right += 1
        left = t
        while settings.span == "whole_word" and left > 0 and not (table.word_start[ids[left]] or special[left - 1]):
            left -= 1
            masked.add(left)
    return [t in masked for t in range(len(ids))]


def random_table(generator: torch.Generator, size: int = 14) -> TokenTables:
    kinds = torch.randint(5, (size,), generator=generator)  # 0 special, 1 mark, 2 begins a word, 3 and 4 go on
    return TokenTables((kinds == 1) | (kinds == 2), kinds == 1, kinds == 0, 0)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("spans", [True, False])
def test_equals_a_loop_over_tokens(span: str, spans: bool):
    generator = numbers_of(7)
    for row in range(150):
        table = random_table(generator)
        ids = torch.randint(14, (row % 25,), generator=generator)
        rate = float(torch.rand((), generator=generator))
        rate = (0.0, 1.0, rate, rate)[row % 4]
        settings = masking(rate=rate, span=span, after_punctuation=row % 3 == 0, exact=row % 2 == 0)
        numbers = torch.rand(len(ids), generator=numbers_of(row)).tolist()
        masked = masked_positions(ids, table, settings, numbers_of(row), spans)
        assert masked.dtype == torch.bool
        assert masked.tolist() == by_hand(ids.tolist(), table, settings, numbers, spans)


WORDS = TokenTables(  # 0 special, 1 ".", 2 begins a word, 3 goes on
    word_start=torch.tensor([False, True, True, False]),
    punctuation=torch.tensor([False, True, False, False]),
    special=torch.tensor([True, False, False, False]),
    mask_id=0,
)


def test_spans_by_hand():
    ids = [3, 3, 2, 3, 3, 1, 3, 2, 0]  # two pieces, a word of three, "." and what clings to it, a word, EOS
    seed = next(s for s in range(10**5) if hits(s, len(ids)) == [3])  # the first seed that draws place 3 alone
    expected = {"token": {3}, "word": {3, 4}, "whole_word": {2, 3, 4}}
    for span, places in expected.items():
        masked = masked_positions(ids, WORDS, masking(rate=0.1, span=span), numbers_of(seed), spans=True)
        assert set(masked.nonzero().flatten().tolist()) == places
        assert masked_positions(
            ids, WORDS, masking(rate=0.1, span=span), numbers_of(seed), spans=False
        ).nonzero().tolist() == [[3]]


def hits(seed: int, length: int) -> list[int]:
    return (torch.rand(length, generator=numbers_of(seed)) < 0.1).nonzero().flatten().tolist()


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("exact", [True, False])
def test_no_rate_and_full_rate(span: str, exact: bool):
    ids = [3, 2, 3, 1, 2, 3, 1, 3, 0, 0]
    settings = masking(span=span, exact=exact)
    nothing, everything = (settings.model_copy(update={"rate": rate}) for rate in (0.0, 1.0))
    for spans in (True, False):
        assert not masked_positions(ids, WORDS, nothing, numbers_of(), spans).any()
    assert masked_positions(ids, WORDS, everything, numbers_of(), spans=False).tolist() == [True] * 8 + [False] * 2
    # on static rows not after ".": place 4 begins a word, place 7 clings to the "." and goes with it
    expected = [True] * 4 + [False] + [True] * 2 + [span != "token"] + [False] * 2
    if span == "whole_word":
        expected[4] = True  # its second piece is drawn
    assert masked_positions(ids, WORDS, everything, numbers_of(), spans=True).tolist() == expected
    after = everything.model_copy(update={"after_punctuation": True})
    assert masked_positions(ids, WORDS, after, numbers_of(), spans=True).tolist() == [True] * 8 + [False] * 2


def test_rows_with_nothing_to_draw():
    for span in SPANS:
        assert masked_positions([], WORDS, masking(rate=1.0, span=span), numbers_of(), spans=True).tolist() == []
        assert masked_positions([0], WORDS, masking(rate=1.0, span=span), numbers_of(), spans=True).tolist() == [False]
        assert masked_positions([3, 0], WORDS, masking(rate=1.0, span=span), numbers_of(), spans=True).tolist() == [
            True,
            False,
        ]


def test_exact_counts():
    # 10 tokens and EOS; one follows ".", so 9 are drawable: floor(9 * 0.4) = 3; reference rows floor(10 * 0.4) = 4
    ids = [2, 2, 3, 2, 1, 2, 3, 2, 2, 2, 0]
    for seed in range(50):
        settings = masking(exact=True, span="token")
        assert int(masked_positions(ids, WORDS, settings, numbers_of(seed), spans=True).sum()) == 3
        assert int(masked_positions(ids, WORDS, settings, numbers_of(seed), spans=False).sum()) == 4
    hundred = [2] * 100  # 100 * 0.29 is 28.999999999999996 in floating point
    assert int(masked_positions(hundred, WORDS, masking(exact=True, rate=0.29), numbers_of(), spans=True).sum()) == 29


def test_the_generator_alone_decides():
    ids = [2] * 40
    first = masked_positions(ids, WORDS, masking(), numbers_of(1), spans=True)
    torch.manual_seed(5)
    assert torch.equal(masked_positions(torch.tensor(ids), WORDS, masking(), numbers_of(1), spans=True), first)
    assert not torch.equal(masked_positions(ids, WORDS, masking(), numbers_of(2), spans=True), first)
    used, other = numbers_of(1), numbers_of(1)
    masked_positions(ids, WORDS, masking(exact=True), used, spans=False)
    torch.rand(40, generator=other)  # a row takes as many numbers as it has tokens
    assert torch.equal(used.get_state(), other.get_state())


def test_the_arguments_stay():
    ids = torch.tensor([2, 3, 1, 2, 0])
    before = ids.clone(), WORDS.special.clone()
    masked_positions(ids, WORDS, masking(rate=1.0), numbers_of(), spans=True)
    assert torch.equal(ids, before[0]) and torch.equal(WORDS.special, before[1])


# --- masks of real text


@cache
def texts() -> list[str]:
    return [" " + one.completion for one in assistant.examples("train", 1, 400)]


def learned(kind: str) -> PreTrainedTokenizerBase:
    """A vocabulary of `texts()` of at most 1,500 pieces."""
    shared = {"vocab_size": 1500, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "scratch":
        tokenizer = scratch.train_tokenizer(texts(), 4096)
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        return tokenizer
    if kind == "bpe":
        bare, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**shared)
        bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "unigram":
        bare, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(**shared, unk_token="<unk>")
        bare.pre_tokenizer, bare.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        bare, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(**shared)
        bare.normalizer, bare.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        bare.decoder = decoders.WordPiece(cleanup=False)
    bare.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bare, **NAMES)


def found(kind: str) -> PreTrainedTokenizerBase:
    """A real vocabulary from the files beside the checkout."""
    folder, opener, mask = {
        "gpt2": (REAL / "gpt2", GPT2Tokenizer, "[MASK]"),
        "t5": (REAL / "t5-v1_1", T5Tokenizer, "<extra_id_0>"),
    }[kind]
    if not folder.is_dir():
        pytest.skip(f"no vocabulary in {folder}")
    tokenizer = opener.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": mask})
    return tokenizer


KINDS = ("scratch", "bpe", "unigram", "word_piece", "gpt2", "t5")


@cache
def corpus(kind: str) -> tuple[TokenTables, list[list[int]]]:
    """The tables of a tokenizer, and the texts as ids with EOS at the end and one pad after it."""
    tokenizer = found(kind) if kind in ("gpt2", "t5") else learned(kind)
    table = token_tables(tokenizer, len(tokenizer) + 28)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = tokenizer(texts(), add_special_tokens=False)["input_ids"]
    return table, [[*ids, tokenizer.eos_token_id, pad_id] for ids in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_rates_and_rules_on_text(kind: str):
    table, rows = corpus(kind)
    table.require_words()
    generator, drawn, drawable, masked_count, ordinary_count = numbers_of(3), 0, 0, 0, 0
    for ids in rows:
        special, mark = table.special[ids], table.punctuation[ids]
        after = torch.cat([torch.tensor([False]), mark[:-1]])
        single = masked_positions(ids, table, masking(span="token"), generator, spans=True)
        assert not (single & (special | after)).any()
        drawn, drawable = drawn + int(single.sum()), drawable + int((~special & ~after).sum())
        masked = masked_positions(ids, table, masking(), generator, spans=True)
        goes_on = ~(table.word_start[ids] | special)
        assert not (masked[:-1] & goes_on[1:] & ~masked[1:]).any()  # nothing visible after something masked in a word
        assert not (masked & special).any()
        reached = torch.cat([torch.tensor([False]), masked[:-1]]) & goes_on
        assert not (masked & after & ~reached).any()
        masked_count, ordinary_count = masked_count + int(masked.sum()), ordinary_count + int((~special).sum())
    assert drawable > 5000
    assert abs(drawn / drawable - 0.4) < 3 * math.sqrt(0.4 * 0.6 / drawable)
    assert 0.3 < masked_count / ordinary_count <= 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_word_starts_are_as_many_as_words(kind: str):
    table, rows = corpus(kind)
    words = len(" ".join(texts()).split())
    begins = sum(int((table.word_start & ~table.punctuation)[ids].sum()) for ids in rows)
    if kind == "word_piece":  # apostrophes, question marks and the like stand apart there
        assert words <= begins <= 1.2 * words
    else:
        assert begins == words


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_real_vocabularies_by_id(kind: str):
    table, _ = corpus(kind)
    starts, marks = {
        # "Ġthe" 262, "Ċ" 198, "Ġ" 220, "." 13, "," 11, "Ġ." 764, "Ġ," 837; "the" 1169, "!" 0, first byte of two 127;
        # the full-width comma 16764
        "gpt2": ({262: 1, 198: 1, 220: 1, 13: 1, 1169: 0, 0: 0, 127: 0, 50256: 0}, [11, 13, 764, 837, 16764]),
        # "▁the" 8, "▁" 3, "." 5, "," 6; "s" 7, "-" 18
        "t5": ({8: 1, 3: 1, 5: 1, 6: 1, 7: 0, 18: 0, 32099: 0}, [5, 6]),
    }[kind]
    assert {i: int(table.word_start[i]) for i in starts} == starts
    assert table.punctuation.nonzero().flatten().tolist() == marks
    first_special = {"gpt2": 50256, "t5": 32000}[kind]
    assert table.special[first_special:].all() and table.special.sum() < len(table.special) - first_special + 4
    assert table.special[table.mask_id]
