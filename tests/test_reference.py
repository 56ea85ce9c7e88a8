"""P16: what the cache says is what the reference would say; values, and the ratio check before the first step."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import torch

from pipeline.algorithms import offline, regression
from pipeline.data import cache, encoded, encoding
from pipeline.data.batching import Extent, Packing, collate
from pipeline.errors import UserError
from pipeline.models import loading, value_head
from pipeline.models.policy import Policy
from pipeline.records import Example, Item
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.rl import reference, samples, values
from pipeline.rl.reference import ReferencePolicy, sampling_key
from pipeline.rl.values import ValueData
from pipeline.trainer.model import Model
from reward_models import length
from tests import tiny

PACKING = Packing(None, 60, False, tiny.PAD_ID)
WHOLE = Packing(None, 10**6, False, tiny.PAD_ID)


def reference_of(tmp_path: Path, shape: str = "llama", *words: str, weights: str = "w") -> ReferencePolicy:
    settings = tiny.settings("rl", f"runs_dir={tmp_path}", *words)
    trained = tiny.trainer(Policy(tiny.language_model(shape), 64))
    packing = replace(PACKING, encoder_decoder=trained.module.encoder_decoder)
    return ReferencePolicy(Model(trained, tiny.encoder(), packing), settings, weights)


def rewarded(count: int, **options) -> list[Item]:
    return tiny.items(count, reward=lambda i: i / count, advantage=lambda i: (i - 2) / count, **options)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_cached_logps_are_live_ones(tmp_path: Path, shape: str) -> None:
    ref = reference_of(tmp_path, shape)
    items = reference.with_ref_logps(ref, rewarded(9))
    module = ref.model.engine.module
    for i, item in enumerate(items):
        with torch.no_grad():
            live = module(collate(items, [i], ref.model.packing))[0]
        tiny.close(item.ref_logp[0], live)


def test_rows_in_a_table_get_the_same_as_rows_in_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs, some at a time; in a cache of their own, as the digest of a list is another."""
    monkeypatch.setattr(reference, "AT_ONCE", 3)
    ref, pairs = (
        reference_of(tmp_path),
        [Example(f"{i}", "the cat " * i, chosen="a mat", rejected="dog") for i in range(8)],
    )
    table = encoding.encode(pairs, ref.model.encoder, encoding.pair_rows)
    found, listed = reference.with_ref_logps(ref, table), reference.with_ref_logps(ref, [*table])
    for one, other in zip(found, listed, strict=True):
        assert [len(logp) for logp in one.ref_logp] == [len(row.response_ids) for row in one.rows]
        assert all(torch.equal(a, b) for a, b in zip(one.ref_logp, other.ref_logp, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[2:][3].ref_logp, found[5].ref_logp, strict=True))
    torch.testing.assert_close(collate(found[4:], [1], PACKING).ref_logp, collate(listed, [5], PACKING).ref_logp)
    bare, shorter = reference.prompts_of(found), reference.prompts_of(listed)
    assert [item.rows for item in bare] == [item.rows for item in shorter]
    assert Extent.of_each(bare, [5, 0]) == Extent.of_each(shorter, [5, 0])


def test_pairs_keep_their_two_rows(tmp_path: Path) -> None:
    items = reference.with_ref_logps(reference_of(tmp_path), tiny.items(5, pairs=True))
    assert [[len(logp) for logp in item.ref_logp] for item in items] == [
        [len(row.response_ids) for row in item.rows] for item in items
    ]


def test_the_loss_with_the_cache_is_the_live_loss(tmp_path: Path) -> None:
    """A policy that has moved, against a second copy of the reference in memory."""
    ref, twin = reference_of(tmp_path), Policy(tiny.language_model("llama"), 64)
    items = reference.with_ref_logps(ref, rewarded(9))
    tiny.two_steps(ref.model.engine, items)
    batch = collate(items, range(9), WHOLE)
    settings = offline.Settings("advantage", "sequence", 0.9, 0.1, 0.0, "none", "value", 0.0, 1.0, 20.0, "bound")
    logp = ref.model.engine(batch)
    cached, _ = offline.loss(logp, batch, settings)
    with torch.no_grad():
        live, _ = offline.loss(logp, replace(batch, ref_logp=twin(batch)), settings)
    moved, _ = offline.loss(logp, replace(batch, ref_logp=logp.detach()), settings)
    tiny.close(cached, live, 256)  # exp of a difference of sums of some 60 nats
    assert abs(float(cached) - float(moved)) > 1e-2


