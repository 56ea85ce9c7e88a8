"""Loading and saving: adapters that the next stage opens, reward models that read by length, mistakes in one line."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipeline.config.sections import ModelSettings
from pipeline.data.batching import Packing, collate
from pipeline.errors import UserError
from pipeline.models import build, checks, loading, writing
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy, RewardModel
from pipeline.models.start_check import check_head
from pipeline.models.trained_input import INPUT_FILE, TrainedInput, save_input
from pipeline.records import Batch, Item
from pipeline.trainer.model import build_policy
from reward_models import learned
from tests import tiny

SHAPES = tiny.SHAPES


def batch_of(policy: Policy | RewardModel, items: list[Item], *indices: int) -> Batch:
    whole = isinstance(policy, RewardModel)
    packing = Packing(None, 10**6, policy.encoder_decoder, tiny.PAD_ID, whole)
    return collate(items, indices or range(len(items)), packing)


# LoRA


def saved(tmp_path: Path, shape: str) -> ModelSettings:
    """Settings that load a saved random model."""
    model = tiny.language_model(shape)
    writing.save(tmp_path / shape, model, model.state_dict(), tiny.tokenizer())
    return tiny.settings("sft").model.model_copy(update={"path": str(tmp_path / shape)})


def with_lora(settings: ModelSettings) -> ModelSettings:
    return settings.model_copy(update={"lora": settings.lora.model_copy(update={"r": 4})})


def take_step(module: torch.nn.Module, output: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    output.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_own(directory: Path, module: Policy | RewardModel) -> str:
    writing.save(directory, module.model, module.model.state_dict(), tiny.tokenizer())
    return str(directory)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_trains_the_adapters_and_nothing_else(tmp_path: Path, shape: str) -> None:
    settings, items = saved(tmp_path, shape), tiny.items(4)
    plain = Policy(loading.load_policy(settings, tiny.tokenizer(), 0), 64).eval()
    policy = Policy(loading.load_policy(with_lora(settings), tiny.tokenizer(), 0), 64).eval()
    batch = batch_of(policy, items)
    tiny.close(policy(batch), plain(batch))  # B starts at zero
    check_head(policy, batch_of(policy, items, 0))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    take_step(policy, policy(batch))
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_B" in name for name in moved)  # A has no gradient while B is zero
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_are_what_the_next_stage_opens(tmp_path: Path, shape: str) -> None:
    settings, items = saved(tmp_path, shape), tiny.items(4)
    policy = Policy(loading.load_policy(with_lora(settings), tiny.tokenizer(), 0), 64).eval()
    batch = batch_of(policy, items)
    take_step(policy, policy(batch))
    first = settings.model_copy(update={"path": save_own(tmp_path / "first", policy)})
    targets = json.loads((tmp_path / "first" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 5 and targets == sorted(targets)  # the same bytes from every process
    opened = Policy(loading.load_policy(first, tiny.tokenizer(), 0), 64).eval()
    tiny.close(opened(batch), policy(batch))
    # adapters upon adapters: the second belong to the first, not to the model below them
    on_top = Policy(loading.load_policy(with_lora(first), tiny.tokenizer(), 0), 64).eval()
    take_step(on_top, -on_top(batch))
    second = settings.model_copy(update={"path": save_own(tmp_path / "second", on_top)})
    reopened = Policy(loading.load_policy(second, tiny.tokenizer(), 0), 64).eval()
    tiny.close(reopened(batch), on_top(batch))
    assert not torch.allclose(reopened(batch), opened(batch), atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_of_a_reward_model_keep_their_head(tmp_path: Path, shape: str) -> None:
    settings, items = saved(tmp_path, shape), tiny.items(4)
    policy = Policy(loading.load_policy(with_lora(settings), tiny.tokenizer(), 0), 64).eval()
    take_step(policy, policy(batch_of(policy, items)))
    sft = settings.model_copy(update={"path": save_own(tmp_path / "sft", policy)})
    scorer = RewardModel(loading.load_scalar(with_lora(sft), tiny.tokenizer(), 0, new_head=True)).eval()
    batch = batch_of(scorer, items)
    if not policy.encoder_decoder:  # the adapters of the policy are in the reward model's body
        states = hugging_face(scorer.model).base_model(input_ids=batch.input_ids).last_hidden_state
        ours, there = policy(batch_of(policy, items), output="states"), batch.input_mask
        tiny.close(ours[there], states[there], 256)  # merged and not
    for _ in range(3):
        take_step(scorer, scorer(batch))
    path = save_own(tmp_path / "reward", scorer)
    opened = RewardModel(loading.load_scalar(sft.model_copy(update={"path": path}), tiny.tokenizer(), 0, False)).eval()
    tiny.close(opened(batch), scorer(batch), 256)
    assert opened(batch).abs().min() > 1e-3
    with pytest.raises(UserError, match="belong to a reward model, wanted a policy's"):
        loading.load_policy(sft.model_copy(update={"path": path}), tiny.tokenizer(), 0)
    with pytest.raises(UserError, match=r"no scalar head .* bash run\.sh stage=reward"):
        loading.load_scalar(sft, tiny.tokenizer(), 0, new_head=False)


def test_adapters_need_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.r: .* give model="):
        loading.load_policy(with_lora(tiny.settings("sft").model), tiny.tokenizer(), 0)
    wrong = with_lora(saved(tmp_path, "llama"))
    wrong = wrong.model_copy(update={"lora": wrong.lora.model_copy(update={"target_modules": ["q_prj"]})})
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: "):
        loading.load_policy(wrong, tiny.tokenizer(), 0)


# the type of what is saved


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_saved_in_the_type_asked_for(tmp_path: Path, shape: str) -> None:
    model = tiny.language_model(shape)
    weights = model.state_dict()
    writing.save(tmp_path / "half", model, weights, tiny.tokenizer(), dtype=torch.float16)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "half")
    assert (config["dtype"], theirs.dtype, model.dtype) == ("float16", torch.float16, torch.float32)
    for name, weight in theirs.state_dict().items():  # T5 reads its `wo` in float32 whatever the file says
        wanted = weights[name] if shape == "t5" and ".wo." in name else weights[name].half()
        assert weight.dtype == wanted.dtype and torch.equal(weight, wanted), name


def test_what_is_saved_in_another_type_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bfloat16 checkpoint trained in float32: saved so, unless asked otherwise; adapters are saved as trained."""
    start = tiny.language_model("llama").bfloat16()
    writing.save(tmp_path / "start", start, start.state_dict(), tiny.tokenizer())
    settings = tiny.settings("sft", "data.max_prompt_length=32", "data.max_response_length=32")
    own = settings.model.model_copy(update={"path": str(tmp_path / "start")})
    lora = with_lora(own)
    for model, kind, words in (
        (own, torch.float32, "trained and saved in float32, twice the bytes: model.save_dtype=bfloat16 halves that"),
        (own.model_copy(update={"save_dtype": "bfloat16"}), torch.bfloat16, "less than 0.39% of a weight"),
        (lora.model_copy(update={"save_dtype": "bfloat16"}), torch.float32, ""),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="tiffin"):
            policy = build_policy(settings, tiny.ranks(), model)
        assert words in caplog.text and (words or "bfloat16" not in caplog.text)
        trained = policy.engine.module.model
        with torch.no_grad():
            torch._foreach_add_([p for p in trained.parameters() if p.requires_grad], 1e-5)
        policy.export(tmp_path / "model")
        (file,) = (tmp_path / "model").glob("*.safetensors")
        assert {weight.dtype for weight in load_file(file).values()} == {kind}


