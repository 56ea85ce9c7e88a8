"""Numbers of the evaluation by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerBase

from pipeline.algorithms import supervised
from pipeline.data.batching import Packing
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.models import scratch
from pipeline.models.policy import Policy
from pipeline.records import Example, Message, Response, Scores
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.trainer import evaluation
from pipeline.trainer.board import Board
from pipeline.trainer.evaluated import Read
from pipeline.trainer.model import Model
from pipeline.trainer.objective import Objective
from stages.evaluate import distance, show, table
from tests import tiny


def test_distinct_by_hand() -> None:
    texts = [["a", "b", "a", "b"], ["A", "b"]]
    # pairs: ab ba ab | ab (lower-cased): 4, of which 2 differ
    assert evaluation.distinct(texts, 2) == 2 / 4
    assert evaluation.distinct(texts, 1) == 2 / 6
    assert evaluation.distinct([["a"], []], 2) != evaluation.distinct([["a"], []], 2)  # NaN: there are no pairs


def test_repetition_by_hand() -> None:
    # threes of a b c a b c: abc bca cab abc: 4, 3 of them new
    assert evaluation.repetition(list("abcabc")) == 1 / 4
    assert evaluation.repetition(list("aaaaa")) == pytest.approx(2 / 3)  # aaa three times
    assert evaluation.repetition(["a", "b"]) == 0.0
    assert evaluation.repetition([]) == 0.0


def response(text: str, ids: int, finished: bool) -> Response:
    return Response(Example(text, "p"), "p", text, (5,), tuple(range(ids)), finished)


def test_completion_statistics_by_hand() -> None:
    found = evaluation.completion_statistics([response("a b c", 4, True), response("a b c a b c d", 9, False)])
    assert found == {
        "completions/mean_words": 5.0,  # (3 + 7) / 2 words
        "completions/mean_length": 6.5,  # (4 + 9) / 2
        "completions/clipped_ratio": 0.5,
        "completions/distinct_2": 4 / 8,  # ab bc | ab bc ca ab bc cd: 8, of which ab bc ca cd
        "completions/repetition": pytest.approx((0 + 1 / 5) / 2),  # abc bca cab abc bcd: 1 of 5 said before
    }


def test_sampled_kl_by_hand() -> None:
    policy = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    reference = [torch.tensor([-1.5, -1.0]), torch.tensor([-0.5])]
    # d = .5, -1 | 0;  k3 = e^-.5 - .5 + e^1 - 2 (= e^-d - 1 + d) = .1065307 + .7182818 = .8248125 | 0;  k1 = -.5 | 0
    found = evaluation.sampled_kl(policy, reference)
    assert found["objective/kl"] == pytest.approx(0.8248125 / 2, abs=1e-6)
    assert found["objective/kl_k1"] == pytest.approx(-0.25)
    # the variance of (.8248125, 0) about its mean, of one degree of freedom, is .8248125^2 / 2; its root over sqrt 2
    assert found["objective/kl_se"] == pytest.approx(0.8248125 / 2, abs=1e-6)
    assert evaluation.sampled_kl(reference, reference)["objective/kl"] == 0.0


def test_sampled_kl_is_the_divergence_in_the_mean() -> None:
    """k3 and k1 of many samples against the exact sum of p ln p / q."""
    torch.manual_seed(0)
    p, q = torch.randn(6).softmax(0), torch.randn(6).softmax(0)
    exact = float((p * (p / q).log()).sum())
    drawn = torch.multinomial(p, 20_000, replacement=True)
    found = evaluation.sampled_kl(list(p.log()[drawn][:, None]), list(q.log()[drawn][:, None]))
    assert found["objective/kl"] == pytest.approx(exact, abs=4 * found["objective/kl_se"])
    assert found["objective/kl_k1"] == pytest.approx(exact, abs=0.03)
    assert 0 < found["objective/kl_se"] < 0.01


def test_pair_accuracy_by_hand() -> None:
    assert evaluation.pair_accuracy([1.0, 0.0, 2.0, 3.0], [0.0, 1.0, 2.0, -1.0]) == (1 + 0 + 0.5 + 1) / 4
    assert math.isnan(evaluation.pair_accuracy([], []))


def test_accuracy_by_source() -> None:
    def pair(source: str, chosen: int, rejected: int) -> Example:
        return Example("i", "p", chosen="w " * chosen, rejected="w " * rejected, source=source)

    pairs = [pair("kind", 1, 3), pair("kind", 2, 5), pair("wild", 4, 1), pair("", 2, 2)]
    found = evaluation.accuracy_by_source(pairs, [1.0, 0.0, 1.0, 0.5], [0.0, 1.0, 0.0, 0.5])
    assert found == {
        "eval/accuracy": (1 + 0 + 1 + 0.5) / 4,
        "eval/length_accuracy": pytest.approx(5 / 8),  # longer wins: 0 0 1 .5 = 3/8; so shorter wins 5/8
        "eval/pairs": 4.0,
        "eval/accuracy/kind": 0.5,
        "eval/length_accuracy/kind": 1.0,  # shorter wins both
        "eval/pairs/kind": 2.0,
        "eval/accuracy/wild": 1.0,
        "eval/length_accuracy/wild": 1.0,
        "eval/pairs/wild": 1.0,
    }


def test_agreement_by_hand() -> None:
    rows = [
        Example("i", prompt, "c", reward=reward) for prompt, reward in zip("aaab", [1.0, 2.0, 2.0, 5.0], strict=True)
    ]
    found = evaluation.agreement(rows, [0.0, 1.0, -1.0, 4.0])
    # prompt a: 1 < 2 twice, of which the scores order the first (0 < 1) and not the second (0 > -1)
    assert (found["eval/accuracy"], found["eval/pairs"]) == (0.5, 2.0)
    # rewards - 2.5: -1.5, -.5, -.5, 2.5; scores - 1: -1, 0, -2, 3: 10 / sqrt(9 * 14)
    assert found["eval/correlation"] == pytest.approx(10 / math.sqrt(126))
    alone = evaluation.agreement([rows[0], rows[3]], [1.0, 1.0])
    assert math.isnan(alone.pop("eval/correlation")) and not alone


def echo(prompts, completions, **columns) -> list[float]:
    return [float(len(prompt)) + float(text) for prompt, text in zip(prompts, completions, strict=True)]


def test_score_texts_hands_over_all_columns() -> None:
    rows = [
        Example("a", "xy", references=("r1", "r2"), source="s"),
        Example("b", (Message("user", "hello"), Message("assistant", "hi"))),
    ]
    seen = {}

    def watching(prompts, completions, **columns) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.25, 0.75]

    rewards = Rewards(
        [WeightedReward("watching", 2.0, watching), WeightedReward("sum", -1.0, lambda prompts, **_: [1.0, 2.0])]
    )
    scores = scoring.score_texts(tiny.ranks(), rewards, rows, ["first", "second"])
    assert seen["prompts"] == ["xy", "user: hello\n\nassistant: hi"]
    assert seen["completions"] == ["first", "second"]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert seen["raw_prompt"] == ["xy", turns]
    assert seen["id"] == ["a", "b"] and seen["source"] == ["s", ""] and seen["references"] == [["r1", "r2"], []]
    assert scores.total == [2 * 0.25 - 1.0, 2 * 0.75 - 2.0]
    assert scores.raw == {"watching": [0.25, 0.75], "sum": [1.0, 2.0]}


def test_score_texts_of_nothing_and_of_a_bad_reward() -> None:
    rewards = Rewards([WeightedReward("echo", 1.0, echo)])
    assert scoring.score_texts(tiny.ranks(), rewards, [], []).total == []
    bad = Rewards([WeightedReward("bad", 1.0, lambda prompts, completions, **_: [float("nan")])])
    with pytest.raises(UserError, match="bad"):
        scoring.score_texts(tiny.ranks(), bad, [Example("a", "p")], ["x"])


def test_reward_statistics_by_hand() -> None:
    scores = Scores({"n": [4.0, 8.0]}, {"n": [0.0, 1.0]}, [1.0, 3.0])
    found = evaluation.reward_statistics(scores, ["a", "a b c"])
    assert found["reward"] == 2.0 and found["reward_std"] == 1.0
    assert found["reward_se"] == pytest.approx(1.0)  # sqrt((1 + 1) / (2 - 1)) / sqrt(2)
    assert found["reward_length_correlation"] == pytest.approx(1.0)
    assert found["rewards/n/mean"] == 0.5 and found["rewards/n/std"] == 0.5 and found["rewards/n/raw_mean"] == 6.0


def test_statistics_count_only_what_a_reward_judges() -> None:
    scores = Scores({"n": [4.0, None, 8.0], "m": [None] * 3}, {"n": [0.0, None, 1.0], "m": [None] * 3}, [1.0, 3.0, 2.0])
    found = evaluation.reward_statistics(scores, ["a", "long " * 9, "a b c"])
    assert (found["rewards/n/mean"], found["rewards/n/std"], found["rewards/n/raw_mean"]) == (0.5, 0.5, 6.0)
    assert found["rewards/n/se"] == pytest.approx(0.5)
    assert found["rewards/n/length_correlation"] == pytest.approx(1.0)
    assert found["rewards/n/judged"] == pytest.approx(2 / 3)
    assert found["rewards/m/judged"] == 0.0 and math.isnan(found["rewards/m/mean"])
    assert found["reward"] == 2.0


def test_sample_rows() -> None:
    scores = Scores({"n": [4.0, 8.0]}, {"n": [0.0, 1.0]}, [1.0, 3.0])
    rows = evaluation.sample_rows([response("a", 1, True), response("b", 1, True)], scores, 1, policy="rl")
    assert rows == [{"policy": "rl", "id": "a", "prompt": "p", "response": "a", "reward": 1.0, "rewards": {"n": 0.0}}]
    assert len(evaluation.sample_rows([response("a", 1, True), response("b", 1, True)], scores, 9)) == 2


@pytest.mark.parametrize("budget", [24, 4096])
def test_held_out_loss_is_one_mean_over_tokens(budget: int) -> None:
    trained, items = tiny.trainer(Policy(tiny.language_model("llama"), 64)), tiny.items(7)
    objective = Objective(lambda logp, batch: supervised.loss(logp, batch, supervised.Settings(0.0)), "tokens")
    found = evaluation.held_out_loss(trained, objective, items, Packing(None, budget, False, tiny.PAD_ID))
    logps = evaluation.response_logps(trained, responses_of(items), Packing(None, 30, False, tiny.PAD_ID))
    by_hand = -float(torch.cat(logps).mean())
    assert found["eval/loss"] == pytest.approx(by_hand, rel=1e-5)


def responses_of(items) -> list[Response]:
    rows = [item.rows[0] for item in items]
    return [Response(i.example, "", "", r.prompt_ids, r.response_ids, True) for i, r in zip(items, rows, strict=True)]


def test_response_logps_are_in_order() -> None:
    trained, items = tiny.trainer(Policy(tiny.language_model("llama"), 64)), tiny.items(7)
    together = evaluation.response_logps(trained, responses_of(items), Packing(None, 30, False, tiny.PAD_ID))
    for item, row in zip(items, together, strict=True):
        (alone,) = evaluation.response_logps(trained, responses_of([item]), Packing(1, None, False, tiny.PAD_ID))
        tiny.close(row, alone)
        assert len(row) == len(item.rows[0].response_ids)


def test_log_ratios_are_sums_over_responses() -> None:
    """With a reference that is sure of everything (ref_logp 0) they are the policy's own log-probabilities."""
    trained, items = tiny.trainer(Policy(tiny.language_model("llama"), 64)), tiny.items(7)
    packing = Packing(None, 30, False, tiny.PAD_ID)
    sure = [replace(item, ref_logp=(torch.zeros(len(item.rows[0].response_ids)),)) for item in items]
    own = [float(row.sum()) for row in evaluation.response_logps(trained, responses_of(items), packing)]
    objective = Objective(lambda logp, batch: (logp.sum(), {}), "tokens")
    assert evaluation.held_out_ratios(trained, objective, sure, packing)[1].tolist() == pytest.approx(own, rel=1e-5)