def test_the_cache_is_read_not_made_again(tmp_path: Path) -> None:
    ref, items = reference_of(tmp_path), rewarded(6)
    first = reference.with_ref_logps(ref, items)
    (file,) = (tmp_path / "default" / "cache").glob("*.npy")
    made = file.stat().st_mtime_ns
    tiny.two_steps(ref.model.engine, items * 2)  # the engine could not say it any more
    again = reference.with_ref_logps(ref, items)
    assert file.stat().st_mtime_ns == made and len(list(file.parent.glob("*.npy"))) == 1
    assert all(torch.equal(a.ref_logp[0], b.ref_logp[0]) for a, b in zip(first, again, strict=True))


def test_the_key_holds_everything(tmp_path: Path) -> None:
    items = rewarded(6)

    def place(*words: str, rows: list[Item] = items, weights: str = "w") -> Path:
        ref = reference_of(tmp_path, "llama", *words, weights=weights)
        return ref.cache("ref_logps", ".npy", rows=encoded.tokens_digest(rows))

    cut = replace(items[0], rows=(replace(items[0].rows[0], prompt_ids=items[0].rows[0].prompt_ids[1:]),))
    ref, kind = reference_of(tmp_path), tiny.encoder(system="Be kind.")
    model = ref.settings.model.model_copy(update={"load_in_4bit": True})
    of_4_bits = replace(ref, settings=ref.settings.model_copy(update={"model": model}))
    other_words = ["model.revision=v2", "train.precision=bf16", "model.attn_implementation=eager", "model.dropout=null"]
    found = [
        place(),
        place(weights="v"),
        place(rows=items[:-1]),
        place(rows=items[::-1]),
        place(rows=[cut, *items[1:]]),
        *(place(word) for word in other_words),
        replace(ref, model=replace(ref.model, encoder=kind)).cache(
            "ref_logps", ".npy", rows=encoded.tokens_digest(items)
        ),
        of_4_bits.cache("ref_logps", ".npy", rows=encoded.tokens_digest(items)),
    ]
    assert len(set(found)) == len(found)
    assert place() == found[0] == place("optimizer.learning_rate=0.1")  # what does not matter does not count


