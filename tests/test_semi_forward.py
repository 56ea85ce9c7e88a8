"""One forward for two responses with masked tokens: what the model sees, what it is charged for, what the cut changes.

The right answers are the model's own, each response read alone, without padding, as [MASK] and tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from pipeline.algorithms import semi_offline, supervised
from pipeline.algorithms.logits import Drawn
from pipeline.data.batching import Packing, collate
from pipeline.models import attention
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.records import Batch, Item
from pipeline.rl import compositions
from pipeline.rl.compositions import Composer
from tests import masked, tiny

SHAPES = masked.SHAPES
LAYOUTS = [(shape, True) for shape in SHAPES] + [(shape, False) for shape in ("llama", "gpt2")]  # shared, two rows
CAUSAL = ("llama", "gpt2", "qwen2")
SETTINGS = semi_offline.Settings(samples=6, rl_weight=3.0, baseline="mean", length_penalty=1.0, label_smoothing=0.1)


def whole(policy: Policy, rows: list[Item], step: int = 0, **changes) -> Batch:
    """All rows in one micro-batch."""
    return collate(rows, range(len(rows)), masked.packing(policy, SETTINGS.samples, **changes), step)


def own_of(policy: Policy, rows: list[Item], batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The logits of references and of static responses, row by row."""
    pairs = zip(rows, masked.masked_of(batch), batch.static.masked, strict=True)
    both = [(item.rows[0], item.static_rows[0], first, second) for item, first, second in pairs]
    references = [masked.own_logits(policy.model, row, first[: len(row.response_ids)]) for row, _, first, _ in both]
    others = [masked.own_logits(policy.model, row, second[: len(row.response_ids)]) for _, row, _, second in both]
    return references, others


def gradients(policy: Policy) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.requires_grad}
    policy.zero_grad()
    return found


def roundings(shape: str) -> int:
    """T5 does not divide its attention scores by the root of a head's width: here they are four times as large."""
    return 256 if shape == "t5" else 64


def same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: int) -> None:
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-3
    tiny.close(ours, theirs, allowed)


# two responses in one pass


READINGS = [(*layout, "sdpa") for layout in LAYOUTS] + [(shape, True, "eager") for shape in CAUSAL]


@pytest.mark.parametrize(("shape", "shared", "kernel"), READINGS)
def test_t14_one_pass_is_two(shape: str, shared: bool, kernel: str) -> None:
    """Logits at every target of both responses, and the gradients of all parameters."""
    policy = masked.policy(shape, attn_implementation=kernel)
    assert policy.unpadded == (shape in CAUSAL and kernel == "sdpa")
    one_pass_is_two(policy, shared, roundings(shape))


def one_pass_is_two(policy: Policy, shared: bool, allowed: int) -> None:
    rows = masked.items(5)
    batch = whole(policy, rows, unpadded=shared)
    assert (batch.owners is not None) == policy.unpadded
    given, weights = batch.static, torch.randn(tiny.V, generator=torch.Generator().manual_seed(1)) / 50
    assert masked.masked_of(batch).any() and given.masked.any()
    first, second = (policy.head(states) for states in policy(batch, output="heads"))
    pairs = ((first, batch.response_mask), (second, given.mask))
    sum(((logits @ weights).tanh() * mask).sum() for logits, mask in pairs).backward()
    ours = gradients(policy)
    references, statics = own_of(policy, rows, batch)
    for i, (reference, static) in enumerate(zip(references, statics, strict=True)):
        tiny.close(first[i][: len(reference)], reference, allowed)
        tiny.close(second[i][: len(static)], static, allowed)
    sum((logits @ weights).tanh().sum() for logits in (*references, *statics)).backward()
    same_gradients(ours, gradients(policy), 2 * allowed)  # there and back


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_checkpointing_changes_nothing(shape: str) -> None:
    """Under it transformers takes the cache away through which both responses share the prompt's keys."""
    found = {}
    for checkpointing in (False, True):
        policy, rows = masked.policy(shape), masked.items(4)
        batch = whole(policy, rows)
        policy.train()
        if checkpointing:
            hugging_face(policy.model).gradient_checkpointing_enable({"use_reentrant": False})
            hugging_face(policy.model).enable_input_require_grads()
        states = policy(batch, output="heads")
        pairs = zip(states, (batch.response_mask, batch.static.mask), strict=True)
        sum((x.tanh() * mask[..., None]).sum() for x, mask in pairs).backward()
        named = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        found[checkpointing] = (states, named)
    for ours, theirs in zip(found[True][0], found[False][0], strict=True):
        tiny.close(ours, theirs)
    same_gradients(found[True][1], found[False][1], 2 * roundings(shape))


