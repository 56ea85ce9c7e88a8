"""A server that writes responses: what it is asked, what is made of its answers, and what is refused in one line."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from pipeline.config.generation import GenerationSettings
from pipeline.errors import UserError
from pipeline.rollout import same_words
from pipeline.rollout.generate import generate
from stages import faults, inputs
from stages.ahead import Ahead
from tests import tiny
from tests.test_http_reward import free_port
from tests.test_rollout import PROMPTS, generation, ids_of, speaker

OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logit_bias"}
KNOWN = {
    "ids": OPENAI | {"top_k", "min_p", "repetition_penalty", "stop_token_ids", "return_token_ids"},
    "config": OPENAI | {"generation_config"},
    "text": OPENAI,
}


@dataclass
class Writer:
    """A server's side: a language model in transformers' own hands, and what is odd about it."""

    lm: PreTrainedModel
    manner: str = "ids"
    names: tuple[str, ...] = ("tiny",)
    fails: list[int] = field(default_factory=list)  # statuses of the next answers
    changed: dict[str, Any] = field(default_factory=dict)  # in each answer but that to the first request
    tokens: list[int] | None = None  # what /tokenize says
    other: Callable[[str, dict[str, Any]], tuple[int, dict[str, Any]]] | None = None  # answers to other paths
    chosen: Callable[[str], PreTrainedModel | None] | None = None  # the model of a name; None: `lm` has every name
    heard: list[dict[str, Any]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def completion(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.heard.append(asked)
        if self.fails:
            return self.fails.pop(0), {"error": "odd"}
        if unknown := asked.keys() - KNOWN[self.manner]:
            return 422, {"error": f"unknown: {', '.join(sorted(unknown))}"}
        lm = self.lm if self.chosen is None else self.chosen(asked["model"])
        if lm is None:
            return 404, {"error": "no such model"}
        if isinstance(asked["prompt"], list) != (self.manner == "ids"):
            return 400, {"error": "prompt must be another"}
        given = asked["prompt"]
        ids = given if isinstance(given, list) else tiny.tokenizer()(given)["input_ids"]
        said = self.written(lm, ids, asked)
        text = tiny.tokenizer().decode(said, skip_special_tokens=True)
        choice = {"text": text, "finish_reason": "stop" if said[-1] == tiny.EOS_ID else "length"}
        choice |= {"token_ids": said} if asked.get("return_token_ids") else {}
        whole = {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(said)}}
        return 200, whole | (self.changed if len(self.heard) > 1 else {})

    def written(self, lm: PreTrainedModel, ids: list[int], asked: dict[str, Any]) -> list[int]:
        """By transformers, of the prompt alone."""
        own = json.loads(asked.get("generation_config", "{}"))
        hot = asked["temperature"] if self.manner != "config" else own.get("temperature", 0.0)
        how = {"do_sample": hot > 0, "pad_token_id": tiny.PAD_ID, "eos_token_id": tiny.EOS_ID}
        how |= {"temperature": hot, "top_k": 0} if hot > 0 else {}
        config = GenerationConfig(max_new_tokens=asked.get("max_tokens") or own["max_new_tokens"], **how)
        prompt = torch.tensor([ids])
        torch.manual_seed(asked["seed"])
        out = lm.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        return out[0, len(ids) :].tolist()


@contextmanager
def serving(writer: Writer) -> Iterator[str]:
    """The address of a server with `writer` behind it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            there = self.path == "/v1/models" and writer.names
            self.answer(*((200, {"data": [{"id": name} for name in writer.names]}) if there else (500, {})))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with writer.lock:
                if self.path == "/v1/completions":
                    self.answer(*writer.completion(asked))
                elif writer.other is not None:
                    self.answer(*writer.other(self.path, asked))
                else:
                    known = self.path == "/tokenize" and writer.tokens is not None
                    self.answer(*((200, {"tokens": writer.tokens}) if known else (404, {"detail": "Not Found"})))

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def by(address: str, **changes: Any) -> GenerationSettings:
    usual = generation()
    quick = usual.server.model_copy(update={"backoff": 0.01, "retries": 2, "concurrency": 4})
    return usual.model_copy(update={"engine": address, "server": quick, **changes})


@pytest.mark.parametrize("manner", ["ids", "config", "text"])
def test_greedy_is_what_generate_says(manner: str, caplog: pytest.LogCaptureFixture) -> None:
    speaking = speaker("llama")
    usual = generate(speaking, tiny.encoder(), PROMPTS, generation(), seed=0)
    writer = Writer(speaking.module.model, manner)
    with caplog.at_level(logging.INFO), serving(writer) as address:
        encoder = tiny.encoder()
        answers = generate(speaking, encoder, PROMPTS, by(address), seed=0)
        generate(speaking, encoder, PROMPTS[:1], by(address), seed=0)  # nothing is found out, or said, again
        assert same_words.compare(speaking, encoder, PROMPTS[0], by(address))
    assert [answer.text for answer in answers] == [answer.text for answer in usual]
    assert [answer.finished for answer in answers] == [answer.finished for answer in usual]
    assert {answer.finished for answer in answers} == {True, False}
    assert [answer.example for answer in answers] == PROMPTS
    if manner == "ids":
        assert ids_of(answers) == ids_of(usual)
    (line,) = [one for one in caplog.messages if one.startswith("generation.engine:")]
    assert "tiny writes the responses" in line and ("as token ids" in line) == (manner == "ids")
    probes = {"ids": 1, "config": 2, "text": 3}[manner]
    assert len(writer.heard) == probes + len(PROMPTS) + 1 + 1


