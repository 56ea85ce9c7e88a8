"""A step is the same however it is cut, for every algorithm: ranks, micro-batches, ZeRO stages, cached references.

The right answer is computed here by hand: one row at a time by the model's own forward, the formula of the method's
table, one division, torch's AdamW.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.batching import Packing, collate
from pipeline.models.policy import Policy
from pipeline.records import Item
from pipeline.rl import reference, values
from pipeline.rl.reference import ReferencePolicy
from pipeline.rl.values import ValueData
from pipeline.trainer.engine import Engine
from pipeline.trainer.model import Model
from pipeline.trainer.objective import objective_of
from tests import masked, same_step, tiny
from tests.same_step import DRAWN

NAMES = list(same_step.cases())
CUTS = [(name, zero) for name, case in same_step.cases().items() for zero in case.stages]

# by hand


def clipped(log_ratio: Tensor) -> Tensor:
    return log_ratio.detach().exp().clamp(0.1, 1.9)


# (nll (T,), the reference's nll (T,), reward, advantage) -> the row's loss
FORMULAS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "nll": lambda n, ref, r, a: n.sum(),
    "wbc": lambda n, ref, r, a: r * n.sum(),
    "r_gold": lambda n, ref, r, a: r * ((-n).detach().exp().clamp(min=0.1) * n).sum(),
    "r_lol": lambda n, ref, r, a: r * clipped(ref.sum() - n.sum()) * n.sum(),
    "alol": lambda n, ref, r, a: max(a, 0) * clipped(ref.sum() - n.sum()) * n.sum(),
    "a_lol_seq": lambda n, ref, r, a: max(a, 0) * (clipped(ref - n) * n).sum(),
    "a_lol_ref_free": lambda n, ref, r, a: max(a, 0) * n.sum(),
    "a_lol_kl": lambda n, ref, r, a: max(a, 0) * n.sum() + 0.2 * (ref.sum() - n.sum()),
    "a_lol_k3": lambda n, ref, r, a: max(a, 0) * n.sum() + 0.2 * ((ref - n).exp() - 1 - (ref - n)).sum(),
    "dro": lambda n, ref, r, a: (a - 0.1 * (ref.sum() - n.sum())) ** 2 / 2,
    "supervised": lambda n, ref, r, a: n.sum(),
}


def pair_loss(name: str, chosen: Tensor, rejected: Tensor, numbers: dict[str, float]) -> Tensor:
    if name == "bradley_terry":
        gap = chosen - rejected - numbers["margin"]
        return 0.1 * (chosen + rejected) ** 2 + F.softplus(-gap)
    if name == "mixed" and numbers["correctness"] == 0:
        return F.softplus(rejected - chosen) / 2
    return ((chosen - numbers["chosen_reward"]) ** 2 + (rejected - numbers["rejected_reward"]) ** 2) / 2


def dpo_loss(name: str, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Of ln(pi / pi_ref) of each response: beta .1; or beta .5 and one label in ten wrong."""
    if name == "dpo":
        return F.softplus(0.1 * (rejected - chosen))
    return 0.9 * F.softplus(0.5 * (rejected - chosen)) + 0.1 * F.softplus(0.5 * (chosen - rejected))


def log_ratio(model: nn.Module, item: Item, place: int = 0) -> Tensor:
    """ln(pi / pi_ref) of a whole response."""
    return (same_step.own_logps(model, item, place) - item.ref_logp[place]).sum()


def reference_point(name: str, model: nn.Module, drawn: Sequence[int], step: int) -> float:
    """kto's by the mismatched rows of the step; bco's by all rows of the steps before, `SEEN` in this process."""
    if step == 0:
        SEEN.clear()
    if name == "bco":
        classes = [[value for good, value in SEEN if good == wanted] for wanted in (0, 1)]
        means = [sum(values) / len(values) for values in classes if values]
        return sum(means) / len(means) if means else 0.0
    with torch.no_grad():
        return max(0.0, 0.5 * sum(float(log_ratio(model, same_step.mismatched()[i])) for i in drawn) / len(drawn))


SEEN: list[tuple[float, float]] = []  # labels and implicit rewards


