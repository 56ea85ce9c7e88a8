"""Adapters as others load them: with peft alone, from any directory, they say what training saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pipeline.config.sections import ModelSettings
from pipeline.data.batching import Packing, collate
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.models import factors, loading, tokenizers, writing
from pipeline.models.policy import Policy, RewardModel
from pipeline.records import Batch, Example, Item
from pipeline.rollout.generate import generate
from pipeline.trainer.engine import Engine
from tests import tiny

ROWS = len(tiny.tokenizer())  # of a model that has no row to spare
ITEMS = [Item(None, (tiny.row([5, 6 + i], [*range(ROWS - 2 - i, ROWS), tiny.EOS_ID]),)) for i in range(4)]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModelSettings]:
    """Saves a random model of a shape, and names it as a user would, relative to where he is."""
    monkeypatch.chdir(tmp_path)

    def make(shape: str, **changes: Any) -> ModelSettings:
        model = tiny.language_model(shape, **changes)
        writing.save(Path("models") / shape, model, model.state_dict(), tiny.tokenizer())
        return tiny.settings("sft").model.model_copy(update={"path": f"models/{shape}"})

    return make


def at(settings: ModelSettings, path: str, r: int = 4, **lora: Any) -> ModelSettings:
    return settings.model_copy(update={"path": path, "lora": settings.lora.model_copy(update={"r": r, **lora})})


def batch_of(module: Policy | RewardModel) -> Batch:
    whole = isinstance(module, RewardModel)
    return collate(ITEMS, range(len(ITEMS)), Packing(None, 10**6, module.encoder_decoder, tiny.PAD_ID, whole))


def trained(
    settings: ModelSettings, directory: str, seed: int, mask: bool = False, dtype: torch.dtype = torch.float32
) -> Policy:
    """A policy after three steps, saved to `directory` as a stage saves it."""
    tokenizer = tokenizers.load_tokenizer(settings, [], mask)
    policy = Policy(loading.load_policy(settings, tokenizer, seed, dtype, mask), 64).eval()
    learn(policy, seed)
    save(policy, directory, tokenizer)
    return policy


def learn(module: Policy | RewardModel, seed: int = 0) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        output = module(batch_of(module))
        (output * torch.randn_like(output)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(module: Policy | RewardModel, directory: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    writing.save(Path(directory), module.model, module.model.state_dict(), tokenizer or tiny.tokenizer())


@torch.no_grad()
def logps(model: nn.Module) -> Tensor:
    """(B, T): what transformers' own forward says of ITEMS."""
    rows = []
    for item in ITEMS:
        prompt, response = (torch.tensor([ids]) for ids in (item.rows[0].prompt_ids, item.rows[0].response_ids))
        if model.config.is_encoder_decoder:
            logits = model(input_ids=prompt, labels=response).logits
        else:
            logits = model(input_ids=torch.cat([prompt, response], dim=1)).logits[:, prompt.shape[1] - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(2, response[:, :, None])[0, :, 0])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def by_peft(directory: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> list[PeftModel]:
    """What peft makes of adapters, in each of its two ways, for somebody who stands elsewhere."""
    place = str(Path(directory).absolute())
    config = json.loads((Path(place) / "adapter_config.json").read_text())
    elsewhere.mkdir(exist_ok=True)
    with monkeypatch.context() as there:
        there.chdir(elsewhere)
        if config["task_type"] == "SEQ_2_SEQ_LM":
            auto, plain = AutoPeftModelForSeq2SeqLM, AutoModelForSeq2SeqLM
        else:
            auto, plain = AutoPeftModelForCausalLM, AutoModelForCausalLM
        base = plain.from_pretrained(config["base_model_name_or_path"])
        return [auto.from_pretrained(place).eval(), PeftModel.from_pretrained(base, place).eval()]


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_rl_on_sft_is_what_peft_alone_loads(
    start: Callable, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks, scales and layers above than below."""
    settings = start(shape)
    trained(at(settings, settings.path, alpha=6.0), "sft", 1)
    few = ["c_attn"] if shape == "gpt2" else ["q", "v"] if shape == "t5" else ["q_proj", "v_proj"]
    policy = trained(at(settings, "sft", r=3, target_modules=few), "rl", 2)
    wanted = policy(batch_of(policy))
    for opened in by_peft("rl", tmp_path / "elsewhere", monkeypatch):
        tiny.close(logps(opened), wanted, 256)
    config = json.loads(Path("rl/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "models" / shape) and config["r"] == 7
    modes = {Path("rl", name).stat().st_mode for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert len(modes) == 1  # who may read the one may read the other
    for form in ({"r": 0}, {"r": 2}):  # and what the next stage opens
        again = Policy(loading.load_policy(at(settings, "rl", **form), tiny.tokenizer(), 0), 64).eval()
        tiny.close(again(batch_of(again)), wanted, 256)
    assert not torch.allclose(wanted, logps(by_peft("sft", tmp_path / "elsewhere", monkeypatch)[0]), atol=1e-2)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "bart"])
def test_a_row_for_the_mask_lies_where_peft_finds_it(
    start: Callable, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary that has no row to spare: the adapters belong to a model that has one."""
    settings = start(shape, vocab_size=ROWS)
    sft = trained(at(settings, settings.path), "sft/model", 1, mask=True)
    policy = trained(at(settings, "sft/model"), "rl/model", 2)
    for name, module in (("sft", sft), ("rl", policy)):
        for opened in by_peft(f"{name}/model", tmp_path / "elsewhere", monkeypatch):
            assert opened.get_input_embeddings().weight.shape[0] % 64 == 0
            tiny.close(logps(opened), module(batch_of(module)), 256)
    tokenizer = tokenizers.load_tokenizer(at(settings, "rl/model"), [])
    speech = tiny.settings("rl").generation.model_copy(update={"max_new_tokens": 6})
    speaker = Engine(policy, tiny.ranks(), tiny.train_settings(), None)
    (said,) = generate(speaker, Encoder(tokenizer, tiny.PLAIN, 64, 64), [Example("1", "a cat")], speech, 0)
    there = opened.generate(input_ids=torch.tensor([said.prompt_ids]), max_new_tokens=6)[0].tolist()
    assert tuple(there[1 if shape == "bart" else len(said.prompt_ids) :]) == said.response_ids
    below = tmp_path / "sft" / "lora_base"
    for name in ("sft", "rl"):
        assert json.loads(Path(f"{name}/model/adapter_config.json").read_text())["base_model_name_or_path"] == str(
            below
        )
    assert not Path("rl/lora_base").exists()


def foreign(settings: ModelSettings, directory: str, of: str | None = None, **config: Any) -> Tensor:
    """Adapters that peft made and wrote, random, on a model or on other adapters; and what they say."""
    model = AutoModelForCausalLM.from_pretrained(settings.path)
    if of is not None:
        model = PeftModel.from_pretrained(model, of).merge_and_unload()
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 2, **config}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.peft_config["default"].base_model_name_or_path = of or settings.path
    model.save_pretrained(directory)
    return logps(model.eval())


FORMS = {
    "ranks": {"rank_pattern": {"0.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 3.0}, "use_rslora": True},
    "embeddings": {"target_modules": ["embed_tokens", "up_proj"]},
    "magnitudes": {"use_dora": True},
    "rows": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_from_elsewhere_are_gone_on_with(
    start: Callable, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = start("llama", tie_word_embeddings=False)
    said = foreign(settings, "theirs", task_type="CAUSAL_LM", **FORMS[form])
    tiny.tokenizer().save_pretrained("theirs")
    for r in (0, 4):
        opened = Policy(loading.load_policy(at(settings, "theirs", r), tiny.tokenizer(), 0), 64).eval()
        tiny.close(opened(batch_of(opened)), said, 256)
    learn(opened)
    save(opened, "ours/model")
    for others in by_peft("ours/model", tmp_path / "elsewhere", monkeypatch):
        tiny.close(logps(others), opened(batch_of(opened)), 256)
    assert Path("ours/lora_base").exists() == (form in ("magnitudes", "rows"))  # no two matrices hold these


def test_adapters_that_name_adapters_are_all_read(
    start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = start("llama")
    foreign(settings, "first", task_type="CAUSAL_LM")
    said = foreign(settings, "second", of="first", task_type="CAUSAL_LM", r=3, target_modules=["k_proj", "v_proj"])
    tiny.tokenizer().save_pretrained("second")
    for r in (0, 4):
        opened = Policy(loading.load_policy(at(settings, "second", r), tiny.tokenizer(), 0), 64).eval()
        tiny.close(opened(batch_of(opened)), said, 256)
    save(opened, "third")
    tiny.close(logps(by_peft("third", tmp_path / "elsewhere", monkeypatch)[0]), said, 256)


def test_all_weights_learn_on_top_of_adapters(start: Callable) -> None:
    settings = start("bart")
    trained(at(settings, settings.path), "sft", 1)
    plain, opened = (
        {n: p.requires_grad for n, p in loading.load_policy(s, tiny.tokenizer(), 0).named_parameters()}
        for s in (settings, at(settings, "sft", 0))
    )
    assert opened == plain and all(opened.values())


def test_half_precision_keeps_what_adapters_learned(start: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """A change far below the rounding of the weights: beside them it stays, added to them it is lost, with a word."""
    settings = start("llama")
    model = loading.load_policy(at(settings, settings.path), tiny.tokenizer(), 0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    writing.save(Path("sft"), model, model.state_dict(), tiny.tokenizer())
    for form in ({"r": 4}, {"r": 0}):
        frozen = not form["r"]
        opened = loading.load_policy(at(settings, "sft", **form), tiny.tokenizer(), 0, torch.bfloat16, frozen=frozen)
        layer = opened.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        tiny.close(
            layer.get_delta_weight("below"),
            model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").get_delta_weight("default"),
        )
    assert "rounding" not in caplog.text
    loading.load_policy(at(settings, "sft", 0), tiny.tokenizer(), 0, torch.bfloat16)
    assert "added to bfloat16 weights" in caplog.text


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_a_tied_weight_are_not_added_to_it(start: Callable, tied: bool) -> None:
    """They change what is read, and added would change what is written too: refused, but beside it all is well."""
    settings = start("llama", tie_word_embeddings=tied)
    both = {"target_modules": ["embed_tokens", "q_proj"]}
    trained(at(settings, settings.path, **both), "sft", 1)
    loading.load_policy(at(settings, "sft"), tiny.tokenizer(), 0)
    if tied:
        with pytest.raises(UserError, match=r"embed_tokens alone, whose weight is tied .* set lora_r=16"):
            loading.load_policy(at(settings, "sft", 0), tiny.tokenizer(), 0)
        return
    opened = Policy(loading.load_policy(at(settings, "sft", 0), tiny.tokenizer(), 0), 64).eval()
    beside = Policy(loading.load_policy(at(settings, "sft"), tiny.tokenizer(), 0), 64).eval()
    tiny.close(opened(batch_of(opened)), beside(batch_of(beside)))


# reward models


@torch.no_grad()
def scores_elsewhere(model: nn.Module, directory: str, texts: list[str], **padding: Any) -> list[Tensor]:
    """(B,) each: one padded batch, and text by text, with the tokenizer's own padding."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    padding |= {"padding": True, "return_token_type_ids": False, "return_tensors": "pt"}
    ways = [texts], [[text] for text in texts]
    return [torch.cat([model(**tokenizer(part, **padding)).logits[:, 0] for part in way]) for way in ways]


def scorer_of(settings: ModelSettings, directory: str, r: int) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    tokenizer = tokenizers.load_tokenizer(settings, [], scalar=True)
    scorer = RewardModel(loading.load_scalar(settings, tokenizer, 0, new_head=True)).eval()
    for name, parameter in scorer.named_parameters():
        if parameter.requires_grad and (r or "score" in name):
            torch.nn.init.normal_(parameter, std=0.1)
    save(scorer, directory, tokenizer)
    return scorer, tokenizer


@pytest.mark.parametrize(("shape", "rows", "r"), [("llama", 16, 4), ("llama", 20, 4), ("gpt2", 16, 0), ("gpt2", 20, 0)])
def test_padding_with_eos_hides_no_end(start: Callable, shape: str, rows: int, r: int) -> None:
    """As GPT-2's vocabulary: one token ends, pads and stands for what is unknown; one row to spare, or none."""
    vocabulary = {word: i for i, word in enumerate([*tiny.WORDS, "<eos>"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    roles = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<eos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **roles)
    settings = start(shape, vocab_size=rows, pad_token_id=15, eos_token_id=15)
    tokenizer.save_pretrained(settings.path)
    scorer, tokenizer = scorer_of(at(settings, settings.path, r), "rm/model", r)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 16)
    texts = ["the cat sat <eos>", "and the old dog ran far away from a mat <eos>", "this big cat"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    wanted = [scorer.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)) for row in ids]
    if r == 0:
        model = AutoModelForSequenceClassification.from_pretrained("rm/model").eval()
    else:  # the original model has two labels, and no word of what pads
        given = {} if rows == 16 else {"num_labels": 1, "pad_token_id": 16}
        model = AutoPeftModelForSequenceClassification.from_pretrained("rm/model", **given).eval()
    for side in ({}, {"padding_side": "left"} if shape == "llama" else {}):  # GPT-2 counts its positions from the left
        for scores in scores_elsewhere(model, "rm/model", texts, **side):
            tiny.close(scores, torch.cat(wanted), 256)


@pytest.mark.parametrize("shape", ["t5", "bart"])
def test_adapters_of_encoder_decoders_score_elsewhere(start: Callable, shape: str) -> None:
    settings = start(shape)
    trained(at(settings, settings.path), "sft", 1)
    scorer, _ = scorer_of(at(settings, "sft"), "rm", 4)
    model = AutoPeftModelForSequenceClassification.from_pretrained("rm", num_labels=1).eval()
    wanted = scorer(batch_of(scorer))
    for item, score in zip(ITEMS, wanted, strict=True):
        ids = torch.tensor([[*item.rows[0].prompt_ids, *item.rows[0].response_ids]])
        tiny.close(model(input_ids=ids).logits[0, 0], score, 256)


def test_sharded_adapters_are_saved_whole(start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3, in bfloat16, on adapters that came with the model."""
    settings = start("llama")
    trained(at(settings, settings.path), "sft", 1)
    policy = Policy(loading.load_policy(at(settings, "sft"), tiny.tokenizer(), 0, torch.bfloat16), 64)
    engine = tiny.trainer(policy, "zero3", precision="bf16")
    tiny.two_steps(engine, tiny.items(9))
    own = {name.removeprefix("model."): weight for name, weight in engine.state_dict().items()}
    writing.save(Path("rl"), policy.model, own, tiny.tokenizer())
    place = "base_model.model.model.layers.0.mlp.up_proj"
    below, above = (factors.factors_of(policy.model, own, name)[place] for name in ("below", "default"))
    assert below[1].abs().max() > 0 and above[1].abs().max() > 0
    change = below[1] @ below[0] + above[1] @ above[0]
    for opened in by_peft("rl", tmp_path / "elsewhere", monkeypatch):
        tiny.close(opened.get_submodule(place).get_delta_weight("default"), change)
