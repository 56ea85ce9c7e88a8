"""Tokenizers for tests of templates: byte pairs and SentencePiece's manner, with the chat templates people use."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "the quick brown fox jumps over the lazy dog . What is two plus two ? It is four . yes no please tell me more",
    "Human: hello Assistant: hi there , how are you ? I am fine , thanks ! user model assistant system",
] * 3

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
LLAMA_2 = (  # has no generation prompt
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN_ENDS = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
NO_ANSWERS = "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + ' A:' }}{% endif %}{% endfor %}"
NO_OPENING = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
THINKING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
EMPTY_THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = {
    CHATML: ("<|im_start|>", "<|im_end|>"),
    LLAMA_3: ("<|start|>", "<|end|>", "<|eot|>"),
    GEMMA: ("<turn>", "<end_of_turn>"),
    NO_OPENING: ("<|user|>", "<|assistant|>"),
    THINKING: ("<|im_start|>", "<|im_end|>"),
    EMPTY_THOUGHTS: ("<|im_start|>", "<|im_end|>"),
}


def byte_pairs(template: str | None = None, around: str = "<s> $A", prefix: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs, which puts `around` around texts; `prefix`: and a blank before them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    return _finished(inner, trainer, template, around)


def sentence_pieces(
    template: str | None = None, around: str = "<s> $A", legacy: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer in SentencePiece's manner, bytes aside; `legacy`: a blank before each text, even a second one."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = [word for text in [*TEXTS, "\n [INST] [/INST] < / s > |"] for word in text.split(" ")]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], max_token_length=8, show_progress=False
    )
    return _finished(inner, trainer, template, around, words)


def _finished(
    inner: Tokenizer,
    trainer: trainers.Trainer,
    template: str | None,
    around: str,
    texts: Sequence[str] = TEXTS,
) -> PreTrainedTokenizerFast:
    inner.train_from_iterator(texts, trainer)
    ids = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS.get(template, ())])
    made.chat_template = template
    return made
