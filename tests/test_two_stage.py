"""Two-stage sampling: what is sampled without gradient has the same likelihood, and gradient, in one parallel pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from pipeline.algorithms.functional import sequence_logp
from pipeline.data.batching import Packing, collate
from pipeline.data.tokenization import Encoder
from pipeline.models import mask_token, scratch
from pipeline.models.policy import Policy
from pipeline.records import Batch, Example, Item, Request, Response, Row
from pipeline.rollout.drawing import RowSampler
from pipeline.rollout.generate import plain_sampling, respond
from pipeline.trainer import engine
from pipeline.trainer.model import Model, spoken_packing
from tests import tiny

LEVELS = (1.0, 0.7, 1.5)


def speaker(shape: str) -> engine.Engine:
    """A model that ends many responses, as in test_rollout.py."""
    lm = tiny.language_model(shape)
    with torch.no_grad():
        lm.get_output_embeddings().weight[tiny.EOS_ID] *= 1.0 if shape == "bart" else 4.0
    return engine.Engine(Policy(lm, 64), tiny.ranks(), tiny.train_settings(), None)


def generation(**changes):
    usual = {"max_new_tokens": 8, "batch_size": 3}
    return plain_sampling(tiny.settings("rl").generation).model_copy(update={**usual, **changes})


@cache
def requests(levels: tuple[float, ...] = LEVELS, first: int = 0) -> tuple[Request, ...]:
    """Seven prompts of 1 to 9 tokens, the row-wise temperatures in another order for each."""
    rng, found = random.Random(4), []
    for i in range(7):
        ids = tuple(rng.randrange(3, tiny.V) for _ in range(1 + 4 * i % 9))
        found.append(Request(Example(str(i), str(i)), ids, levels[i % 3 :] + levels[: i % 3], first))
    return tuple(found)


def batch_of(module: Policy, answered: Sequence[Request], groups: Sequence[Sequence[Response]]) -> Batch:
    """All responses in one micro-batch."""
    items = [
        Item(request.example, (Row(request.prompt_ids, response.response_ids),), {"temperature": level})
        for request, responses in zip(answered, groups, strict=True)
        for level, response in zip(request.temperatures, responses, strict=True)
    ]
    return collate(items, range(len(items)), Packing(99, None, module.encoder_decoder, tiny.PAD_ID))


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_t01_both_stages_say_the_same(shape: str) -> None:
    """Per token, at mixed temperatures, whatever the left padding of stage 1 and the right padding of stage 2."""
    speaking = speaker(shape)
    groups = respond(speaking, tiny.encoder(), requests(), generation(max_new_tokens=24), seed=1)
    flat = [response for responses in groups for response in responses]
    batch = batch_of(speaking.module, requests(), groups)
    second = speaking(batch).detach()
    first = torch.zeros_like(second)
    for i, response in enumerate(flat):
        assert len(response.stats.logps) == len(response.response_ids) == int(batch.response_mask[i].sum())
        first[i, : len(response.response_ids)] = response.stats.logps
    tiny.close(first, second, 32)
    assert shape == "bart" or len({len(response.response_ids) for response in flat}) > 1
    untempered = speaking(Batch(**{**vars(batch), "numbers": {}})).detach()
    assert float((first - untempered).abs().max()) > 0.1  # the temperatures were not for nothing


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_t01_entropies_are_those_of_the_parallel_pass(shape: str) -> None:
    """Mean nats per token of the untempered policy, EOS included, what comes after it not."""
    speaking = speaker(shape)
    groups = respond(speaking, tiny.encoder(), requests(), generation(), seed=1)
    batch = batch_of(speaking.module, requests(), groups)
    entropies = speaking(batch, output="entropy")
    wanted = [float(row[mask].mean()) for row, mask in zip(entropies, batch.response_mask, strict=True)]
    found = [response.stats.entropy for responses in groups for response in responses]
    tiny.close(found, wanted)


def test_t01_what_is_never_said_has_no_probability_in_either_stage() -> None:
    """[MASK] and rows of no token: the parallel pass shares the rest out as the sampler does."""
    speaking, tokenizer = speaker("llama"), mask_token.with_mask(scratch.train_tokenizer(tiny.WORDS, 280))
    encoder = Encoder(tokenizer, tiny.PLAIN, 64, 64)
    asked = [request._replace(temperatures=(1.0, 0.7)) for request in requests()]
    groups = respond(speaking, encoder, asked, generation(), seed=1)
    first = torch.cat([response.stats.logps for responses in groups for response in responses])
    batch = batch_of(speaking.module, asked, groups)
    packing = spoken_packing(Model(speaking, encoder, Packing(99, None, False, tiny.PAD_ID)))
    assert packing.suppressed.tolist() == [i >= tokenizer.mask_token_id for i in range(tiny.V)]
    shared = replace(batch, suppressed=packing.suppressed)
    tiny.close(speaking(shared)[batch.response_mask].detach(), first, 32)
    assert float((speaking(batch)[batch.response_mask] - first).abs().min()) > 0.05
    entropies = [response.stats.entropy for responses in groups for response in responses]
    found = speaking(shared, output="entropy")
    tiny.close([float(row[mask].mean()) for row, mask in zip(found, batch.response_mask, strict=True)], entropies)


@pytest.mark.parametrize("shape", ["llama", "bart"])
def test_topping_up_is_asking_for_all_at_once(shape: str) -> None:
    speaking, usual = speaker(shape), (1.0, 1.0, 1.0)

    def ids(levels: tuple[float, ...], first: int) -> list[list[tuple[int, ...]]]:
        groups = respond(speaking, tiny.encoder(), requests(levels, first), generation(), seed=2)
        return [[response.response_ids for response in responses] for responses in groups]

    whole = ids((*usual, 1.0, 1.0), 0)
    probes, more = ids(usual[:2], 0), ids(usual, 2)
    assert [a + b for a, b in zip(probes, more, strict=True)] == whole
    assert any(a != b[:2] for a, b in zip(probes, more, strict=True))  # other responses, not the same again


def test_large_seeds() -> None:
    """The largest that settings allow, times a million twice, is beyond 64 bits."""
    seed = 10**9 * 1_000_003 + 10**6
    assert respond(speaker("llama"), tiny.encoder(), requests(), generation(max_new_tokens=1), seed)


def test_no_gradient_in_stage_1() -> None:
    """T-03: nothing hangs on a graph, and not a byte is saved for backward."""
    speaking = speaker("llama")
    with saved() as sizes:
        groups = respond(speaking, tiny.encoder(), requests(), generation(), seed=1)
    assert not sizes
    for response in (response for responses in groups for response in responses):
        assert response.stats.logps.grad_fn is None and not response.stats.logps.requires_grad


# against a sampler that keeps its graph


@dataclass
class saved:  # noqa: N801
    """The sizes in bytes of all distinct storages that autograd keeps for backward."""

    sizes: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no address is given out twice

    def __enter__(self) -> dict[int, int]:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self.sizes

    def __exit__(self, *trouble: object) -> None:
        self.hooks.__exit__(*trouble)
        self.kept.clear()

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        self.kept.append(tensor)
        return tensor


def one_stage(lm: nn.Module, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities with their graph, and ids: token by token, with the keys and values of earlier ones."""
    cache, read, logps, ids = None, prompts, [], []
    for step in range(uniforms.shape[1]):
        out = lm(input_ids=read, past_key_values=cache, use_cache=True)
        cache, each = out.past_key_values, out.logits[:, -1].log_softmax(-1)
        read = torch.searchsorted(each.detach().exp().double().cumsum(-1), uniforms[:, step, None], right=True)
        read = read.clamp(max=tiny.V - 1)
        logps.append(each.gather(1, read))
        ids.append(read)
    return torch.cat(logps, 1), torch.cat(ids, 1)