def test_each_response_has_a_seed_and_a_temperature_of_its_own() -> None:
    speaking, encoder = speaker("llama"), tiny.encoder()
    writer = Writer(speaking.module.model)
    how = {"do_sample": True, "num_return_sequences": 4, "temperatures": [0.5, 1.0]}
    with serving(writer) as address:
        first = generate(speaking, encoder, PROMPTS[:3], by(address, **how), seed=5)
        heard = writer.heard[1:]
        assert ids_of(generate(speaking, encoder, PROMPTS[:3], by(address, **how), seed=5)) == ids_of(first)
        assert ids_of(generate(speaking, encoder, PROMPTS[:3], by(address, **how), seed=6)) != ids_of(first)
        some = generate(speaking, encoder, PROMPTS[1:2], by(address, **how), seed=5)
    assert [answer.example for answer in first] == [example for example in PROMPTS[:3] for _ in range(4)]
    assert ids_of(some) == ids_of(first[4:8])  # whatever is asked for beside it
    assert len({one["seed"] for one in heard}) == len(first) == 12
    assert sorted(one["temperature"] for one in heard) == [0.5] * 6 + [1.0] * 6


@pytest.mark.parametrize("manner", ["ids", "config", "text"])
def test_nothing_of_a_draw_is_left_to_the_servers_own_configuration(manner: str) -> None:
    speaking, encoder = speaker("llama"), tiny.encoder()
    writer = Writer(speaking.module.model, manner)
    with serving(writer) as address:
        for top_p, top_k in ((1.0, 0), (0.9, 0 if manner == "text" else 5)):
            narrow = by(address, do_sample=True, temperature=0.7, top_p=top_p, top_k=top_k)
            generate(speaking, encoder, PROMPTS[:1], narrow, 0)
    narrow, whole = writer.heard[-1], writer.heard[-2]
    own = json.loads(narrow.get("generation_config", "{}"))
    assert narrow["temperature"] == 0.7 and narrow["max_tokens"] == 8
    if manner == "config":
        wanted = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "eos_token_id": [tiny.EOS_ID]}
        assert {name: own[name] for name in wanted} == wanted
        assert json.loads(whole["generation_config"])["top_k"] == 0
    else:
        assert (narrow["top_p"], whole["top_p"]) == (0.9, 1.0)
    if manner == "ids":
        assert (narrow["top_k"], whole["top_k"], whole["min_p"], whole["repetition_penalty"]) == (5, -1, 0, 1)
        assert whole["stop_token_ids"] == [tiny.EOS_ID]


def test_what_passes_is_asked_again() -> None:
    speaking = speaker("llama")
    writer = Writer(speaking.module.model)
    with serving(writer) as address:
        encoder = tiny.encoder()
        generate(speaking, encoder, PROMPTS[:1], by(address), 0)
        writer.fails = [503, 429]
        answers = generate(speaking, encoder, PROMPTS, by(address), 0)
    assert ids_of(answers) == ids_of(generate(speaking, encoder, PROMPTS, generation(), 0))


