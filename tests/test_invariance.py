"""Whatever scores a text says the same in any company: any cut into batches, any order, any padding.

What one forward says of one batch is in test_policy, test_models and test_value; here it is what stages call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipeline.data.batching import Packing, collate
from pipeline.models import loading, writing
from pipeline.models.policy import Policy, RewardModel
from pipeline.records import Example, Item, Response
from pipeline.rl import reference
from pipeline.rollout.generate import generate
from pipeline.trainer import engine, evaluation
from pipeline.trainer.model import Model
from pipeline.trainer.objective import Objective, objective_of
from reward_models import learned
from stages.reward import scores_of
from tests import same_step, tiny

SHAPES = tiny.SHAPES
ORDER = [4, 1, 8, 0, 3, 7, 2, 6, 5]


def packings(encoder_decoder: bool, whole: bool = False) -> list[Packing]:
    """One by one, by threes, by a small budget, all at once."""
    cuts = [(1, None), (3, None), (None, 44), (9, None)]
    return [Packing(size, budget, encoder_decoder, tiny.PAD_ID, whole) for size, budget in cuts]


def speaker(shape: str) -> engine.Engine:
    return engine.Engine(Policy(tiny.language_model(shape), 64), tiny.ranks(), tiny.train_settings(), None)


def all_alike(found: Sequence[dict[str, float]]) -> None:
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, wanted in found[0].items():  # small ones, such as margins, are differences of numbers of size 1
            if math.isnan(wanted):
                assert math.isnan(other[name]), name
            else:
                tiny.close(other[name], wanted, of=(wanted, 1.0))


# log-probabilities and losses


def spoken(items: Sequence[Item]) -> list[Response]:
    return [Response(i.example, "", "", i.rows[0].prompt_ids, i.rows[0].response_ids, True) for i in items]


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_response_logps(shape: str) -> None:
    speaking, items = speaker(shape), tiny.items(9)
    mixed = [items[i] for i in ORDER]
    one_by_one, *others = packings(speaking.module.encoder_decoder)
    alone = reference.reference_logps(speaking, items, one_by_one)
    assert torch.cat(alone).std() > 1
    for packing in others:
        found = reference.reference_logps(speaking, items, packing)
        assert [*map(len, found)] == [*map(len, alone)]
        tiny.close(torch.cat(found), torch.cat(alone))
        again = evaluation.response_logps(speaking, spoken(mixed), packing)
        for place, i in enumerate(ORDER):
            tiny.close(again[place], alone[i])


@pytest.mark.parametrize("name", [name for name, case in same_step.cases().items() if not case.masked])
def test_held_out_statistics(name: str) -> None:
    """Every statistic: means, deviations, effective shares."""
    case = same_step.cases()[name]
    objective = objective_of(case.algorithm)[2]
    judged = engine.Engine(same_step.module(case), tiny.ranks(), tiny.train_settings(), None)
    items = list(same_step.items_of(case))
    mixed = [items[i] for i in ORDER]
    cuts = [same_step.packing_of(case, packing) for packing in packings(False)]
    found = [evaluation.held_out_loss(judged, objective, items, packing) for packing in cuts]
    found += [evaluation.held_out_loss(judged, objective, mixed, packing) for packing in cuts[1:3]]
    assert found[0]["eval/loss"] != 0
    all_alike(found)


def test_the_divergence_of_two_policies() -> None:
    speaking, other = (
        speaker("llama"),
        engine.Engine(Policy(tiny.language_model("llama", seed=1), 64), tiny.ranks(), tiny.train_settings(), None),
    )
    answers, found = spoken(tiny.items(9)), []
    for packing in packings(False):
        both = [evaluation.response_logps(one, answers, packing) for one in (speaking, other)]
        found.append(evaluation.sampled_kl(both[0], [torch.clamp(r, min=-3) for r in both[1]]))
    assert found[0]["objective/kl"] > 1
    all_alike(found)


def test_log_ratios() -> None:
    speaking, items = speaker("llama"), list(same_step.rows())
    objective = Objective(lambda logp, batch: (logp.sum(), {}), "tokens")
    found = [evaluation.held_out_ratios(speaking, objective, items, packing)[1] for packing in packings(False)]
    sums = [item.ref_logp[0].sum() for item in items]
    for ratios in found[1:]:
        tiny.close(ratios, found[0], of=sums)  # differences of sums


# scores


def encoder_only(kind: str) -> torch.nn.Module:
    """A random classifier that reads a first token, in the manner of BERT."""
    sizes = {"hidden_size": tiny.H, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": tiny.V, "pad_token_id": tiny.PAD_ID, "num_labels": 1, "max_position_embeddings": 160}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    if kind == "bert":
        return tiny.spread(BertForSequenceClassification(BertConfig(**sizes))).eval()
    return tiny.spread(RobertaForSequenceClassification(RobertaConfig(**sizes))).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_encoders_score_alike_in_any_company(tmp_path: Path, kind: str) -> None:
    model = encoder_only(kind)
    writing.save(tmp_path / kind, model, model.state_dict(), tiny.tokenizer())
    scorer, items = RewardModel(model), tiny.items(9)
    with torch.no_grad():
        together = scorer(collate(items, range(9), packings(False, whole=True)[3]))
        for i, item in enumerate(items):
            ids = torch.tensor([[*item.rows[0].prompt_ids, *item.rows[0].response_ids]])
            tiny.close(together[i], model(input_ids=ids).logits[0, 0], of=together)
    assert together.std() > 0.05
    prompts = [" ".join(tiny.WORDS[: 1 + i % 9]) for i in range(9)]
    completions = [" ".join(tiny.WORDS[i % 5 : 2 * i]) for i in range(9)]

    def scores(batch_size: int, order: Sequence[int]) -> list[float]:
        settings = tiny.settings("sft").model
        reward = learned.load(str(tmp_path / kind), settings, tiny.PLAIN, 64, batch_size, torch.device("cpu"))
        return reward([prompts[i] for i in order], [completions[i] for i in order])

    alone = scores(1, range(9))
    tiny.close(scores(7, range(9)), alone)
    tiny.close(scores(7, ORDER), [alone[i] for i in ORDER])
    assert len({round(score, 3) for score in alone}) > 5


@torch.no_grad()
def test_an_encoder_reads_between_the_tokens_that_its_tokenizer_names(tmp_path: Path) -> None:
    """BERT's has no EOS, but [CLS] and [SEP]."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *tiny.WORDS])}
    inner = Tokenizer(models.WordLevel(words, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, words[token]) for token in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    tokenizer, model = PreTrainedTokenizerFast(tokenizer_object=inner, **names), encoder_only("bert")
    writing.save(tmp_path / "bert", model, model.state_dict(), tokenizer)
    settings = tiny.settings("sft").model
    reward = learned.load(str(tmp_path / "bert"), settings, tiny.PLAIN, 64, 2, torch.device("cpu"))
    found = reward(["the old cat", "a dog"], ["ran far away", "sat"])
    for score, text in zip(found, ("the old cat ran far away", "a dog sat"), strict=True):
        tiny.close(score, float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]), of=found)