def policy(prompt: str = "{prompt}", tokens: PreTrainedTokenizerBase | None = None) -> Model:
    encoder = Encoder(tokens or tiny.tokenizer(), tiny.PLAIN.model_copy(update={"prompt": prompt}), 64, 64)
    return Model(tiny.trainer(Policy(tiny.language_model("llama"), 64)), encoder, Packing(1, None, False, tiny.PAD_ID))


def sampled(of: Model) -> Read:
    """Two responses of tokens that all vocabularies share, and their log-probabilities."""
    prompt = of.encoder.encode_prompt("the cat")[0]
    drawn = [Response(Example(str(ids), "the cat"), "", "", prompt, ids, True) for ids in ((5, 7, 2), (9, 2))]
    return Read(drawn, evaluation.response_logps(of.engine, drawn, of.packing), of.encoder.tokenizer)


def with_more_tokens() -> PreTrainedTokenizerBase:
    """The tokenizer with one token more."""
    tokens = copy.deepcopy(tiny.tokenizer())
    tokens.add_tokens(["[MASK]"])
    return tokens


def test_a_policy_with_one_more_token_is_as_far_as_without(caplog) -> None:
    """Equal weights that read equal prompts are at distance 0."""
    found = distance(policy(), "a", "b", sampled(policy(tokens=with_more_tokens())))
    assert found["objective/kl"] == pytest.approx(0.0, abs=1e-6) and not caplog.text