def cut(written: int) -> dict[str, Any]:
    usage = {"prompt_tokens": len(tiny.encoder().encode_prompt(PROMPTS[0].prompt)[0]), "completion_tokens": written}
    return {"choices": [{"text": "a", "finish_reason": "length"}], "usage": usage}


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"choices": []}, "it gave 0 responses to one request, wanted one text"),
        ({"choices": [{"text": "a"}] * 2}, "it gave 2 responses"),
        (
            {"choices": [{"text": "a", "finish_reason": "abort"}]},
            "row 0: its response ended by 'abort', wanted stop or",
        ),
        ({"usage": {"prompt_tokens": 1}}, r"row 0: it read 1 tokens of a prompt of \d+, wanted all"),
        (cut(7), "row 0: its response was cut after 7 tokens, wanted room for 8"),
        ({"choices": None}, r"its answer is no completion \(.*is this an OpenAI-compatible address"),
    ],
)
def test_answers_that_are_not_whole_are_errors_of_one_line(changed: dict[str, Any], complaint: str) -> None:
    speaking = speaker("llama")
    with serving(Writer(speaking.module.model, changed=changed)) as address, pytest.raises(UserError) as caught:
        generate(speaking, tiny.encoder(), PROMPTS[:1], by(address), 0)
    assert re.match(f"generation.engine {address}/completions: {complaint}", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("odd", "changes", "complaint"),
    [
        ({"names": ("a", "b")}, {}, r"it has 2 models \(a, b\), wanted one, or its name: set generation.served_model="),
        ({"names": ()}, {}, "it answered 500 and no list of models"),
        ({"fails": [503] * 9}, {}, r"it answered 503 \(odd\); 3 tries in .*generation.server.retries="),
        ({"fails": [404] * 9}, {}, r"it answered 404 \(odd\), wanted 200"),
        ({"tokens": [1, 2]}, {}, r"it reads '.*' as the tokens \[1, 2\], wanted \["),
        ({"manner": "text"}, {"do_sample": True, "top_k": 5}, "generation.top_k is 5, which it does not take"),
    ],
)
def test_servers_that_cannot_be_asked_are_errors_of_one_line(odd: dict, changes: dict, complaint: str) -> None:
    speaking = speaker("llama")
    with serving(Writer(speaking.module.model, **odd)) as address, pytest.raises(UserError) as caught:
        generate(speaking, tiny.encoder(), PROMPTS[:1], by(address, **changes), 0)
    assert re.match(f"generation.engine {address[:-3]}/[a-z0-9/]*: {complaint}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(UserError, match="nobody listens there, wanted a server that answers: start it"):
        generate(speaker("llama"), tiny.encoder(), PROMPTS, by(f"http://127.0.0.1:{free_port()}/v1"), 0)


def test_other_weights_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    speaking = speaker("llama")
    with serving(Writer(tiny.language_model("llama", seed=1))) as address:
        assert not same_words.compare(speaking, tiny.encoder(), PROMPTS[0], by(address))
    assert "does it serve these weights?" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["rl", "algo=esrl_drop", "top_k=0", "top_p=1.0"], "sampler.mode is drop with generation.engine=http"),
        (["rl", "generation.served_model={a: b}"], "wanted the name of one model"),
        (["sft"], "but stage=sft hands no server the weights that it changes"),
        (["generate", "num_beams=2"], "num_beams is 2 with engine http://"),
        (["generate", "generation.served_model={a: b}"], "wanted the name of one model"),
    ],
)
def test_what_a_server_cannot_do_is_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        tiny.settings(*words, "generation.engine=http://127.0.0.1:8000/v1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["vllm", "continuous", "http://", "http://user:pass@host/v1"])
def test_what_is_no_engine(engine: str) -> None:
    with pytest.raises(UserError, match=r"generation\.engine: .*wanted") as caught:
        tiny.settings("generate", f"generation.engine={engine}")
    assert "pass@" not in str(caught.value)


def test_faults_that_need_no_server() -> None:
    address = "generation.engine=http://h:1/v1"
    named = tiny.settings("generate", address, "generation.server.key_variable=MY_KEY")
    (line,) = faults.of_launch(named, "generate", {})
    assert line.startswith("generation.server.key_variable: the environment has no MY_KEY")
    assert [*faults.of_launch(named, "generate", {"MY_KEY": "x"})] == []
    trained = tiny.settings("rl", "algo=esrl", address, "generation.server.key_variable=MY_KEY")
    assert any("has no MY_KEY" in one for one in faults.of_launch(trained, "rl", {}))
    (line,) = faults.of_launch(tiny.settings("evaluate", address, "policies={sft: a, rl: b}"), "evaluate", {})
    assert line.startswith("generation.served_model: null, but policies are sft, rl")


def test_an_encoder_decoder_is_told_before_a_start(tmp_path: Path) -> None:
    for shape in ("t5", "llama"):
        tiny.language_model(shape).config.save_pretrained(tmp_path / shape)
        words = ("generate", f"policy={tmp_path / shape}", "generation.engine=http://h:1/v1")
        lines = [*faults.of_models(tiny.settings(*words), Ahead([], {}, []))]
        assert len(lines) == (shape == "t5") and all("with an encoder-decoder" in line for line in lines)


def test_each_policy_of_an_evaluation_has_its_name_at_the_server() -> None:
    address, both = "generation.engine=http://h:1/v1", "policies={sft: a, rl: b}"
    named = tiny.settings("evaluate", address, both, "generation.served_model={sft: one, rl: two}")
    assert [inputs.spoken(named, name).served_model for name in ("sft", "rl")] == ["one", "two"]
    for words in ([], ["generation.served_model=one"], ["generation.served_model={sft: one}"]):
        with pytest.raises(UserError, match=r"policies are sft, rl.*served_model='\{sft: NAME, rl: NAME\}'"):
            inputs.spoken(tiny.settings("evaluate", address, both, *words), "rl")
    alone = tiny.settings("evaluate", address, "policies={rl: b}")
    assert inputs.spoken(alone, "rl").served_model is None
