"""The other engine: what it samples, how likely it says that was, the same again with the same seed, its limits."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.data.batching import Packing, collate
from pipeline.errors import UserError
from pipeline.records import Item, Request
from pipeline.rollout import continuous
from pipeline.rollout.generate import generate, plain_sampling, respond
from tests import tiny
from tests.test_rollout import PROMPTS, generation, ids_of, speaker


def requests(*temperatures: float) -> list[Request]:
    return [Request(e, tuple(tiny.encoder().encode_prompt(e.prompt)[0]), temperatures) for e in PROMPTS]


def logps_of(policy, answer, temperature: float) -> torch.Tensor:
    """What stage 2 says of a sampled response."""
    row = tiny.row(answer.prompt_ids, answer.response_ids)
    packing = Packing(1, None, policy.encoder_decoder, tiny.PAD_ID)
    batch = collate([Item(answer.example, (row,), {"temperature": temperature})], [0], packing)
    with torch.no_grad():
        return policy(batch)[0]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_the_log_probabilities_are_those_of_stage_2_at_each_rows_temperature(shape: str) -> None:
    speaking, settings = speaker(shape), plain_sampling(generation(engine="continuous", max_new_tokens=20))
    temperatures = (1.0, 0.5)
    groups = respond(speaking, tiny.encoder(), requests(*temperatures), settings, seed=3)
    answers = [answer for group in groups for answer in group]
    assert any(a.finished for a in answers) and not all(a.finished for a in answers)
    for place, answer in enumerate(answers):
        expected = logps_of(speaking.module, answer, temperatures[place % 2])
        tiny.close(answer.stats.logps, expected)
        assert answer.finished == (answer.response_ids[-1] == tiny.EOS_ID)
        if place % 2:
            assert math.isnan(answer.stats.entropy)  # that of the untempered policy is not known
        else:
            tiny.close(answer.stats.entropy, -float(expected.mean()))


def test_two_tokens_at_their_temperatures() -> None:
    """Logits (2, 1, 0): log p of token 0 is 2 - ln(e^2 + e + 1) = -0.4076 at 1, 4 - ln(e^4 + e^2 + 1) = -0.1429 at 1/2.

    That is the probe for an engine that tells raw log-probabilities where tempered ones are wanted.
    """
    speaking = speaker("llama")
    lm = speaking.module.model
    with torch.no_grad():  # every state is one vector, so the logits are those of the head alone
        lm.model.norm.weight.zero_()
        head = torch.nn.Linear(tiny.H, tiny.V)
        head.weight.zero_()
        head.bias.fill_(-1e9)
        head.bias[5:8] = torch.tensor([2.0, 1.0, 0.0])
    lm.set_output_embeddings(head.eval())
    settings = plain_sampling(generation(engine="continuous", max_new_tokens=2))
    groups = respond(speaking, tiny.encoder(), requests(1.0, 0.5, 1.0, 0.5), settings, seed=0)
    wanted = [torch.tensor([2.0, 1.0, 0.0]).div(temperature).log_softmax(0) for temperature in (1.0, 0.5, 1.0, 0.5)]
    assert wanted[0][0].item() == pytest.approx(-0.4076, abs=1e-4)
    assert wanted[1][0].item() == pytest.approx(-0.1429, abs=1e-4)
    for answer, expected in ((a, w) for group in groups for a, w in zip(group, wanted, strict=True)):
        tiny.close(answer.stats.logps, expected[torch.tensor(answer.response_ids) - 5])


def test_greedy_is_what_generate_says() -> None:
    speaking = speaker("llama")
    usual = generate(speaking, tiny.encoder(), PROMPTS, generation(), seed=0)
    other = generate(speaking, tiny.encoder(), PROMPTS, generation(engine="continuous"), seed=0)
    assert ids_of(other) == ids_of(usual) and all(answer.stats is None for answer in other)


def test_sampling_is_a_function_of_the_seed_and_leaves_the_programs_own_randomness() -> None:
    speaking = speaker("llama")
    sampled = generation(engine="continuous", do_sample=True, num_return_sequences=3)
    before, kernel = torch.get_rng_state(), speaking.module.model.config._attn_implementation
    first = generate(speaking, tiny.encoder(), PROMPTS, sampled, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert speaking.module.model.config._attn_implementation == kernel
    torch.rand(10)
    assert ids_of(generate(speaking, tiny.encoder(), PROMPTS, sampled, seed=5)) == ids_of(first)
    assert ids_of(generate(speaking, tiny.encoder(), PROMPTS, sampled, seed=6)) != ids_of(first)
    assert [answer.example for answer in first] == [example for example in PROMPTS for _ in range(3)]
    assert len(set(ids_of(first[:3]))) == 3


def test_sampled_tokens_have_the_models_frequencies() -> None:
    speaking, count = speaker("llama"), 2000
    one = generation(engine="continuous", do_sample=True, max_new_tokens=1, num_return_sequences=count, batch_size=1)
    drawn = torch.tensor([a.response_ids[0] for a in generate(speaking, tiny.encoder(), PROMPTS[2:3], one, 0)])
    prompt = torch.tensor([tiny.encoder().encode_prompt(PROMPTS[2].prompt)[0]])
    with torch.no_grad():
        wanted = speaking.module.model(prompt).logits[0, -1].softmax(-1)
    found = drawn.bincount(minlength=tiny.V) / count
    # four standard deviations of a share of 2,000 draws
    assert ((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / count).sqrt() + 1 / count).all()


def test_no_prompts() -> None:
    assert generate(speaker("llama"), tiny.encoder(), [], generation(engine="continuous"), 0) == []


def test_an_encoder_decoder_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"generation\.engine: continuous with an encoder-decoder.*engine=generate"):
        generate(speaker("t5"), tiny.encoder(), PROMPTS, generation(engine="continuous"), 0)


def test_an_old_transformers_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous.transformers, "__version__", "5.0.0")
    with pytest.raises(UserError, match=r"transformers 5\.0\.0, wanted 5\.20 or newer"):
        continuous.check_model(encoder_decoder=False)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["num_beams=3"], "num_beams is 3 with engine continuous"),
        (["top_p=0.9", "do_sample=true"], "top_p is 0.9 with engine continuous"),
        (["min_new_tokens=2"], "min_new_tokens is 2"),
        (["algo=esrl_drop", "top_k=0", "top_p=1.0"], "sampler.mode is drop"),
        (["algo=esrl", "sampler.capability=confidence"], "sampler.capability is confidence"),
        (["algo=esrl", "sampler.temperature_max=1.5"], "sampler.temperature_max is 1.5 with capability entropy"),
    ],
)
def test_what_it_cannot_do_or_tell_is_refused_in_one_line(words: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        tiny.settings("rl", "generation.engine=continuous", *words)
    assert "generation.engine=generate" in str(caught.value) and "\n" not in str(caught.value)