def compared_loss(name: str, model: nn.Module, item: Item) -> Tensor:
    """Of a row against its reference point, or of the rows of a group against one another."""
    if name == "agro":
        left = [item.numbers[f"reward_{i + 1}"] - 0.1 * log_ratio(model, item, i) for i in range(3)]
        mean = sum(left) / 3
        return sum((d - mean) ** 2 for d in left) / 2
    implicit = 0.5 * log_ratio(model, item)
    SEEN.append((item.numbers["desirable"], float(implicit)))
    m = (implicit - item.numbers["reference_point"]) * (1 if item.numbers["desirable"] else -1)
    return item.numbers["weight"] * (1 - torch.sigmoid(m) if name == "kto" else F.softplus(-m))


def inverse(probabilities: Tensor, uniforms: Tensor) -> list[list[int]]:
    """For each position (M, V) and each of its uniforms (M, n) the first id whose cumulative probability exceeds it."""
    sums = probabilities.double().cumsum(-1)
    return [[int((row > u).nonzero()[0]) for u in us] for row, us in zip(sums, uniforms.tolist(), strict=True)]


def masked_loss(case: same_step.Case, model: nn.Module, item: Item, step: int) -> tuple[Tensor, Tensor]:
    """5 L_RL and L_MLE of one row alone, and what they count for: a sequence, and its tokens.

    Masks, uniforms and the choice among two static responses are read off a batch of this row alone; all else is here.
    """
    packing = same_step.packing_of(case, Packing(1, None, False, tiny.PAD_ID))
    batch = collate([item], [0], packing, step)
    given, reference = batch.static, item.rows[0]
    logps = masked.own_logits(model, reference, masked.masked_of(batch)[0]).log_softmax(-1)
    nll = -logps[range(len(logps)), list(reference.response_ids)]
    mle = (0.9 * nll - 0.1 * logps.mean(-1)).sum()
    counts = torch.tensor([1.0, len(nll)])

    places = given.masked[0].nonzero().flatten().tolist()
    if not places:
        return torch.stack([mle * 0, mle]), counts
    ids = given.ids[0].tolist()
    logits = masked.own_logits(model, replace(reference, response_ids=tuple(ids)), given.masked[0])[places]
    allowed = logits.masked_fill(masked.words().special, -torch.inf).log_softmax(-1)  # (M, V)
    drawn = inverse(allowed.detach().exp(), given.uniforms)
    rewards, sums = [], []
    for i in range(5):
        put = dict(zip(places, (row[i] for row in drawn), strict=True))
        text = masked.encoder().decode([put.get(t, token) for t, token in enumerate(ids)])
        rewards.append(masked.overlap(text, item.example.references[0]))
        sums.append(sum(allowed[m, row[i]] for m, row in enumerate(drawn)))
    mean = sum(rewards) / 5
    weighted = sum((reward - mean) * total for reward, total in zip(rewards, sums, strict=True))
    return torch.stack([-5.0 * weighted / len(places), mle]), counts


def sampled_loss(case: same_step.Case, model: nn.Module, item: Item) -> tuple[Tensor, Tensor]:
    """- u A s with s at the row's temperature, and .2 u k3 in the loss; or of a reference its smoothed likelihood.

    Both with their weights, and what they count for: a prompt, and the reference's tokens.
    """
    row, numbers, chosen = item.rows[0], item.numbers, case.algorithm.settings
    logits = model(input_ids=torch.tensor([row.prompt_ids + row.response_ids])).logits[0]
    logps = (logits[len(row.prompt_ids) - 1 : -1] / numbers["temperature"]).log_softmax(-1)
    own = logps[range(len(logps)), list(row.response_ids)]
    if numbers["target"]:
        e = chosen["label_smoothing"]
        mle = -((1 - e) * own + e * logps.mean(-1)).sum()
        return torch.stack([mle * 0, chosen["sft_weight"] * mle]), torch.tensor([0.0, len(own)])
    weighted = -numbers["share"] * numbers["advantage"] * own.sum()
    if chosen["kl_beta"]:
        z = item.ref_logp[0] - own
        weighted = weighted + 0.2 * numbers["share"] * (z.exp() - 1 - z).sum()
    return torch.stack([chosen["rl_weight"] * weighted, weighted * 0]), torch.tensor([numbers["leads"], 0.0])


