"""Rows that leave the batch when they end: what they say, with what numbers, is what generate() makes of all rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import GPT2Config, MistralConfig, MistralForCausalLM, PreTrainedModel, RwkvConfig, RwkvForCausalLM
from transformers.utils import ModelOutput

from pipeline.models.policy import Policy
from pipeline.records import Example, Request
from pipeline.rollout.decode import Decoding, Spoken, decode, drops_rows, joins_rows
from pipeline.rollout.drawing import row_sampler
from pipeline.rollout.generate import generation_config, respond
from pipeline.trainer import engine
from tests import tiny
from tests.test_two_stage import LEVELS, generation, requests, speaker

SAMPLED = {"mixed temperatures": {}, "narrowed": {"top_k": 30, "top_p": 0.95}}


@contextmanager
def rows_read(lm: nn.Module) -> Iterator[list[int]]:
    """How many rows each forward reads, in its last place."""
    seen: list[int] = []
    hook = lm.register_forward_hook(lambda module, given, out: seen.append(len(out.logits)))
    yield seen
    hook.remove()


def both(speaking: engine.Engine, levels: tuple[float, ...] = LEVELS, **changes):
    """What rows that leave say, then what generate() says; and how many rows the forwards of each read."""
    found = []
    for to_end in (False, True):
        with rows_read(speaking.module.model) as seen:
            groups = respond(speaking, tiny.encoder(), requests(levels), generation(**changes), 1, to_end)
        found.append(([response for group in groups for response in group], seen))
    return found


def sliding() -> PreTrainedModel:
    """A model whose layers remember three tokens: some prompts are longer."""
    ids = {"pad_token_id": tiny.PAD_ID, "bos_token_id": 1, "eos_token_id": tiny.EOS_ID, "vocab_size": tiny.V}
    sizes = {"hidden_size": tiny.H, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = MistralConfig(**ids, **sizes, num_key_value_heads=1, sliding_window=4)
    return tiny.spread(MistralForCausalLM(config)).eval()


def ending(shape: str) -> engine.Engine:
    """A model that ends a response at each token with probability 1/7, whatever it says until then."""
    lm = sliding() if shape == "mistral" else tiny.language_model(shape)

    def end_by_chance(module: nn.Module, given: tuple, out: ModelOutput) -> None:
        out.logits[..., tiny.EOS_ID] = -torch.inf
        out.logits[..., tiny.EOS_ID] = out.logits.logsumexp(-1) - math.log(6)

    lm.register_forward_hook(end_by_chance)
    return engine.Engine(Policy(lm, 64), tiny.ranks(), tiny.train_settings(), None)


@pytest.mark.parametrize("changes", SAMPLED.values(), ids=SAMPLED)
@pytest.mark.parametrize("shape", [*tiny.SHAPES, "mistral"])
def test_sampled_responses_are_those_of_generate(shape: str, changes: dict) -> None:
    """21 rows of 7 prompts in one batch: ids alike, all numbers of them to rounding."""
    (ours, rows), (theirs, all_rows) = both(ending(shape), max_new_tokens=20, batch_size=7, **changes)
    assert [one.response_ids for one in ours] == [one.response_ids for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        tiny.close(one.stats.logps, other.stats.logps)
        tiny.close([one.stats.entropy, one.stats.confidence], [other.stats.entropy, other.stats.confidence])
        assert one.stats.batch == other.stats.batch and math.isfinite(other.stats.drop)
    assert rows[0] == 7 and len(rows) == len(all_rows)  # each prompt once, then its three rows
    assert 1.5 * sum(rows) < sum(all_rows) == 21 * len(all_rows)
    assert all(math.isnan(one.stats.drop) for one in ours)  # some rows were not drawn for to the end
    assert len({len(one.response_ids) for one in ours}) > 3


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_no_more_is_read_than_rows_that_go_on(shape: str) -> None:
    """Whenever an eighth of the rows has ended they leave: of those that are read, seven eighths say something."""
    (ours, rows), _ = both(ending(shape), max_new_tokens=20, batch_size=7)
    lengths = torch.tensor([len(one.response_ids) for one in ours])
    going = [int((lengths > step).sum()) for step in range(1, len(rows))]  # after the first token
    assert all(alive <= read < max(2, alive / 0.875 + 1) for alive, read in zip(going, rows[1:], strict=True))


@pytest.mark.parametrize("shape", ["gpt2", "t5"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_greedy_responses_are_those_of_generate(shape: str, batch_size: int) -> None:
    (ours, rows), (theirs, all_rows) = both(speaker(shape), (1.0,), do_sample=False, batch_size=batch_size)
    assert [one.response_ids for one in ours] == [one.response_ids for one in theirs]
    assert all(one.stats is None for one in ours) and sum(rows) <= sum(all_rows)


@pytest.mark.parametrize("shape", ["llama", "bart"])
def test_ends_at_once(shape: str) -> None:
    """One forward of the prompts, and nothing after it."""
    speaking = speaker(shape)
    lm = speaking.module.model

    def say_eos(module: nn.Module, given: tuple, out: ModelOutput) -> None:
        out.logits[..., tiny.EOS_ID] = 1e4

    hook = lm.register_forward_hook(say_eos)
    with rows_read(lm) as seen:
        groups = respond(speaking, tiny.encoder(), requests(), generation(batch_size=7), 1)
    hook.remove()
    assert seen == [7]
    for response in (response for group in groups for response in group):
        assert response.response_ids == (tiny.EOS_ID,) and response.finished
        assert response.stats.logps.tolist() == [0.0] and response.stats.entropy == 0.0


def test_one_new_token() -> None:
    (ours, rows), (theirs, _) = both(speaker("llama"), max_new_tokens=1, batch_size=7)
    assert [one.response_ids for one in ours] == [one.response_ids for one in theirs] and rows == [7]


def test_a_prompt_that_comes_twice_is_read_once() -> None:
    speaking, again = speaker("llama"), requests()[0]._replace(first=5)
    with rows_read(speaking.module.model) as seen:
        groups = respond(speaking, tiny.encoder(), [*requests(), again], generation(batch_size=8), 1)
    assert seen[0] == 7 and seen[1] <= 24
    alone = respond(speaking, tiny.encoder(), [again], generation(), 1)[0]
    assert [one.response_ids for one in groups[-1]] == [one.response_ids for one in alone]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_rows_that_leave_are_followed_by_others(shape: str) -> None:
    """Two prompts' rows at a time, seven prompts: read one by one, with no more padding than rows ask for."""
    speaking, widths = ending(shape), []

    def look(module: nn.Module, given: tuple, asked: dict) -> None:
        if "attention_mask" in asked:  # generate() leaves it out where there is no padding
            widths.append(asked["attention_mask"].shape[1])

    hook = speaking.module.model.register_forward_pre_hook(look, with_kwargs=True)
    (ours, rows), (theirs, all_rows) = both(speaking, max_new_tokens=20, batch_size=2)
    hook.remove()
    assert [one.response_ids for one in ours] == [one.response_ids for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        tiny.close(one.stats.logps, other.stats.logps)
        tiny.close([one.stats.entropy, one.stats.confidence], [other.stats.entropy, other.stats.confidence])
    steps = [count for count in rows if count != 1]
    assert max(rows) <= 6 and rows[:2] == [1, 1] and len(steps) < 0.8 * len(all_rows)
    assert max(widths[: len(rows)]) <= 9 + 20 < len(rows)


def test_a_row_that_has_said_all_leaves_whatever_the_others_do() -> None:
    """40 rows end at once; one goes on, and is full at the 5th token, where 40 that came after the first are not."""
    speaking = speaker("llama")
    lm, settings = speaking.module.model, generation(max_new_tokens=5)

    def end_where_asked(module: nn.Module, given: tuple, asked: dict, out: ModelOutput) -> None:
        out.logits[..., tiny.EOS_ID] = 1e4 if asked["input_ids"][0, 0] == 9 and len(out.logits) == 1 else -1e4

    hook = lm.register_forward_hook(end_where_asked, with_kwargs=True)
    how = Decoding(speaking.module, generation_config(settings, tiny.encoder(), lm), lm.device, None)
    asked = [Request(Example("", ""), ids, (1.0,) * k) for ids, k in (((9, 4), 40), ((5, 6), 1), ((7, 8), 40))]
    batches = (Spoken(how, i, [one], row_sampler([one], settings, 0, lm.device)) for i, one in enumerate(asked))
    with rows_read(lm) as seen, torch.no_grad():
        done = [*decode(how, batches, room=41)]
    hook.remove()
    assert [one.number for one in done] == [0, 1, 2] and seen == [1, 1, 1, 1, *[41] * 3, 40]
    assert (done[0].ids[:, 0] == tiny.EOS_ID).all() and all(one.sampler.steps == 5 for one in done[1:])


def test_ranks_that_are_done_keep_step() -> None:
    """Where others go on a rank makes as many forwards, of one row, and says nothing more."""
    speaking, asked = speaker("llama"), list(requests())
    lm = speaking.module.model
    settings = generation(max_new_tokens=16, do_sample=False)
    config = generation_config(settings, tiny.encoder(), lm)

    def said(asked: list[Request], most: int) -> tuple[list[list[int]], list[int]]:
        """What each row says where another rank makes `most` forwards, and how many rows the forwards read."""
        with rows_read(lm) as seen, torch.no_grad():
            how = Decoding(speaking.module, config, lm.device, lambda mine: mine or len(seen) < most)
            (spoken,) = decode(how, iter([Spoken(how, 0, asked, None)]), 0)
        rows = spoken.ids.tolist()
        return [row[: row.index(tiny.EOS_ID) + 1] if tiny.EOS_ID in row else row for row in rows], seen

    alone, _ = said(asked, 0)
    assert said(asked, 16)[0] == alone
    short = [place for place, row in enumerate(alone) if len(row) < 8]
    again, seen = said([asked[place] for place in short], 16)
    assert again == [alone[place] for place in short] and len(seen) == 16 and set(seen[8:]) == {1}


def test_which_models_and_settings_can() -> None:
    lm, plain = tiny.language_model("llama"), generation()
    assert drops_rows(lm, plain) and drops_rows(lm, generation(do_sample=False, top_k=3))
    assert joins_rows(lm) and not joins_rows(sliding()) and not joins_rows(tiny.language_model("t5"))
    others = {"num_beams": 2, "min_new_tokens": 1, "no_repeat_ngram_size": 2, "repetition_penalty": 1.1}
    assert not any(drops_rows(lm, generation(**{name: value})) for name, value in others.items())
    ids = {"vocab_size": tiny.V, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    assert not drops_rows(RwkvForCausalLM(RwkvConfig(**ids)), plain)  # remembers a state, not keys and values

    class Own(type(tiny.language_model("gpt2"))):
        """Not of transformers."""

    assert not drops_rows(Own(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=tiny.V)), plain)


def test_what_ends_a_prompt_of_another_length_does_not_matter() -> None:
    """A long prompt's padding beside a short one that goes on longest, and the other way round."""
    speaking = speaker("gpt2")
    pair = [Request(Example(str(i), ""), tuple(range(3, 3 + n)), (1.0,) * 4) for i, n in enumerate((1, 12))]
    together = respond(speaking, tiny.encoder(), pair, generation(max_new_tokens=24), 4)
    alone = [respond(speaking, tiny.encoder(), [one], generation(max_new_tokens=24), 4)[0] for one in pair]
    assert [[one.response_ids for one in group] for group in together] == [
        [one.response_ids for one in group] for group in alone
    ]