# reward models

READ = TrainedInput(template=tiny.PLAIN, max_prompt_length=16, keep_of_prompt="end", max_response_length=24)


def scorer_of(tmp_path: Path, shape: str) -> tuple[RewardModel, str]:
    """A reward model with random weights and the directory it was saved to, as stage=reward does."""
    model = loading.load_scalar(saved(tmp_path, shape), tiny.tokenizer(), 0, new_head=True)
    head = dict(model.named_children()).get("score", dict(model.named_children()).get("classification_head"))
    tiny.spread(head, scale=1.0)
    directory = tmp_path / "scorer"
    encoder = tiny.encoder(READ.max_prompt_length, READ.max_response_length, prompt="Q {prompt} A")
    writing.save(directory, model, model.state_dict(), tiny.tokenizer(), partial(save_input, encoder=encoder))
    return RewardModel(model).eval(), str(directory)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_scores_do_not_depend_on_mates_or_padding(tmp_path: Path, shape: str) -> None:
    scorer, directory = scorer_of(tmp_path, shape)
    items = tiny.items(6)
    items[2] = replace(items[2], rows=(tiny.row(range(5, 9), range(9, 14)),))  # cut: no EOS
    items[3] = replace(items[3], rows=(tiny.row([5, 2, 6], [7, 2]),))  # an EOS in the prompt
    together = scorer(batch_of(scorer, items))
    assert together.std() > 0.05
    theirs = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    for i, item in enumerate(items):
        alone = scorer(batch_of(scorer, items, i))[0]
        tiny.close(together[i], alone, of=together)
        ids = [*item.rows[0].prompt_ids, *item.rows[0].response_ids]
        padded = torch.tensor([ids + [tiny.PAD_ID] * 5])
        mask = torch.arange(len(ids) + 5)[None] < len(ids)
        tiny.close(scorer.score(padded, mask)[0], alone, of=together)
        if i != 2 or shape in ("llama", "gpt2"):  # encoder-decoders of transformers cannot read a row without EOS
            expected = theirs(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, 0]
            tiny.close(alone, expected, of=together)