def item_loss(name: str, model: nn.Module, item: Item, step: int = 0) -> tuple[Tensor, int | Tensor]:
    """The loss of one item, and what it counts for in the mean; of a sum of two means both."""
    case = same_step.cases()[name]
    if case.masked:
        return masked_loss(case, model, item, step)
    if case.sampled:
        return sampled_loss(case, model, item)
    if case.pairs and not case.scalar:
        chosen, rejected = ((same_step.own_logps(model, item, i) - item.ref_logp[i]).sum() for i in (0, 1))
        return dpo_loss(name, chosen, rejected), 1
    if case.labels or case.groups:
        return compared_loss(name, model, item), 1
    if case.scalar:
        ids = [torch.tensor([row.prompt_ids + row.response_ids]) for row in item.rows]
        scores = [model(input_ids=row).logits[0, 0] for row in ids]
        return pair_loss(name, *scores, item.numbers) if case.pairs else (scores[0] - item.numbers["reward"]) ** 2, 1
    nll = -same_step.own_logps(model, item)
    found = FORMULAS[name](nll, -item.ref_logp[0], item.numbers["reward"], item.numbers["advantage"])
    return found, len(nll) if name == "supervised" else 1


Losses = Sequence[tuple[Tensor, int | Tensor]]


def exact(losses: Losses) -> Tensor:
    counts = torch.as_tensor(sum(count for _, count in losses))
    return (sum(loss for loss, _ in losses) / counts.clamp(min=1)).sum()


def mean_of_means(losses: Losses) -> Tensor:
    """What a loop does that averages each micro-batch, here of at most 2 items, and then the averages."""
    cuts = [losses[start : start + 2] for start in range(0, len(losses), 2)]
    return sum(exact(cut) for cut in cuts) / len(cuts)


def by_hand(name: str, mean: Callable[[Losses], Tensor] = exact) -> dict:
    """The losses, gradient norms and weights of the steps on DRAWN."""
    case = same_step.cases()[name]
    model, items = same_step.model(case), same_step.items_of(case)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.05, betas=(0.9, 0.95), eps=1.0,
    )  # fmt: skip
    found = {"loss": [], "grad_norm": []}
    for step, drawn in enumerate(DRAWN):
        optimizer.zero_grad()
        if case.labels:
            point = {"reference_point": reference_point(name, model, drawn, step)}
            items = [replace(item, numbers=item.numbers | point) for item in items]
        loss = mean([item_loss(name, model, items[i], step) for i in drawn])
        loss.backward()
        found["loss"].append(float(loss))
        squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
        found["grad_norm"].append(squares**0.5)
        optimizer.step()
    return {**found, "weights": {f"model.{n}": p.detach() for n, p in model.named_parameters()}}


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> Iterator[None]:
    """Every start of ZeRO-3 collects garbage, which takes 0.3 s over all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def right() -> dict[str, dict]:
    return {name: by_hand(name) for name in NAMES}


def weight_gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    return max(float((weight - theirs[name]).abs().max()) for name, weight in ours.items())


# The same sums in another order, in roundings. A sequence's ratio is exp of a difference of sums of some 60 nats, so
# r_lol's losses and norms are off by 60 and more. Measured over all algorithms, cuts and stages: weights 2, norms and
# losses 56 (r_lol), 17 (others).
WEIGHTS, NUMBERS = 8, 256


def sizes(wanted: dict) -> tuple:
    """What a weight is made of: itself, and steps of the rate times a gradient (of the k3 estimate up to 2,000)."""
    return wanted["weights"], [same_step.OPTIMIZER["learning_rate"] * norm for norm in wanted["grad_norm"]]


def same(found: dict, wanted: dict) -> None:
    for name in ("loss", "grad_norm"):
        tiny.close(found[name], wanted[name], NUMBERS)
    weights = {name: found["weights"][name] for name in wanted["weights"]}  # buffers aside
    tiny.close(weights, wanted["weights"], WEIGHTS, of=sizes(wanted))


# cuts


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two processes did: every algorithm under every stage, in one launch."""
    return tiny.on_two_processes("tests.same_step", tmp_path_factory.mktemp("same_step"))


@pytest.mark.parametrize(("name", "zero"), CUTS)
def test_two_ranks_are_one(seen: dict, right: dict, name: str, zero: str) -> None:
    same(seen[zero][name], right[name])


