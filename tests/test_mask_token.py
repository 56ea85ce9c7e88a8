"""The mask token: chosen without harm, given a row, learned under LoRA, never said."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers import models as pieces
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Tokenizer,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Tokenizer,
)

from pipeline.config.sections import ModelSettings
from pipeline.data.batching import Packing, collate
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.models import checks, loading, mask_token, scratch, tokenizers, writing
from pipeline.models.policy import Policy, RewardModel
from pipeline.models.start_check import check_head
from pipeline.records import Example, Item
from pipeline.rollout.generate import generate
from pipeline.trainer import engine
from tests import tiny

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
SHAPES = (*tiny.SHAPES, "pegasus", "qwen2", "llama_untied")
TEXT = "the cat sat on a mat, and a dog ran far away."


def plain() -> PreTrainedTokenizerBase:
    """A new scratch tokenizer: `tiny.tokenizer` is shared by all tests and must not be touched."""
    return scratch.train_tokenizer([" ".join(tiny.WORDS)] * 4, tiny.V)


def masked() -> PreTrainedTokenizerBase:
    return mask_token.with_mask(plain())


ROWS = len(plain())  # of a model that has no row to spare
MASK_ID = ROWS
GROWN = -(-(ROWS + 1) // 64) * 64


def language_model(shape: str, rows: int) -> PreTrainedModel:
    """A random model with `rows` embeddings."""
    ids = {"pad_token_id": tiny.PAD_ID, "bos_token_id": 1, "eos_token_id": tiny.EOS_ID, "vocab_size": rows}
    torch.manual_seed(0)
    if shape in ("pegasus", "marian"):
        sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        start = {"decoder_start_token_id": 0, "forced_eos_token_id": None, "dropout": 0.0, "scale_embedding": True}
        if shape == "marian":
            model = MarianMTModel(MarianConfig(**sizes, **layers, **start, **ids, decoder_vocab_size=rows))
            model.final_logits_bias.copy_(torch.randn(1, rows))
        else:
            model = PegasusForConditionalGeneration(PegasusConfig(**sizes, **layers, **start, **ids))
        return tiny.spread(model, 0.1).eval()
    if shape == "qwen2":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Qwen2Config(**sizes, **ids, num_key_value_heads=1, tie_word_embeddings=True)
        return tiny.spread(Qwen2ForCausalLM(config)).eval()
    if shape == "llama_untied":
        return tiny.language_model("llama", vocab_size=rows, tie_word_embeddings=False)
    model = tiny.language_model(shape, vocab_size=rows)
    if shape == "bart":
        model.final_logits_bias.copy_(torch.randn(1, rows))
    return model


def saved(tmp_path: Path, shape: str, rows: int, tokenizer: PreTrainedTokenizerBase | None = None) -> ModelSettings:
    """Settings that load a saved random model."""
    model = language_model(shape, rows)
    writing.save(tmp_path / "base", model, model.state_dict(), plain() if tokenizer is None else tokenizer)
    return opened_at(tmp_path / "base")


def opened_at(path: Path) -> ModelSettings:
    return tiny.settings("sft").model.model_copy(update={"path": str(path)})


def with_lora(settings: ModelSettings) -> ModelSettings:
    return settings.model_copy(update={"lora": settings.lora.model_copy(update={"r": 4})})


@torch.no_grad()
def logits_of(model: nn.Module, mask_id: int | None = None) -> Tensor:
    """(1, 6, V) of a response that reads the mask at one place, if it is given."""
    response = torch.tensor([[5, 9, 7 if mask_id is None else mask_id, 8, 6, 11]])
    if loading.hugging_face(model).config.is_encoder_decoder:
        return model(input_ids=torch.tensor([[9, 12, 7, 2]]), decoder_input_ids=response).logits
    return model(input_ids=response, use_cache=False).logits


# the token


def test_a_scratch_vocabulary_gets_a_last_token(tmp_path: Path) -> None:
    before, after = plain(), masked()
    assert (after.mask_token, after.mask_token_id, len(after)) == ("<mask>", len(before), len(before) + 1)
    assert {name: i for name, i in after.get_vocab().items() if name != "<mask>"} == before.get_vocab()
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert after.decode([7, after.mask_token_id, 9], skip_special_tokens=True) == after.decode([7, 9])
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.mask_token_id, len(again)) == (after.mask_token_id, len(after))
    assert mask_token.with_mask(again).get_vocab() == after.get_vocab()


def test_a_tokenizer_is_masked_only_when_asked(tmp_path: Path) -> None:
    settings = saved(tmp_path, "llama", ROWS)
    assert tokenizers.load_tokenizer(settings, []).mask_token is None
    assert tokenizers.load_tokenizer(settings, [], mask=True).mask_token_id == ROWS
    new = tiny.settings("sft").model
    texts = [TEXT] * 4
    assert tokenizers.load_tokenizer(new, texts).mask_token is None
    assert tokenizers.load_tokenizer(new, texts, mask=True).mask_token == "<mask>"


def words(*extra: str, **roles: str) -> PreTrainedTokenizerBase:
    """A tokenizer of words with `extra` ones at its end: a 0, b 1, </s> 2, then those."""
    vocabulary = {word: i for i, word in enumerate(["a", "b", "</s>", *extra])}
    tokenizer = Tokenizer(pieces.WordLevel(vocabulary, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="</s>", **roles)


@pytest.mark.parametrize(
    ("tokenizer", "name", "mask_id"),
    [
        (words("<mask>", "<extra_id_0>", mask_token="<mask>"), "<mask>", 3),  # BART: its own
        (words("<mask_2>", mask_token="<mask_2>"), "<mask_2>", 3),  # Pegasus: its own
        (words("x", "<extra_id_0>"), "<extra_id_0>", 4),  # T5
        (words("<|reserved_special_token_0|>", pad_token="b"), "<|reserved_special_token_0|>", 3),  # Llama 3
        (words("<unused0>", pad_token="<unused0>"), "<mask>", 4),  # what pads is not free
        (words("x", mask_token="</s>"), "<mask>", 4),  # what ends is not either
    ],
)
def test_a_vocabulary_that_has_one_to_spare_does_not_grow(
    tokenizer: PreTrainedTokenizerBase, name: str, mask_id: int, tmp_path: Path
) -> None:
    after = mask_token.with_mask(tokenizer)
    assert (after.mask_token, after.mask_token_id) == (name, mask_id)
    assert mask_id not in (after.pad_token_id, after.eos_token_id, after.unk_token_id)
    after.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == mask_id


def test_real_vocabularies(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip("the shared tokenizers are not here")
    t5 = T5Tokenizer.from_pretrained(DATA / "t5-v1_1")
    before, length = t5(TEXT)["input_ids"], len(t5)
    mask_token.with_mask(t5)
    assert (t5.mask_token_id, len(t5)) == (32099, length)  # as in the released runs
    assert t5(TEXT)["input_ids"] == before
    gpt2 = tokenizers.with_pad(GPT2Tokenizer.from_pretrained(DATA / "gpt2"))
    before = gpt2(TEXT)["input_ids"]
    mask_token.with_mask(gpt2)
    assert (gpt2.mask_token_id, len(gpt2)) == (50257, 50258)
    assert gpt2(TEXT)["input_ids"] == before
    for tokenizer in (t5, gpt2):
        tokenizer.save_pretrained(tmp_path / tokenizer.mask_token.strip("<>"))
        again = tokenizers.load_tokenizer(opened_at(tmp_path / tokenizer.mask_token.strip("<>")), [])
        assert (again.mask_token_id, len(again)) == (tokenizer.mask_token_id, len(tokenizer))
        assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


# its row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, "marian"])
def test_a_full_matrix_grows_by_means(tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    settings = saved(tmp_path, shape, ROWS)
    old = loading.load_policy(settings, plain(), 0, dtype)
    new = loading.load_policy(settings, masked(), 0, dtype, mask=True)
    assert new.config.vocab_size == GROWN and GROWN % 64 == 0 and GROWN > ROWS
    matrices = [new.get_input_embeddings().weight, new.get_output_embeddings().weight]
    for weight, first in zip(matrices, [old.get_input_embeddings(), old.get_output_embeddings()], strict=True):
        assert weight.shape[0] == GROWN and weight.dtype == dtype and weight.requires_grad
        assert torch.equal(weight[:ROWS], first.weight)
        mean = first.weight.double().mean(0).to(dtype)
        assert torch.equal(weight[ROWS:], mean.expand(GROWN - ROWS, -1))
    assert (matrices[0] is matrices[1]) == (shape != "llama_untied")
    before, after = logits_of(old), logits_of(new)
    assert after.shape[-1] == GROWN and after.dtype == before.dtype
    if dtype == torch.float32:  # the same numbers, by a kernel that may cut the matrix elsewhere
        tiny.close(after[..., :ROWS], before)
        # the mean of the old logits: at most one part in ROWS of the probability, by Jensen
        tiny.close(after[..., MASK_ID], before.mean(-1), of=before)
    assert shared_names(new) == shared_names(old)


def shared_names(model: PreTrainedModel) -> set[str]:
    """Under which names the input embeddings are known."""
    weight = model.get_input_embeddings().weight
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight}


@pytest.mark.parametrize("shape", [*SHAPES, "marian"])
def test_a_grown_model_is_reopened_as_it_was(tmp_path: Path, shape: str) -> None:
    model = loading.load_policy(saved(tmp_path, shape, ROWS), masked(), 0, mask=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[MASK_ID] += 0.5  # learned
    writing.save(tmp_path / "sft", model, model.state_dict(), masked())
    settings = opened_at(tmp_path / "sft")
    tokenizer = tokenizers.load_tokenizer(settings, [])
    assert tokenizer.mask_token_id == MASK_ID
    for mask in (True, False):
        again = loading.load_policy(settings, tokenizer, 0, mask=mask)
        assert torch.equal(logits_of(again, MASK_ID), logits_of(model, MASK_ID))
    policy = Policy(again, 64)
    check_head(policy, collate(tiny.items(1), [0], Packing(1, None, policy.encoder_decoder, tiny.PAD_ID)))


@pytest.mark.parametrize("shape", ["qwen2", "llama_untied"])
def test_a_spare_row_becomes_the_mean_and_nothing_grows(tmp_path: Path, shape: str) -> None:
    settings = saved(tmp_path, shape, ROWS + 10)
    old = loading.load_policy(settings, plain(), 0)
    new = loading.load_policy(settings, masked(), 0, mask=True)
    first, weight = old.get_input_embeddings().weight, new.get_input_embeddings().weight
    others = torch.arange(ROWS + 10) != MASK_ID
    assert torch.equal(weight[others], first[others])
    assert torch.equal(weight[MASK_ID], first[:ROWS].double().mean(0).float())  # of tokens, not of spare rows
    assert shape == "qwen2" or torch.equal(new.lm_head.weight, old.lm_head.weight)


def test_what_pretraining_taught_the_mask_stays(tmp_path: Path) -> None:
    own = plain()
    own.add_special_tokens({"mask_token": "<mask>"})
    hole = plain()
    hole.add_tokens([AddedToken("<extra_id_0>", special=True)])
    for tokenizer in (own, hole):
        settings = saved(tmp_path, "t5", ROWS + 10, tokenizer)
        model = loading.load_policy(settings, tokenizers.load_tokenizer(settings, [], mask=True), 0, mask=True)
        assert torch.equal(model.shared.weight, language_model("t5", ROWS + 10).shared.weight)


def test_a_reserved_token_starts_as_the_mean(tmp_path: Path) -> None:
    tokenizer = plain()
    tokenizer.add_tokens([AddedToken("<|reserved_special_token_0|>", special=True), AddedToken("<x>", special=True)])
    settings = saved(tmp_path, "llama", ROWS + 2, tokenizer)
    model = loading.load_policy(settings, tokenizers.load_tokenizer(settings, [], mask=True), 0, mask=True)
    first = language_model("llama", ROWS + 2).get_input_embeddings().weight
    assert model.config.vocab_size == ROWS + 2
    others = torch.arange(ROWS + 2) != ROWS
    assert torch.equal(model.get_input_embeddings().weight[others], first[others])
    assert torch.equal(model.get_input_embeddings().weight[ROWS], first[others].double().mean(0).float())


def test_only_a_mask_makes_a_model_grow(tmp_path: Path) -> None:
    settings = saved(tmp_path, "llama", ROWS)
    two = plain()
    two.add_tokens(["one"])
    for tokenizer, mask in ((copy.deepcopy(two), False), (mask_token.with_mask(two), False), (two, True)):
        with pytest.raises(UserError, match=rf"has {ROWS} embeddings but its tokenizer has \d+ tokens"):
            loading.load_policy(settings, tokenizer, 0, mask=mask)


@pytest.mark.parametrize("mask", [False, True])
def test_a_checkpoint_for_summaries_opens_and_speaks_as_elsewhere(tmp_path: Path, mask: bool) -> None:
    """As BART's: its mask token has no row, and `generate` of transformers makes it say BOS before all else."""
    model = language_model("bart", ROWS)
    model.generation_config.update(forced_bos_token_id=1)
    writing.save(tmp_path / "base", model, model.state_dict(), masked())
    settings = opened_at(tmp_path / "base")
    tokenizer = tokenizers.load_tokenizer(settings, [], mask)
    policy = loading.load_policy(settings, tokenizer, 0, mask=mask)
    assert policy.config.vocab_size == GROWN
    writing.save(tmp_path / "sft", policy, policy.state_dict(), tokenizer)

    speech = tiny.settings("rl").generation.model_copy(update={"max_new_tokens": 6})
    speaker = engine.Engine(Policy(policy, 64), tiny.ranks(), tiny.train_settings(), None)
    (said,) = generate(speaker, Encoder(tokenizer, tiny.PLAIN, 64, 64), [Example("1", "a cat")], speech, 0)
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sft")
    for other in (exported, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")):
        there = other.generate(torch.tensor([said.prompt_ids]), max_new_tokens=7)[0].tolist()
        assert there == [model.config.decoder_start_token_id, 1, *said.response_ids]


def test_what_generation_forces_takes_a_place() -> None:
    model = language_model("bart", ROWS)
    limit = model.config.max_position_embeddings
    checks.check_positions(model, limit, limit, whole=False)
    model.generation_config.update(forced_bos_token_id=1)
    checks.check_positions(model, limit, limit - 1, whole=False)
    with pytest.raises(UserError, match=rf"up to {limit} tokens of response and BOS are {limit + 1} to read at once"):
        checks.check_positions(model, limit, limit, whole=False)


def test_separate_embeddings_are_refused(tmp_path: Path) -> None:
    model = tiny.language_model("bart", vocab_size=ROWS, tie_word_embeddings=False)
    writing.save(tmp_path / "base", model, model.state_dict(), plain())
    with pytest.raises(UserError, match=r"model\.path: .*base reads and writes with separate embeddings"):
        loading.load_policy(opened_at(tmp_path / "base"), masked(), 0, mask=True)


def test_a_new_model_has_room_for_its_mask() -> None:
    tokenizer = masked()
    model = loading.load_policy(tiny.settings("sft").model, tokenizer, 0, mask=True)
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size > tokenizer.mask_token_id


# LoRA


def learn(model: nn.Module) -> None:
    """Three large steps on a loss that sees the mask and the whole vocabulary."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    response = torch.tensor([[5, MASK_ID, 7, MASK_ID, 6, 11]])
    read = {"input_ids": response, "labels": response}
    if loading.hugging_face(model).config.is_encoder_decoder:
        labels = torch.tensor([[9, 8, 7, 6, 5, 2]])
        read = {"input_ids": torch.tensor([[9, 12, 7, 2]]), "decoder_input_ids": response, "labels": labels}
    for _ in range(3):
        model(**read).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rows", [ROWS, ROWS + 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_learn_the_row_and_come_back(tmp_path: Path, shape: str, rows: int) -> None:
    settings, tokenizer = saved(tmp_path, shape, rows), masked()
    base = loading.load_policy(settings, tokenizer, 0, mask=True)
    first = loading.load_policy(with_lora(settings), tokenizer, 0, mask=True)
    assert torch.equal(logits_of(first, MASK_ID), logits_of(base, MASK_ID))
    trained = [name for name, p in first.named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(trained) == 1 and "trainable_tokens_delta" in trained[0]
    learn(first)
    row = first.get_parameter(trained[0])[0]
    assert not torch.allclose(row, base.get_input_embeddings().weight[MASK_ID], atol=1e-3)
    writing.save(tmp_path / "sft", first, first.state_dict(), tokenizer)
    with safe_open(tmp_path / "sft" / "adapter_model.safetensors", "pt") as file:
        others = [name for name in file.keys() if "lora_" not in name]  # noqa: SIM118  (safe_open is no mapping)
        assert others == [trained[0].removesuffix(".default")]  # the row, not the matrix
    # the next stage's policy, which does or does not go on learning the mask
    below = opened_at(tmp_path / "sft")
    again = tokenizers.load_tokenizer(below, [])
    assert again.mask_token_id == MASK_ID
    for mask in (True, False):
        opened = loading.load_policy(below, again, 0, mask=mask)
        assert torch.equal(opened.get_input_embeddings().weight[MASK_ID], row)
        tiny.close(logits_of(opened, MASK_ID), logits_of(first, MASK_ID))
        on_top = loading.load_policy(with_lora(below), again, 0, mask=mask)
        reference = loading.load_policy(with_lora(below), again, 0, mask=mask, frozen=True)
        assert torch.equal(logits_of(on_top, MASK_ID), logits_of(reference, MASK_ID))
        assert mask == any("trainable_tokens" in name for name, p in on_top.named_parameters() if p.requires_grad)
        learn(on_top)
        writing.save(tmp_path / "rl", on_top, on_top.state_dict(), again)
        last = loading.load_policy(opened_at(tmp_path / "rl"), again, 0)
        tiny.close(logits_of(last, MASK_ID), logits_of(on_top, MASK_ID), 256)  # merged and not
        assert not torch.allclose(logits_of(last, MASK_ID), logits_of(opened, MASK_ID), atol=1e-2)


def test_plain_adapters_train_no_row(tmp_path: Path) -> None:
    """A tokenizer that brings its mask changes nothing for those who do not mask."""
    model = loading.load_policy(with_lora(saved(tmp_path, "bart", ROWS + 10, masked())), masked(), 0)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_row_is_learned_once(tmp_path: Path) -> None:
    settings = with_lora(saved(tmp_path, "llama", ROWS))
    both = settings.lora.model_copy(update={"target_modules": ["embed_tokens", "q_proj"]})
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: trainable_token_indices .* wanted all-linear"):
        loading.load_policy(settings.model_copy(update={"lora": both}), masked(), 0, mask=True)


def test_a_reward_model_starts_from_grown_adapters(tmp_path: Path) -> None:
    policy = loading.load_policy(with_lora(saved(tmp_path, "llama", ROWS)), masked(), 0, mask=True)
    learn(policy)
    writing.save(tmp_path / "sft", policy, policy.state_dict(), masked())
    below = opened_at(tmp_path / "sft")
    scorer = RewardModel(loading.load_scalar(with_lora(below), masked(), 0, new_head=True)).eval()
    items = [Item(None, (tiny.row([5, 6], [7, MASK_ID, 2]),))]
    batch = collate(items, [0], Packing(1, None, False, tiny.PAD_ID, True))
    with torch.no_grad():
        torch.nn.init.normal_(loading.hugging_face(scorer.model).score.weight)
        wanted = scorer(batch)
    writing.save(tmp_path / "reward", scorer.model, scorer.model.state_dict(), masked())
    opened = RewardModel(loading.load_scalar(opened_at(tmp_path / "reward"), masked(), 0, False)).eval()
    tiny.close(opened(batch), wanted)


# its silence


def shouting(shape: str, tokenizer: PreTrainedTokenizerBase) -> engine.Engine:
    """A model that would say nothing but the mask and ids of no token."""
    lm = language_model(shape, ROWS + 10)
    lm.get_output_embeddings().register_forward_hook(lambda _, __, out: loud(out))
    return engine.Engine(Policy(lm, 64), tiny.ranks(), tiny.train_settings(), None)


def loud(logits: Tensor) -> Tensor:
    return torch.where(torch.arange(logits.shape[-1]) >= MASK_ID, 1e4, logits)


WAYS = [
    {"do_sample": False, "num_beams": 1},
    {"do_sample": True, "num_beams": 1, "temperature": 2.0, "top_p": 0.9, "top_k": 5},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": True, "num_beams": 3, "top_k": 5},
]


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("shape", ["llama", "bart"])
def test_the_mask_is_never_said(shape: str, ways: dict) -> None:
    tokenizer = masked()
    encoder = Encoder(tokenizer, tiny.PLAIN, 64, 64)
    usual = {"max_new_tokens": 6, "batch_size": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    settings = tiny.settings("rl").generation.model_copy(update={**usual, **ways})
    prompts = [Example(str(i), " ".join(tiny.WORDS[: 1 + i])) for i in range(4)]
    answers = generate(shouting(shape, tokenizer), encoder, prompts, settings, seed=0)
    said = {i for answer in answers for i in answer.response_ids}
    assert said and max(said) < MASK_ID
    if not ways["do_sample"] and ways["num_beams"] == 1:  # without a mask token nothing is forbidden
        free = generate(shouting(shape, tokenizer), tiny.encoder(), prompts, settings, seed=0)
        assert max(i for answer in free for i in answer.response_ids) >= MASK_ID


@pytest.mark.parametrize("lora", [False, True])
def test_exports_tell_other_tools_to_be_silent(tmp_path: Path, lora: bool) -> None:
    settings = saved(tmp_path, "llama", ROWS)
    assert GenerationConfig.from_pretrained(settings.path).suppress_tokens is None
    model = loading.load_policy(with_lora(settings) if lora else settings, masked(), 0, mask=True)
    writing.save(tmp_path / "sft", model, model.state_dict(), masked())
    suppressed = json.loads((tmp_path / "sft" / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == list(range(MASK_ID, GROWN))
    assert model.generation_config.suppress_tokens is None