@torch.no_grad()
def test_padding_takes_no_place_beyond_the_last() -> None:
    """A GPT-2 that knows as many places as the longest row has tokens: a short static after a long prompt is fine."""
    rows = masked.items(5)
    longest = max(len(row) for item in rows for row in (*item.rows, *item.static_rows))
    policy = masked.policy("gpt2", n_positions=longest)
    batch = whole(policy, rows)
    assert int(batch.prompt_lengths.max()) + batch.static.ids.shape[1] > longest
    _, others = own_of(policy, rows, batch)
    second = policy.head(policy(batch, output="heads")[1])
    for ours, theirs in zip(second, others, strict=True):
        tiny.close(ours[: len(theirs)], theirs)


@pytest.mark.parametrize(("shape", "shared"), LAYOUTS)
@torch.no_grad()
def test_the_budget_is_what_is_read(shape: str, shared: bool) -> None:
    """The tokens that the model's layers hold, padding included; an encoder's and a decoder's are added."""
    policy, rows = masked.policy(shape), masked.items(5)
    lm, read = hugging_face(policy.model), []
    parts = [lm.get_encoder(), lm.get_decoder()] if policy.encoder_decoder else [lm.base_model]
    for part in parts:
        part.register_forward_pre_hook(lambda *given: read.append(given[2]["input_ids"].numel()), with_kwargs=True)
    policy(whole(policy, rows, unpadded=shared), output="heads")
    packing = masked.packing(policy, SETTINGS.samples, unpadded=shared)
    charged = tiny.padded_tokens(rows, packing)
    if not packing.shared:
        assert sum(read) == charged
        return
    padded = tiny.padded_tokens(rows, replace(packing, unpadded=False))  # as which attention alone sees them
    assert charged == sum(read) + (padded - sum(read)) // 4