def test_there_is_no_kl_between_other_tokens(caplog) -> None:
    other = scratch.train_tokenizer(["quite another text with words of its own"] * 4, tiny.V)
    assert distance(policy(), "a", "b", sampled(policy(tokens=other))) == {}
    assert caplog.messages == ["policy b: its tokens are not those of a, so there is no KL between the two"]
    # a token that only one of the two has was drawn
    drawn = sampled(policy(tokens=with_more_tokens()))
    mask = drawn.tokenizer.convert_tokens_to_ids("[MASK]")
    drawn.responses[1] = replace(drawn.responses[1], response_ids=(mask, 2))
    assert distance(policy(), "a", "b", drawn) == {}


def test_each_policy_reads_prompts_as_its_template_writes_them(caplog) -> None:
    caplog.set_level("INFO")
    one, other = policy(), policy("a dog: {prompt}")
    own, as_read = (evaluation.response_logps(p.engine, sampled(p).responses, p.packing) for p in (other, one))
    assert any(float((a - b).abs().max()) > 0.01 for a, b in zip(own, as_read, strict=True))  # the prompt counts
    assert distance(one, "a", "b", sampled(other)) == pytest.approx(evaluation.sampled_kl(own, as_read))
    assert "policy b: its prompts are written otherwise than those of a" in caplog.text