@pytest.mark.parametrize(("name", "zero"), CUTS)
def test_one_by_one_or_all_at_once(right: dict, tmp_path: Path, name: str, zero: str) -> None:
    for size in (1, 5):
        packing = Packing(size, None, False, tiny.PAD_ID)
        same(same_step.steps(same_step.cases()[name], zero, packing, tmp_path), right[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_tests_above_could_fail(right: dict, name: str) -> None:
    """The weights moved, and a mean of means would have moved them elsewhere: both by 100 times the tolerance."""
    start = {f"model.{n}": p for n, p in same_step.model(same_step.cases()[name]).named_parameters()}
    seen = 100 * WEIGHTS * tiny.rounding(sizes(right[name]))
    assert weight_gap(start, right[name]["weights"]) > seen
    assert weight_gap(by_hand(name, mean_of_means)["weights"], right[name]["weights"]) > seen


# the reference, cached or alive


CACHED = ["r_lol", "alol", "a_lol_seq", "a_lol_kl", "a_lol_k3"]
WHOLE = Packing(9, None, False, tiny.PAD_ID)


def reference_of(folder: Path, name: str, seed: int = 0) -> ReferencePolicy:
    words = ("value.targets=data", "value.epochs=3", f"runs_dir={folder}")
    policy = Policy(tiny.language_model("llama", seed), 64)
    trained = tiny.trainer(policy, optimizer=same_step.OPTIMIZER)
    settings = tiny.settings("rl", *words).model_copy(update={"algorithm": same_step.cases()[name].algorithm})
    return ReferencePolicy(Model(trained, tiny.encoder(), same_step.BUDGET), settings, "weights")


def counted(trained: Engine) -> list[int]:
    """A list that grows with every forward of the language model."""
    calls: list[int] = []
    trained.module.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def prepared(ref: ReferencePolicy, rows: list[Item]) -> list[Item]:
    """The rows with reference log-probabilities, values and advantages, from the cache where it is there."""
    rows = reference.with_ref_logps(ref, rows)
    return reference.with_values(ref, [rows], ValueData([], rows, None, None))[0][0]


def logged() -> list[Item]:
    """Nine rows of nine prompts with rewards, and nothing else known."""
    return tiny.items(9, reward=lambda i: i * 5 % 9 / 8)


def live(folder: Path, name: str, rows: list[Item]) -> list[Item]:
    """The same, by a reference in memory, one row at a time."""
    ref = reference_of(folder, name)
    source = ValueData([], rows, None, None)
    targets, settings = values.value_targets(ref.model, ref.settings, source, "data"), ref.settings
    head, _ = values.fit_value(ref.model.engine, targets, ref.model.packing, settings.value, settings.seed)
    model, head, found = tiny.language_model("llama"), head.eval(), []
    for row in rows:
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([row.rows[0].prompt_ids])).last_hidden_state
            value = float(head(states, torch.ones(states.shape[:2], dtype=torch.bool)))
            ref_logp = same_step.own_logps(model, row)
        numbers = {**row.numbers, "advantage": row.numbers["reward"] - value}
        found.append(replace(row, numbers=numbers, ref_logp=(ref_logp,)))
    return found


def moved(model: nn.Module) -> nn.Module:
    """The model some steps later."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.003)
    return model


@pytest.mark.parametrize("name", CACHED)
def test_p16_cached_is_live(tmp_path: Path, name: str) -> None:
    """Loss and gradient of a policy that has moved, with the cache read again and with a second model in memory."""
    ref, rows = reference_of(tmp_path, name), logged()
    before = ref.model.engine.state_dict()
    prepared(ref, rows)
    assert all(torch.equal(weight, before[key]) for key, weight in ref.model.engine.state_dict().items())
    other = reference_of(tmp_path, name, seed=1)  # could not say it: only the files can
    calls = counted(other.model.engine)
    cached = prepared(other, rows)
    assert not calls

    module, objective = (
        Policy(moved(tiny.language_model("llama")), 64),
        objective_of(ref.settings.algorithm)[2],
    )
    batch = collate(cached, range(9), WHOLE)
    total, _ = objective.loss(module(batch), batch)
    total.backward()
    by_model = moved(tiny.language_model("llama"))
    wanted = torch.stack([item_loss(name, by_model, row)[0] for row in live(tmp_path / "live", name, rows)]).sum()
    wanted.backward()
    tiny.close(total, wanted, NUMBERS)
    theirs = {f"model.{key}": p.grad for key, p in by_model.named_parameters()}
    tiny.close({key: p.grad for key, p in module.named_parameters()}, theirs, NUMBERS)


def test_p16_training_asks_no_reference(tmp_path: Path) -> None:
    """As many forwards as micro-batches."""
    ref = reference_of(tmp_path, "alol")
    rows = prepared(ref, logged())
    trainer = same_step.trainer_of(same_step.cases()["alol"], ref.model.engine, rows, same_step.BUDGET, tmp_path)
    calls = counted(ref.model.engine)
    same_step.run(same_step.cases()["alol"], trainer)
    assert len(calls) == sum(len(trainer.windows.at(step)) for step in range(len(DRAWN))) > len(DRAWN)
