"""Generation: batches say what each prompt alone would, in order, seeded, without the checkpoint's own habits."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.models.policy import Policy
from pipeline.records import Example
from pipeline.rollout.generate import generate, generation_config
from pipeline.trainer import engine
from tests import tiny

PROMPTS = [Example(str(i), " ".join(tiny.WORDS[i % 4 : 2 + 3 * i % 11])) for i in range(7)]


def speaker(shape: str) -> engine.Engine:
    """A random model that ends many responses: EOS has a large embedding, so a large or small logit (but for BART)."""
    lm = tiny.language_model(shape)
    with torch.no_grad():
        lm.get_output_embeddings().weight[tiny.EOS_ID] *= 1.0 if shape == "bart" else 4.0
    return engine.Engine(Policy(lm, 64), tiny.ranks(), tiny.train_settings(), None)


def generation(**changes):
    usual = {"max_new_tokens": 8, "batch_size": 3, "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return tiny.settings("rl").generation.model_copy(update={**usual, **changes})


def ids_of(answers) -> list[tuple[int, ...]]:
    return [answer.response_ids for answer in answers]


def alone(policy: Policy, example: Example) -> tuple[int, ...]:
    """Greedy decoding of one prompt by transformers, without padding."""
    prompt = torch.tensor([tiny.encoder().encode_prompt(example.prompt)[0]])
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=tiny.EOS_ID, pad_token_id=tiny.PAD_ID)
    if policy.encoder_decoder:
        (config.decoder_start_token_id,) = policy.start_ids
    out = policy.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0].tolist()
    return tuple(out[1:] if policy.encoder_decoder else out[prompt.shape[1] :])


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_greedy_batches_are_each_prompt_alone(shape: str) -> None:
    speaking = speaker(shape)
    answers = generate(speaking, tiny.encoder(), PROMPTS, generation(), seed=0)
    assert [answer.example for answer in answers] == PROMPTS
    wanted = [alone(speaking.module, example) for example in PROMPTS]
    assert ids_of(answers) == wanted
    assert {len(tiny.encoder().encode_prompt(e.prompt)[0]) for e in PROMPTS} > {2, 3}  # there was padding
    assert len(set(wanted)) > 2  # and the answers depend on the prompts


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_eos_belongs_to_the_response_and_ends_it(shape: str) -> None:
    answers = generate(
        speaker(shape),
        tiny.encoder(),
        PROMPTS,
        generation(do_sample=True, max_new_tokens=20, num_return_sequences=4),
        1,
    )
    finished = [answer.finished for answer in answers]
    assert any(finished) and not all(finished)
    for answer in answers:
        assert answer.response_ids.count(tiny.EOS_ID) == answer.finished
        assert answer.finished == (answer.response_ids[-1] == tiny.EOS_ID)
        assert answer.finished or len(answer.response_ids) == 20
        assert "</s>" not in answer.text
        assert answer.prompt_ids == tiny.encoder().encode_prompt(answer.example.prompt)[0]


def test_pad_may_be_eos() -> None:
    inner = tiny.tokenizer()._tokenizer
    odd = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="</s>", eos_token="</s>", bos_token="<s>")
    encoder = Encoder(odd, tiny.PLAIN, 64, 64)
    assert encoder.pad_id == encoder.eos_id
    speaking = speaker("gpt2")
    answers = generate(speaking, encoder, PROMPTS, generation(), seed=0)
    assert ids_of(answers) == [alone(speaking.module, example) for example in PROMPTS]


def test_sampling_is_a_function_of_the_seed() -> None:
    speaking, sampled = speaker("llama"), generation(do_sample=True, num_return_sequences=3)
    before = torch.get_rng_state()
    first = generate(speaking, tiny.encoder(), PROMPTS, sampled, seed=5)
    assert torch.equal(torch.get_rng_state(), before)  # the program's own randomness is not touched
    torch.rand(10)
    assert ids_of(generate(speaking, tiny.encoder(), PROMPTS, sampled, seed=5)) == ids_of(first)
    assert ids_of(generate(speaking, tiny.encoder(), PROMPTS, sampled, seed=6)) != ids_of(first)
    assert [answer.example for answer in first] == [example for example in PROMPTS for _ in range(3)]
    assert len(set(ids_of(first[:3]))) == 3


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6}])
def test_sampled_tokens_have_the_models_frequencies(changes: dict) -> None:
    speaking, count = speaker("llama"), 4000
    one = generation(do_sample=True, max_new_tokens=1, num_return_sequences=count, **changes)
    drawn = torch.tensor([a.response_ids[0] for a in generate(speaking, tiny.encoder(), PROMPTS[2:3], one, 0)])
    prompt = torch.tensor([tiny.encoder().encode_prompt(PROMPTS[2].prompt)[0]])
    with torch.no_grad():
        wanted = (speaking.module.model(prompt).logits[0, -1] / changes.get("temperature", 1.0)).softmax(-1)
    order = wanted.argsort(descending=True)
    before = wanted[order].cumsum(0) - wanted[order]  # of more probable tokens
    kept = (before < changes.get("top_p", 1.0)) & (torch.arange(tiny.V) < changes.get("top_k", tiny.V))
    wanted = torch.zeros_like(wanted).scatter(0, order[kept], wanted[order][kept])
    wanted = wanted / wanted.sum()
    found = drawn.bincount(minlength=tiny.V) / count
    assert wanted.max() < 0.9 and (wanted > 0.02).sum() > 1
    assert (found[wanted == 0] == 0).all()
    # four standard deviations of a share of 4,000 draws
    assert ((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / count).sqrt() + 1 / count).all()


@pytest.mark.parametrize("do_sample", [False, True])
def test_several_beams(do_sample: bool) -> None:
    speaking = speaker("llama")
    beams = generation(num_beams=3, num_return_sequences=2, do_sample=do_sample, temperature=0.7)
    answers = generate(speaking, tiny.encoder(), PROMPTS, beams, 0)
    assert [answer.example for answer in answers] == [example for example in PROMPTS for _ in range(2)]
    assert answers[0].response_ids != answers[1].response_ids


@pytest.mark.parametrize("changes", [{"num_return_sequences": 2}, {"num_return_sequences": 3, "num_beams": 2}])
def test_greedy_has_one_response(changes: dict) -> None:
    with pytest.raises(UserError, match=r"generation\.num_return_sequences: \d .* do_sample=true"):
        generate(speaker("llama"), tiny.encoder(), PROMPTS, generation(**changes), 0)


@pytest.mark.parametrize("shape", ["llama", "bart"])
def test_the_checkpoints_own_habits_do_not_count(shape: str) -> None:
    speaking = speaker(shape)
    plain = ids_of(generate(speaking, tiny.encoder(), PROMPTS, generation(), seed=0))
    lm = speaking.module.model
    lm.generation_config.update(no_repeat_ngram_size=1, forced_eos_token_id=2, min_length=30, suppress_tokens=[7])
    own = lm.generation_config
    assert ids_of(generate(speaking, tiny.encoder(), PROMPTS, generation(), seed=0)) == plain
    assert lm.generation_config is own  # an export writes them down all the same


def test_responses_to_one_prompt_at_temperatures_in_turn() -> None:
    """A nearly cold copy says what greedy decoding says; the others are what they are at their temperature alone."""
    speaking, encoder = speaker("llama"), tiny.encoder()
    usual = {"do_sample": True, "num_return_sequences": 4}
    mixed = generation(**usual, temperatures=[1e-4, 1.0, 2.0])
    answers = ids_of(generate(speaking, encoder, PROMPTS, mixed, seed=5))
    greedy = ids_of(generate(speaking, encoder, PROMPTS, generation(), seed=5))
    one = ids_of(generate(speaking, encoder, PROMPTS, generation(**usual, temperature=1.0), seed=5))
    two = ids_of(generate(speaking, encoder, PROMPTS, generation(**usual, temperature=2.0), seed=5))
    assert answers[0::4] == answers[3::4] == greedy  # the fourth copy is at the first temperature again
    assert answers[1::4] == one[1::4] and answers[2::4] == two[2::4] and one[2::4] != two[2::4]
    alone = ids_of(generate(speaking, encoder, PROMPTS[4:5], mixed.model_copy(update={"batch_size": 1}), 5))
    assert alone == answers[16:20]


@pytest.mark.parametrize("changes", [{"do_sample": True, "num_return_sequences": 8}, {"num_beams": 2}])
def test_no_eos_before_the_least_length(changes: dict) -> None:
    speaking, encoder = speaker("llama"), tiny.encoder()
    usual = {**changes, "max_new_tokens": 20}
    free = generate(speaking, encoder, PROMPTS, generation(**usual), 1)
    held = generate(speaking, encoder, PROMPTS, generation(**usual, min_new_tokens=6), 1)
    assert min(len(answer.response_ids) for answer in free) <= 6  # five tokens and EOS, or fewer
    assert min(len(answer.response_ids) for answer in held) > 6


@pytest.mark.parametrize("changes", [{}, {"do_sample": True, "temperature": 0.3}, {"num_beams": 2}])
def test_no_pair_of_tokens_twice(changes: dict) -> None:
    usual = {"max_new_tokens": 24, "min_new_tokens": 24, **changes}

    def twice(answers) -> int:
        pairs = [list(zip(answer.response_ids, answer.response_ids[1:], strict=False)) for answer in answers]
        return sum(len(set(found)) < len(found) for found in pairs)

    speaking, encoder = speaker("t5"), tiny.encoder()
    assert twice(generate(speaking, encoder, PROMPTS, generation(**usual), 0)) > 0
    assert twice(generate(speaking, encoder, PROMPTS, generation(**usual, no_repeat_ngram_size=2), 0)) == 0


def test_beams_prefer_long_responses_where_length_is_rewarded() -> None:
    speaking, encoder = speaker("llama"), tiny.encoder()

    def tokens(**changes) -> int:
        beams = generation(num_beams=4, max_new_tokens=16, **changes)
        return sum(len(ids) for ids in ids_of(generate(speaking, encoder, PROMPTS, beams, 0)))

    assert tokens(length_penalty=-4.0) < tokens(length_penalty=4.0)


def test_settings_of_beams_are_for_beams() -> None:
    model, beams = tiny.language_model("llama"), {"length_penalty": 2.0, "early_stopping": True}
    several = generation_config(generation(**beams, num_beams=4, min_new_tokens=3), tiny.encoder(), model)
    assert (several.length_penalty, several.early_stopping, several.min_new_tokens) == (2.0, True, 3)
    one = generation_config(generation(**beams, no_repeat_ngram_size=3), tiny.encoder(), model)
    assert (one.length_penalty, one.early_stopping, one.no_repeat_ngram_size) == (None, None, 3)


def test_no_prompts() -> None:
    assert generate(speaker("llama"), tiny.encoder(), [], generation(), 0) == []