def test_policies_stand_side_by_side_in_tensorboard(tmp_path) -> None:
    rows = [
        {"policy": name, "id": i, "prompt": f"p{i}", "response": f"{name} {i}", "reward": 0.5, "rewards": {"x": 0.5}}
        for name in ("sft", "rl")
        for i in range(2)
    ]
    results = {"sft": {"reward": 0.5, "objective/kl": math.nan}, "rl": {"reward": 0.75}}
    show(Board(tmp_path), results, rows, {"sft": [0.0, 1.0], "rl": [0.75]})
    events = EventAccumulator(str(tmp_path)).Reload()
    text = {
        name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("policies", "samples")
    }
    assert text["policies"].splitlines()[0::2] == ["| tag | sft | rl |", "| reward | 0.5 | 0.75 |"]
    assert text["policies"].splitlines()[3] == r"| objective/kl | - | - |"
    first, second = (part.strip() for part in text["samples"].split("**prompt:** ")[1:])
    assert first.splitlines()[0::2] == ["p0", "| policy | reward | response |", "| sft | 0.5 | sft 0 |"]
    assert second.splitlines()[-1] == "| rl | 0.5 | rl 1 |"
    found = {name: events.Histograms(f"policies/{name}/reward/histogram")[0].histogram_value for name in ("sft", "rl")}
    assert (found["sft"].num, found["sft"].sum, found["rl"].num, found["rl"].max) == (2, 1.0, 1, 0.75)


def test_the_table_has_a_dash_where_there_is_no_kl() -> None:
    known = {"reward": 1.0, "completions/mean_words": 2.0, "completions/distinct_2": 0.5}
    lines = table({"a": {**known, "objective/kl": 0.0}, "b": known}).splitlines()
    assert [line.split()[-1] for line in lines] == ["KL", "0.0000", "-"]