def two_stages(policy: Policy, prompts: Tensor, ids: Tensor) -> Tensor:
    """(B, T) of the parallel pass over the same ids."""
    rows = [tiny.row(prompt, response) for prompt, response in zip(prompts.tolist(), ids.tolist(), strict=True)]
    items = [Item(Example("", ""), (row,)) for row in rows]
    return policy(collate(items, range(len(items)), Packing(99, None, False, tiny.PAD_ID)))


def drawn(length: int) -> tuple[Policy, Tensor, Tensor]:
    policy = Policy(tiny.language_model("llama", max_position_embeddings=512), 4096)
    numbers = torch.Generator().manual_seed(length)
    prompts = torch.randint(3, tiny.V, (4, 8), generator=numbers)
    return policy, prompts, torch.rand(4, length, generator=numbers, dtype=torch.float64)


def gradients(policy: Policy, work: Callable[[], Tensor]) -> Tensor:
    """Of sum w_j s_j, with w = (1, -.5, .25, -2)."""
    policy.zero_grad()
    s = work()
    weights = torch.tensor([1.0, -0.5, 0.25, -2.0])
    (weights * sequence_logp(s, torch.ones_like(s, dtype=torch.bool))).sum().backward()
    return torch.cat([parameter.grad.flatten().clone() for parameter in policy.parameters()])