def test_what_is_seen() -> None:
    """A prompt of two tokens, with responses of two and one; a prompt of one with a response of one."""
    rows = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [4, 3, 0, 0]])
    lengths, owners = torch.tensor([2, 2, 1]), torch.tensor([0, 0, 2])
    laid = attention.lay(rows, rows > 0, lengths, owners)
    assert laid.ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]] and laid.places.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert laid.at.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [5, 6, 0, 0]]
    blocks = attention.blocks_of(laid, causal_mask_function, torch.float32)
    assert blocks.rows.tolist() == [[0, 1, 2, 3], [5, 6, 0, 0]] and blocks.rows_see is None
    assert blocks.queries.tolist() == [[4]] and blocks.keys.tolist() == [[0, 1, 4]]
    assert (blocks.queries_see == 0).tolist() == [[[[True, True, True]]]]
    assert blocks.back.tolist() == [0, 1, 2, 3, 8, 4, 5]  # the fifth token is the first after both rows of four
    narrow = attention.blocks_of(laid, sliding_window_causal_mask_function(2), torch.float32)
    assert (narrow.queries_see == 0).tolist() == [[[[False, True, True]]]]
    assert (narrow.rows_see == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert attention.blocks_of(laid, sliding_window_causal_mask_function(4), torch.float32).rows_see is None


def calls_of(policy: Policy) -> dict[str, int]:
    """Counts that grow with the calls of the model's parts."""
    lm, counts = hugging_face(policy.model), {}
    parts = {"base": lm.base_model}
    if policy.encoder_decoder:
        keys = [m for n, m in lm.named_modules() if n.endswith(("EncDecAttention.k", "encoder_attn.k_proj"))]
        parts = {"encoder": lm.get_encoder(), "decoder": lm.get_decoder(), "cross": keys[-1]}  # of the last layer
    for name, part in {**parts, "head": policy.head.output}.items():
        counts[name] = 0
        part.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    return counts


@pytest.mark.parametrize(("shape", "shared"), LAYOUTS)
@pytest.mark.parametrize("samples", [2, 50])
def test_t2_forwards_do_not_depend_on_samples(shape: str, shared: bool, samples: int) -> None:
    policy, rows = masked.policy(shape), masked.items(4)
    batch = collate(rows, range(4), masked.packing(policy, samples, unpadded=shared))
    counts = calls_of(policy)
    drawn = Drawn(*policy(batch, output="drawn")[2:])
    assert drawn.ids.shape == (int(batch.static.masked.sum()), samples)
    body = {"encoder": 1, "decoder": 2, "cross": 1} if policy.encoder_decoder else {"base": 1}
    assert counts == {**body, "head": 2}  # the head: once for the references, once for the masked tokens


# what is seen


def with_others(rows: list[Item], batch: Batch) -> list[Item]:
    """The rows with other words at all masked places of both responses."""
    found = []
    for item, first, second in zip(rows, masked.masked_of(batch), batch.static.masked, strict=True):
        changed = []
        for row, masked_places in ((item.rows[0], first), (item.static_rows[0], second)):
            ids = [290 - i if there else i for i, there in zip(row.response_ids, masked_places.tolist(), strict=False)]
            ids = [max(i, 4) if there else i for i, there in zip(ids, masked_places.tolist(), strict=False)]
            changed.append(replace(row, response_ids=tuple(ids)))
        found.append(replace(item, rows=(changed[0],), static_rows=(changed[1],)))
    return found


@pytest.mark.parametrize(("shape", "shared"), LAYOUTS)
@torch.no_grad()
def test_t1_masked_tokens_are_not_seen(shape: str, shared: bool) -> None:
    policy, rows = masked.policy(shape), masked.items(5)
    before = whole(policy, rows, unpadded=shared)
    after = whole(policy, with_others(rows, before), unpadded=shared)
    assert torch.equal(before.static.masked, after.static.masked)
    assert torch.equal(masked.masked_of(before), masked.masked_of(after))
    changed = before.static.ids != after.static.ids
    assert torch.equal(changed, before.static.masked) and changed.any()
    assert torch.equal(before.response_ids != after.response_ids, masked.masked_of(before))
    for ours, theirs in zip(policy(before, output="heads"), policy(after, output="heads"), strict=True):
        assert torch.equal(ours, theirs)
    drawn = zip(policy(before, output="drawn")[2:], policy(after, output="drawn")[2:], strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in drawn)


def changed_at(rows: list[Item], k: int, static: bool) -> list[Item]:
    """The rows with another word at place `k` of one of the responses."""
    found = []
    for item in rows:
        row = item.static_rows[0] if static else item.rows[0]
        ids = [290 if t == k else i for t, i in enumerate(row.response_ids)]
        row = replace(row, response_ids=tuple(ids))
        found.append(replace(item, static_rows=(row,)) if static else replace(item, rows=(row,)))
    return found


@pytest.mark.parametrize(("shape", "shared"), LAYOUTS)
@pytest.mark.parametrize("static", [False, True], ids=["reference", "static"])
@torch.no_grad()
def test_t12_nothing_is_seen_too_early(shape: str, shared: bool, static: bool) -> None:
    """The state that predicts token t sees tokens before t of its own response, and none of the other response."""
    policy, k = masked.policy(shape), 2
    rows = [
        item for item in masked.items(9) if min(len(r.response_ids) for r in (item.rows[0], item.static_rows[0])) > 4
    ]
    before = whole(policy, rows, rate=0.0, unpadded=shared)
    after = whole(policy, changed_at(rows, k, static), rate=0.0, unpadded=shared)
    pairs = list(zip(policy(before, output="heads"), policy(after, output="heads"), strict=True))
    (ours, theirs), (other, others) = pairs[::-1] if static else pairs
    there = before.response_mask if static else before.static.mask
    tiny.close(ours[:, : k + 1], theirs[:, : k + 1], 8)
    assert (ours - theirs)[:, k + 1].abs().amax(1).min() > 1e-2  # in every row
    tiny.close(other[there], others[there], 8)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_tokens_are_drawn_where_they_are_predicted(shape: str) -> None:
    """logp, greedy token and entropy at each masked token: those of the model's own logits without special ids."""
    policy, rows = masked.policy(shape), masked.items(5)
    batch = whole(policy, rows)
    drawn = Drawn(*policy(batch, output="drawn")[2:])
    _, others = own_of(policy, rows, batch)
    logits = torch.cat([x[h[: len(x)]] for x, h in zip(others, batch.static.masked, strict=True)])
    logps = logits.masked_fill(masked.words().special, -torch.inf).log_softmax(-1)
    tiny.close(drawn.logp, logps.gather(1, drawn.ids))
    assert torch.equal(drawn.greedy, logps.argmax(-1))
    tiny.close(drawn.entropy, torch.special.entr(logps.exp()).sum(-1))
    sums = logps.double().exp().cumsum(-1)  # naive: the first id whose sum exceeds the uniform
    naive = (sums[:, None, :] > batch.static.uniforms[:, :, None]).double().argmax(-1)
    assert (naive == drawn.ids).float().mean() > 0.99  # but for rounding at an edge


@pytest.mark.parametrize("shape", ["llama", "t5"])
@torch.no_grad()
def test_t10_compositions(shape: str) -> None:
    policy, rows = masked.policy(shape), masked.items(6)
    batch = whole(policy, rows)
    static, special = batch.static, masked.words().special
    found = compositions.composed_ids(static, Drawn(*policy(batch, output="drawn")[2:]))  # (B, n + 1, S)
    assert found.shape == (6, SETTINGS.samples + 1, static.ids.shape[1])
    kept = ~static.masked[:, None].expand_as(found)
    assert torch.equal(found[kept], static.ids[:, None].expand_as(found)[kept])
    assert not special[found[~kept]].any() and (~kept).any()
    lengths = static.mask.sum(1)
    for group, length in zip(found, lengths.tolist(), strict=True):
        assert (group[:, length - 1] == tiny.EOS_ID).all() and not (group[:, : length - 1] == tiny.EOS_ID).any()
    different = [len({tuple(row.tolist()) for row in group}) for group in found]
    assert max(different) > 3  # draws differ


# the losses


def totals_of(policy: Policy, batch: Batch, rewards: Tensor, settings: semi_offline.Settings = SETTINGS) -> Tensor:
    given = replace(batch, static=replace(batch.static, rewards=rewards))
    return semi_offline.loss(policy(batch, output="drawn"), given, settings)[0]


@pytest.mark.parametrize(("shape", "shared"), LAYOUTS)
def test_t7_nothing_masked_is_plain_likelihood(shape: str, shared: bool) -> None:
    policy, rows = masked.policy(shape), masked.items(5)
    batch = whole(policy, rows, rate=0.0, unpadded=shared)
    assert not batch.static.masked.any() and torch.equal(batch.shown_ids, batch.response_ids)
    totals = totals_of(policy, batch, torch.rand(5, SETTINGS.samples))
    totals.sum().backward()
    ours = gradients(policy)
    plain = collate(rows, range(5), Packing(5, None, policy.encoder_decoder, tiny.PAD_ID))
    wanted, _ = supervised.loss(policy(plain, output="smoothed"), plain, supervised.Settings(0.1))
    wanted.backward()
    assert float(totals[0]) == 0.0
    tiny.close(totals[1], wanted)
    same_gradients(ours, gradients(policy), 2 * roundings(shape))


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_t16_every_token_is_a_target(shape: str) -> None:
    """Masked or not; the number of targets is that of plain fine-tuning, the inputs alone are masked."""
    policy, rows = masked.policy(shape), masked.items(5)
    batch, plain = whole(policy, rows), whole(policy, rows, rate=0.0)
    assert torch.equal(batch.response_mask, plain.response_mask) and torch.equal(batch.response_ids, plain.response_ids)
    assert int(batch.response_mask.sum()) == sum(len(item.rows[0].response_ids) for item in rows)
    references, _ = own_of(policy, rows, batch)
    targets = [list(item.rows[0].response_ids) for item in rows]
    wanted = [x.log_softmax(-1)[range(len(x)), ids] for x, ids in zip(references, targets, strict=True)]
    for output in (policy(batch, output="drawn")[0], policy(replace(batch, static=None, **alone(policy, rows)))):
        for logp, theirs in zip(output, wanted, strict=True):
            tiny.close(logp[: len(theirs)], theirs)
            assert (logp[: len(theirs)] < 0).all() and not logp[len(theirs) :].any()


def alone(policy: Policy, rows: list[Item]) -> dict[str, Tensor]:
    """What the model reads in masked fine-tuning: no static responses."""
    packing = masked.packing(policy, samples=0)
    batch = collate([replace(item, static_rows=()) for item in rows], range(len(rows)), packing)
    return {name: getattr(batch, name) for name in ("input_ids", "input_mask", "prompt_lengths", "owners")}


# any cut


def cut_totals(policy: Policy, rows: list[Item], cuts: list[list[int]], **changes) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums of both losses over micro-batches with the items of `cuts`, and the gradients of their sum."""
    packing = masked.packing(policy, SETTINGS.samples, **changes)
    composer, total = Composer(tiny.ranks(), masked.encoder(), masked.judge(), rows, semi_offline), torch.zeros(2)
    for cut in cuts:
        batch = collate(rows, cut, packing, step=3)
        found, _ = composer.loss(policy(batch, output="drawn"), batch, SETTINGS)
        total = total + found
    total.sum().backward()
    return total.detach(), gradients(policy)


CUTS = {
    "one by one": [[i] for i in range(6)],
    "backwards": [[5], [4, 3], [2, 1, 0]],
    "with fillers": [[3, 1], [], [0, 2, 4, 5], []],
}


@pytest.mark.parametrize(("shape", "shared"), [("llama", True), ("llama", False), ("t5", True), ("bart", True)])
def test_t13_any_cut_gives_the_same_sums(shape: str, shared: bool) -> None:
    policy, rows = masked.policy(shape), masked.items(6, choices=2)
    total, wanted = cut_totals(policy, rows, [list(range(6))], unpadded=shared)
    assert abs(float(total[0])) > 0.01
    for cuts in CUTS.values():
        found, ours = cut_totals(policy, rows, cuts, unpadded=shared)
        for part, of_all in zip(found, total, strict=True):
            tiny.close(part, of_all)
        same_gradients(ours, wanted, 2 * roundings(shape))


def test_a_filler_gives_nothing() -> None:
    for shape in ("llama", "t5"):
        policy, rows = masked.policy(shape), masked.items(2)
        batch = collate(rows, [], masked.packing(policy, SETTINGS.samples))
        assert not batch.static.masked.any() and not batch.sequence_mask.any()
        composer = Composer(tiny.ranks(), masked.encoder(), masked.judge(), rows, semi_offline)
        total, stats = composer.loss(policy(batch, output="drawn"), batch, SETTINGS)
        total.sum().backward()
        assert total.tolist() == [0.0, 0.0] and all(not stat.sums.any() for stat in stats.values())
        assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