@torch.no_grad()
def test_the_head_of_a_half_precision_model_is_exact() -> None:
    """What 60 texts are told apart by: the head of transformers rounds its scores to 8 bits."""
    config = tiny.language_model("llama").config
    config.num_labels = 1
    model = tiny.spread(AutoModelForSequenceClassification.from_config(config)).bfloat16()
    scorer, items = RewardModel(model.eval()), tiny.items(60)
    scores = torch.stack([scorer(batch_of(scorer, items, i))[0] for i in range(60)])
    rows = [torch.tensor([[*item.rows[0].prompt_ids, *item.rows[0].response_ids]]) for item in items]
    last = torch.stack([model.model(ids).last_hidden_state[0, -1] for ids in rows])
    tiny.close(scores, last.float() @ model.score.weight[0].float())
    assert len(set(scores.tolist())) == 60 > len(set((last @ model.score.weight[0]).tolist()))


@torch.no_grad()
def test_positions_behind_the_padding_tokens() -> None:
    """RoBERTa's padding token is 1: of 16 places the first two are never used, and 15 tokens are one too many."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=tiny.V, max_position_embeddings=16, pad_token_id=1, num_labels=1, **sizes)
    scorer = RobertaForSequenceClassification(config).eval()
    ids = torch.full((1, 15), 5)
    assert checks.positions(scorer) == 14 and scorer(input_ids=ids[:, :14]).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        scorer(input_ids=ids)
    with pytest.raises(UserError, match="the model has 14 positions"):
        checks.check_positions(scorer, 7, 8, whole=True)


def load_learned(directory: str, batch_size: int, max_length: int = 64):
    model = tiny.settings("sft").model
    return learned.load(directory, model, tiny.PLAIN, max_length, batch_size, torch.device("cpu"))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_learned_reward_is_the_same_in_any_company(tmp_path: Path, shape: str) -> None:
    _, directory = scorer_of(tmp_path, shape)
    prompts = [" ".join(tiny.WORDS[: 1 + i % 9]) for i in range(9)]
    completions = [" ".join(tiny.WORDS[i % 5 : 2 * i]) for i in range(9)]
    alone = load_learned(directory, 1)(prompts, completions)
    tiny.close(load_learned(directory, 7)(prompts, completions), alone)
    order = [4, 1, 8, 0, 3, 7, 2, 6, 5]
    mixed = load_learned(directory, 7)([prompts[i] for i in order], [completions[i] for i in order])
    tiny.close(mixed, [alone[i] for i in order])
    assert load_learned(directory, 4)([], []) == []


def test_a_reward_model_reads_as_it_was_trained(tmp_path: Path) -> None:
    """The template and the limits beside the weights count, not the caller's, which are for models from elsewhere."""
    scorer, directory = scorer_of(tmp_path, "llama")
    prompt, completion = " ".join(tiny.WORDS * 3), " ".join(tiny.WORDS * 2)
    encoder = tiny.encoder(READ.max_prompt_length, READ.max_response_length, prompt="Q {prompt} A")
    row = encoder.encode(prompt, completion)
    assert row.cut_prompt and row.cut_response
    expected = float(scorer(batch_of(scorer, [Item(None, (row,))]))[0])
    for max_length in (4, 1024):
        found = load_learned(directory, 4, max_length)([prompt, "a"], [completion, "cat"])
        tiny.close(found[0], expected, of=found)
    (Path(directory) / INPUT_FILE).unlink()
    assert load_learned(directory, 4, 1024)([prompt], [completion])[0] != pytest.approx(expected, rel=1e-3)