def test_a_torn_cache_file_is_not_used(tmp_path: Path) -> None:
    ref, items = reference_of(tmp_path), rewarded(6)
    path = ref.cache("ref_logps", ".npy", rows=encoded.tokens_digest(items))
    path.parent.mkdir(parents=True)
    left, written = cache.part_of(path), cache.part_of(path)  # by one that was killed long ago, by one at work
    left.write_bytes(b"torn")
    os.utime(left, (1e9, 1e9))
    written.write_bytes(b"other")
    assert len(reference.with_ref_logps(ref, items)) == 6 and path.is_file()
    assert not left.exists() and written.read_bytes() == b"other"


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "uuid4", lambda: UUID(int=0))
    ref, items = reference_of(tmp_path), rewarded(6)
    path = ref.cache("ref_logps", ".npy", rows=encoded.tokens_digest(items))
    path.parent.mkdir(parents=True)
    cache.part_of(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        reference.with_ref_logps(ref, items)
    assert [one.name for one in path.parent.iterdir()] == [".lock"]


# values


def test_log_probabilities_that_are_no_numbers_name_their_rows(tmp_path: Path) -> None:
    ref = reference_of(tmp_path)
    items = rewarded(4)
    token = items[2].rows[0].prompt_ids[0]  # no other row reads it
    assert not any(
        token in (*item.rows[0].prompt_ids, *item.rows[0].response_ids) for item in items if item != items[2]
    )
    with torch.no_grad():
        ref.model.engine.module.model.model.embed_tokens.weight[token] = torch.nan
    ref.model.engine.module.model.lm_head.weight = torch.nn.Parameter(
        torch.randn(tiny.V, tiny.H)
    )  # untied: only reading hurts
    with pytest.raises(UserError, match="reference log-probabilities: not finite on rows row 2, wanted numbers"):
        reference.with_ref_logps(ref, items)
    assert not list(tmp_path.rglob("*.npy"))


def targets(count: int = 12) -> values.Targets:
    prompts = [replace(item, rows=(replace(item.rows[0], response_ids=()),)) for item in tiny.items(count)]
    rewards = torch.tensor([0.1 + 0.8 * (len(item.rows[0].prompt_ids) > 5) for item in prompts])
    return values.Targets(prompts, rewards, torch.arange(count) % 4 == 0, 0.0, 1.0)


def fitted(engine, epochs: int = 3) -> tuple[value_head.ValueHead, dict[str, float]]:
    fit = {"learning_rate": 1e-3, "epochs": epochs, "batch_size": 4, "patience": epochs, "dropout": 0.1}
    settings = tiny.settings("rl").value.model_copy(update=fit)
    return values.fit_value(engine, targets(), PACKING, settings, seed=0)


def test_p15_the_reference_is_not_touched_by_the_fit(tmp_path: Path) -> None:
    trained = reference_of(tmp_path).model.engine
    before = {name: weight.clone() for name, weight in trained.state_dict().items()}
    state = torch.get_rng_state()
    _, report = fitted(trained)
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    assert all(p.grad is None for p in trained.module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert set(report) == {"value/mse", "value/r2", "value/fit_mse", "value/best_epoch"}


def test_the_head_learns_what_the_states_tell(tmp_path: Path) -> None:
    _, report = fitted(reference_of(tmp_path).model.engine, epochs=30)
    assert report["value/fit_mse"] < 0.1  # the rewards are 0.1 and 0.9: their mean alone leaves up to 0.16


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_p14_values_do_not_depend_on_the_packing(tmp_path: Path, shape: str) -> None:
    trained = reference_of(tmp_path, shape).model.engine
    torch.manual_seed(0)
    head = value_head.ValueHead(tiny.H, 0.0, 1.0, heads=8, dropout=0.1)
    encoder_decoder = trained.module.encoder_decoder
    packings = [
        Packing(1, None, encoder_decoder, 0),
        Packing(None, 40, encoder_decoder, 0),
        Packing(12, None, encoder_decoder, 0),
    ]
    found = [values.values_of(trained, head, targets().items, packing) for packing in packings]
    for others in found[1:]:
        tiny.close(others, found[0])
    assert found[0].std() > 1e-3
    assert torch.equal(values.values_of(trained, head.train(), targets().items, packings[0]), found[0])  # eval mode


def test_p14_appended_response_tokens_do_not_change_values(tmp_path: Path) -> None:
    trained = reference_of(tmp_path).model.engine
    torch.manual_seed(0)
    head = value_head.ValueHead(tiny.H, 0.0, 1.0, heads=8, dropout=0.1)
    bare = values.values_of(trained, head, targets().items, PACKING)
    tiny.close(values.values_of(trained, head, tiny.items(12), PACKING), bare)


# the check before the first step


def test_p1_the_ratio_is_one_before_the_first_step(tmp_path: Path) -> None:
    ref = reference_of(tmp_path)
    items = reference.with_ref_logps(ref, rewarded(9))
    other = Packing(2, None, False, tiny.PAD_ID)
    gap = reference.check_ratio(ref.model.engine, items, [3, 3, 0, 8], other, 1e-3)
    assert gap < 8 * tiny.rounding([item.ref_logp for item in items])  # nats per token


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    ref = reference_of(tmp_path)
    items = reference.with_ref_logps(ref, rewarded(9))
    tiny.two_steps(ref.model.engine, items)
    with pytest.raises(UserError) as error:
        reference.check_ratio(ref.model.engine, items, range(9), PACKING, 1e-3)
    text = str(error.value)
    assert "\n" not in text and "nats per token before the first step" in text and "model.dropout=0.0" in text


def test_dropout_is_noticed(tmp_path: Path) -> None:
    ref = reference_of(tmp_path)
    items = reference.with_ref_logps(ref, rewarded(9))
    loading.set_dropout(ref.model.engine.module.model, 0.2)  # off in evaluation mode, in which the reference was read
    with pytest.raises(UserError, match="is dropout on"):
        reference.check_ratio(ref.model.engine, items, range(9), PACKING, 1e-3)


def test_a_ratio_that_is_no_number_is_noticed(tmp_path: Path) -> None:
    ref = reference_of(tmp_path)
    items = reference.with_ref_logps(ref, rewarded(9))
    items[4] = replace(items[4], ref_logp=(torch.full_like(items[4].ref_logp[0], float("nan")),))
    with pytest.raises(UserError, match="nan nats per token"):
        reference.check_ratio(ref.model.engine, items, range(9), PACKING, 1e-3)


def test_values_under_another_scale_or_weight_are_others(tmp_path: Path) -> None:
    ref = reference_of(tmp_path, "llama", "value.epochs=1", "value.samples_per_prompt=1", "max_new_tokens=4")
    rows, prompts = rewarded(4), [Example("a", "the cat"), Example("b", "a dog")]

    def judged_by(*given: object) -> None:
        rewards = Rewards([WeightedReward("length", *given)])
        reference.with_values(ref, [rows], ValueData(prompts, rows, rewards, "the same files"))

    for i, given in enumerate([(1.0, length.reward), (0.5, length.reward), (1.0, length.reward, "sigmoid")], start=1):
        judged_by(*given)
        judged_by(*given)
        assert len([*(tmp_path / "default" / "cache").glob("values-*.pt")]) == i


def test_samples_are_judged_once_for_any_temperature(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three rows of two prompts, the last held out: V* of either beta comes from the same file."""
    words = ("algo=a_star_po", "reference_samples.per_prompt=3", "generation.max_new_tokens=4")
    ref = reference_of(tmp_path, "llama", *words)
    rows = [Example(f"{i}", ("the cat", "a mat")[i // 2], completion="dog", reward=float(i)) for i in range(3)]
    items = encoding.encode(rows, ref.model.encoder, encoding.completion_rows)
    data = ValueData([], items, Rewards([WeightedReward("length", 1.0, length.reward)]), "key")
    seen = []

    def with_samples(beta: float) -> list[float]:
        def numbers_of(rewards: torch.Tensor, drawn: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(drawn.tolist())
            return {"advantage": rewards - regression.optimal_value(drawn, beta)}

        parts = samples.with_samples(ref, (items[:2], items[2:]), data, "policy", numbers_of)
        return [item.numbers["advantage"] for part in parts for item in part]

    sharp, flat = with_samples(1e-6), with_samples(1e6)
    assert seen[:2] == seen[2:] and [len(drawn) for drawn in seen] == [3, 3, 3, 3]
    for found, chosen in ((sharp, max), (flat, lambda drawn: sum(drawn) / 3)):
        of_prompts = [chosen(drawn) for drawn in seen[:2]]
        assert found == pytest.approx([0.0 - of_prompts[0], 1.0 - of_prompts[0], 2.0 - of_prompts[1]], abs=1e-4)
    said = "2 prompts x 3 responses x at most 4 tokens = 24 tokens to sample"
    assert caplog.text.count(said) == 1 and len(list(tmp_path.rglob("samples-*.npy"))) == 1
    # of prompts cut otherwise, or rewards read otherwise, they are others
    for name, value in (("data", {"max_prompt_length": 7}), ("rewards", {"max_length": 7})):
        section = getattr(ref.settings, name).model_copy(update=value)
        other = replace(ref, settings=ref.settings.model_copy(update={name: section}))
        assert sampling_key(other, data, sampled=True) != sampling_key(ref, data, sampled=True)