@pytest.mark.parametrize("length", [4, 24])
def test_t02_the_gradient_is_that_of_a_sampler_with_its_graph(length: int) -> None:
    policy, prompts, uniforms = drawn(length)
    _, ids = one_stage(policy.model, prompts, uniforms)
    wanted = gradients(policy, lambda: one_stage(policy.model, prompts, uniforms)[0])
    found = gradients(policy, lambda: two_stages(policy, prompts, ids))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert float(wanted.norm()) > 1.0


def test_t03_two_stages_keep_less_and_the_more_so_the_longer() -> None:
    ratios = []
    for length in (16, 32, 64):
        policy, prompts, uniforms = drawn(length)
        with saved() as one:
            _, ids = one_stage(policy.model, prompts, uniforms)
        with saved() as two:
            two_stages(policy, prompts, ids)
        ratios.append(sum(one.values()) / sum(two.values()))
    assert 1.0 < ratios[0] < ratios[1] < ratios[2], ratios


# the row sampler


def test_t05_dice_row_by_row() -> None:
    """Logits (2, 1, 0), sums (.6652, .9100, 1), at temperature .5 (.8668, .9841, 1): .8 draws token 1, then token 0.

    ln .2447 = -1.4076 and ln .8668 = -.1429; H = .8324 at temperature 1, which is what the policy's entropy is.
    """
    drawing = RowSampler(torch.tensor([[0.8], [0.8]]), torch.tensor([[1.0], [0.5]]), LogitsProcessorList())
    scores = drawing(torch.zeros(2, 1), torch.tensor([[2.0, 1.0, 0.0]] * 2))
    assert scores.argmax(1).tolist() == [1, 0]
    first, second = drawing.stats([1, 1], batch=5)
    assert float(first.logps[0]) == pytest.approx(-1.4076, abs=5e-5)
    assert float(second.logps[0]) == pytest.approx(-0.1429, abs=5e-5)
    assert first.entropy == second.entropy == pytest.approx(0.8324, abs=5e-5)
    assert first.confidence == pytest.approx(1 - 0.6652 * 0.4076, abs=5e-4) and first.batch == 5


def test_t06_what_comes_after_the_end_is_not_seen() -> None:
    """A row of one token beside one of three: only the released code's score reads on."""
    drawing = RowSampler(torch.full((2, 3), 0.1), torch.ones(2, 1), LogitsProcessorList())
    for level in (0.0, 9.0, 9.0):
        drawing(torch.zeros(2, 1), torch.tensor([[level, 0.0]] * 2))
    short, long = drawing.stats([1, 3], batch=0)
    assert len(short.logps) == 1 and short.entropy == pytest.approx(0.6931, abs=5e-5)  # ln 2
    assert long.entropy == pytest.approx((0.6931 + 2 * 0.001234) / 3, abs=5e-4)
    assert short.drop == long.drop > 1 + 0.5 * 2.718**0.5


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_a_batch_is_its_prompts_alone(shape: str) -> None:
    """Ids, and its statistics but for the batch's own number and the released code's score."""
    speaking = speaker(shape)
    together = respond(speaking, tiny.encoder(), requests(), generation(batch_size=7), seed=3)
    for i, request in enumerate(requests()):
        (alone,) = respond(speaking, tiny.encoder(), [request], generation(), seed=3)
        for one, other in zip(alone, together[i], strict=True):
            assert one.response_ids == other.response_ids
            tiny.close(one.stats.logps, other.stats.logps)