def test_a_learned_reward_reads_chat_prompts(tmp_path: Path) -> None:
    _, directory = scorer_of(tmp_path, "llama")
    reward = load_learned(directory, 4)
    turns = [{"role": "user", "content": text} for text in ("the cat", "sat", "and")]
    turns[1]["role"] = "assistant"
    chat = reward(["ignored"], ["ran"], raw_prompt=[turns])
    assert chat == reward(["other"], ["ran"], raw_prompt=[turns]) and chat != reward(["ignored"], ["ran"])


def test_long_texts_lose_the_prompts_beginning_first() -> None:
    encoder = tiny.encoder(100, 100)
    prompt, completion = " ".join(tiny.WORDS), "sat on a mat"
    row = encoder.encode(prompt, completion)
    n = len(row.response_ids)
    assert learned.read_as_trained(encoder, prompt, completion, 100) == row.prompt_ids + row.response_ids
    assert learned.read_as_trained(encoder, prompt, completion, n + 3) == row.prompt_ids[-3:] + row.response_ids
    assert learned.read_as_trained(encoder, prompt, completion, n) == row.response_ids
    short = tiny.encoder(n - 2, n - 2)
    assert learned.read_as_trained(short, prompt, completion, n - 2) == row.response_ids[: n - 2]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_policy_is_no_reward_model(tmp_path: Path, shape: str) -> None:
    path = saved(tmp_path, shape).path
    with pytest.raises(UserError) as error:
        load_learned(path, 1)
    assert "no scalar head" in str(error.value) and "bash run.sh stage=reward" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_first_scores_of_a_new_decoder_are_zero(tmp_path: Path) -> None:
    for settings in (saved(tmp_path, "llama"), tiny.settings("sft").model):
        scorer = RewardModel(loading.load_scalar(settings, tiny.tokenizer(), 0, new_head=True)).eval()
        rows = [tiny.encoder().encode("the cat", text) for text in ("sat", "ran far away")]
        assert scorer(batch_of(scorer, [Item(None, (row,)) for row in rows])).tolist() == [0.0, 0.0]


# loading


def test_model_mistakes(tmp_path: Path) -> None:
    settings = tiny.settings("sft").model
    nowhere = settings.model_copy(update={"path": "./nowhere"})
    with pytest.raises(UserError, match=r"model\.path: \./nowhere does not exist"):
        loading.load_policy(nowhere, tiny.tokenizer(), 0)
    with pytest.raises(UserError, match=r"has no config\.json"):
        loading.load_policy(settings.model_copy(update={"path": str(tmp_path)}), tiny.tokenizer(), 0)
    small = tiny.language_model("llama", vocab_size=64)
    writing.save(tmp_path / "small", small, small.state_dict(), tiny.tokenizer())
    with pytest.raises(UserError, match=r"has 64 embeddings but its tokenizer has \d+ tokens"):
        loading.load_policy(settings.model_copy(update={"path": str(tmp_path / "small")}), tiny.tokenizer(), 0)


@pytest.mark.parametrize("shape", ["llama", "t5", "bart"])
def test_scratch_models(shape: str) -> None:
    settings = tiny.settings("sft").model
    sizes = {"shape": shape, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    settings = settings.model_copy(update={"scratch": settings.scratch.model_copy(update=sizes)})
    first, again, other = (loading.load_policy(settings, tiny.tokenizer(), seed) for seed in (1, 1, 2))
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].shape[0] % 64 == 0 and weights[0].shape[0] >= len(tiny.tokenizer())
    assert first.config.eos_token_id == tiny.EOS_ID and first.config.pad_token_id == tiny.PAD_ID
    policy = Policy(first, 64)
    check_head(policy, batch_of(policy, tiny.items(2), 0))


def test_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    """Under LoRA too, where the inputs of the first layer carry no gradient by themselves."""
    gradients = []
    for checkpointing in (False, True):
        lm = loading.load_policy(with_lora(saved(tmp_path, "llama")), tiny.tokenizer(), 0)
        build.enable_checkpointing(lm, tiny.train_settings(gradient_checkpointing=checkpointing))
        policy = Policy(lm, 64).train()
        policy(batch_of(policy, tiny.items(3))).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0]
    tiny.close(gradients[1], gradients[0])