def scorer_of(tmp_path: Path, shape: str) -> RewardModel:
    """A reward model of any shape whose head says something."""
    language = tiny.language_model(shape)
    writing.save(tmp_path / shape, language, language.state_dict(), tiny.tokenizer())
    settings = tiny.settings("reward").model.model_copy(update={"path": str(tmp_path / shape)})
    return RewardModel(tiny.spread(loading.load_scalar(settings, tiny.tokenizer(), 0, new_head=True)).eval())


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_pairs(tmp_path: Path, shape: str) -> None:
    scorer, items = scorer_of(tmp_path, shape), tiny.items(9, pairs=True)
    judge = engine.Engine(scorer, tiny.ranks(), tiny.train_settings(), None)
    models = [Model(judge, tiny.encoder(), packing) for packing in packings(scorer.encoder_decoder, whole=True)]
    found = [scores_of(model, items) for model in models]
    for chosen, rejected in found[1:]:
        tiny.close((chosen, rejected), found[0])
    assert torch.tensor(found[0]).std() > 0.05


# responses

PROMPTS = [Example(f"row {i}", " ".join(tiny.WORDS[i % 4 : 2 + 3 * i % 11])) for i in range(9)]
Say = Callable[..., list[str]]


def sayer(shape: str, **changes) -> Say:
    """A function of (batch_size, order) that gives the responses, in the prompts' own order."""
    speaking = speaker(shape)
    usual = {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "num_return_sequences": 1}
    generation = tiny.settings("rl").generation.model_copy(update={**usual, **changes})

    def say(batch_size: int, order: Sequence[int] = range(9), seed: int = 0) -> list[tuple]:
        settings = generation.model_copy(update={"batch_size": batch_size})
        found = generate(speaking, tiny.encoder(), [PROMPTS[i] for i in order], settings, seed)
        n = settings.num_return_sequences
        by_prompt = {i: [a.response_ids for a in found[p * n : (p + 1) * n]] for p, i in enumerate(order)}
        return [by_prompt[i] for i in sorted(by_prompt)]

    return say


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_responses(shape: str) -> None:
    say = sayer(shape, do_sample=False)
    alone = say(1)
    assert say(5) == alone == say(9, ORDER)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_responses(shape: str) -> None:
    """The same random numbers meet the same distribution, whoever else is asked."""
    say = sayer(shape, do_sample=True, num_return_sequences=2)
    alone = say(1)
    assert say(5) == alone == say(9, ORDER)
    assert say(4, range(3, 9)) == alone[3:]  # without the first three
    assert all(first != second for first, second in alone)
    assert say(5, seed=1) != alone
