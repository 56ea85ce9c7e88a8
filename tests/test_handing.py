"""A server that writes for a policy in training: it has the weights of now, and what it wrote is known as our own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.data.batching import Packing
from pipeline.errors import UserError
from pipeline.models import loading, writing
from pipeline.models.policy import Policy
from pipeline.records import Request
from pipeline.rollout.drawn_elsewhere import surprise, with_stats
from pipeline.rollout.generate import generate, plain_sampling, respond
from pipeline.rollout.handing import HandOver, opened
from pipeline.trainer.model import Model
from tests import rolling, tiny
from tests.test_http_reward import free_port
from tests.test_rollout import PROMPTS, generation, ids_of, speaker
from tests.test_served import Writer, by, serving

PACKING = Packing(None, 4096, False, tiny.PAD_ID)


def read(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@dataclass
class Taker:
    """A server's way to take weights, as its documentation says; what it was told."""

    way: str
    base: PreTrainedModel
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    held: dict[str, PreTrainedModel] = field(default_factory=dict)  # by name
    most: int = 0  # models at a time
    fails: int | None = None

    def writer(self) -> Writer:
        manner = "config" if self.way == "name" else "ids"
        names = ("tiny",) if self.way != "name" else ()
        return Writer(self.base, manner, names=names, other=self.answer, chosen=self.chosen)

    def chosen(self, name: str) -> PreTrainedModel | None:
        """The model of this name, read where that is the way; None: there is none."""
        if self.way == "name" and name not in self.held and Path(name).is_dir():
            self.held[name] = read(name)
        self.most = max(self.most, len(self.held))
        return self.held.get(name)

    def answer(self, path: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.told.append((path, asked))
        if self.fails is not None:
            return self.fails, {"error": "odd"}
        match self.way, path:
            case "adapters", "/v1/load_lora_adapter":
                base = read(self.base.name_or_path)
                self.held[asked["lora_name"]] = PeftModel.from_pretrained(base, asked["lora_path"]).eval()
            case "adapters", "/v1/unload_lora_adapter":
                del self.held[asked["lora_name"]]
            case "disk", "/update_weights_from_disk":
                self.held["tiny"] = read(asked["model_path"])
            case "reload", "/collective_rpc":
                assert asked["method"] == "reload_weights"
                self.held["tiny"] = read(asked["kwargs"]["weights_path"])
            case ("reload", "/reset_prefix_cache"):
                pass
            case ("name", "/reset"):
                self.held.clear()
            case _:
                return 404, {"detail": "Not Found"}
        return 200, {}


def trained(folder: Path, lora: int) -> tuple[Model, Any]:
    """A policy that takes steps, from a model in `folder`, and the words of its settings."""
    start = tiny.language_model("llama")
    with torch.no_grad():
        start.get_output_embeddings().weight[tiny.EOS_ID] *= 4.0
    writing.save(folder, start, start.state_dict(), tiny.tokenizer())
    settings = tiny.settings("rl", "algo=reinforce", f"model={folder}", f"lora_r={lora}")
    lm = loading.load_policy(settings.model, tiny.tokenizer(), seed=0)
    return Model(tiny.trainer(Policy(lm, 64)), tiny.encoder(), PACKING), settings


def to(address: str, settings: Any, folder: Path) -> HandOver:
    return HandOver(settings.model_copy(update={"generation": by(address)}), folder)


@pytest.mark.parametrize(("way", "lora"), [("name", 0), ("name", 4), ("adapters", 4), ("disk", 0), ("reload", 0)])
def test_it_writes_as_the_policy_now_does(
    way: str, lora: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, settings = trained(tmp_path / "start", lora)
    taker = Taker(way, read(str(tmp_path / "start")))
    speaking, encoder, said = model.engine, model.encoder, []
    with caplog.at_level(logging.INFO), serving(taker.writer()) as address:
        given = settings.model_copy(update={"generation": by(address)})
        with opened(given, tiny.ranks(), tmp_path / "rl") as hand_over:
            for rate in (0.0, 5.0):
                tiny.step(speaking, tiny.items(5), range(5), PACKING, rate)
                server = hand_over.to_server(model)
                answers = generate(speaking, encoder, PROMPTS[:3], given.generation, 0, server)
                said.append([one.text for one in answers])
                assert said[-1] == [one.text for one in generate(speaking, encoder, PROMPTS[:3], generation(), 0)]
                before = len(taker.told)
                assert hand_over.to_server(model) is server and len(taker.told) == before  # it has these
                assert len([*(tmp_path / "rl" / "handed").iterdir()]) == 1
        assert said[0] != said[1]  # the step changed what it says
    assert not (tmp_path / "rl" / "handed").exists() and taker.most <= 1
    assert bool(taker.held) == (way in ("disk", "reload"))
    (line,) = [one for one in caplog.messages if "writes the responses of the policy" in one]
    assert {"name": "its folder", "adapters": "a new name"}.get(way, "in the place of those before") in line


def test_what_it_drew_is_known_as_if_it_were_drawn_here() -> None:
    speaking, encoder = speaker("llama"), tiny.encoder()
    asked = [Request(e, tuple(encoder.encode_prompt(e.prompt)[0]), (1.0, 0.5)) for e in PROMPTS]
    groups = respond(speaking, encoder, asked, plain_sampling(generation()), 3)
    bare = [[replace(one, stats=None) for one in group] for group in groups]
    found, strange = with_stats(speaking, PACKING, asked, bare)
    for one, other in zip((r for g in found for r in g), (r for g in groups for r in g), strict=True):
        torch.testing.assert_close(one.stats.logps, other.stats.logps, atol=1e-5, rtol=0)
        assert one.stats.entropy == pytest.approx(other.stats.entropy, abs=1e-5)
        assert one.stats.confidence == pytest.approx(other.stats.confidence, abs=1e-5)
    assert abs(strange.errors) < 4
    hot = respond(
        speaking, encoder, [one._replace(temperatures=(9.0,) * 4) for one in asked], generation(do_sample=True), 3
    )
    alike = [one._replace(temperatures=(1.0,) * 4) for one in asked]
    assert with_stats(speaking, PACKING, alike, hot)[1].errors > 6  # drawn from another distribution


def test_surprise_by_hand() -> None:
    # -log p - H: 2 - 1 = 1, 0.5 - 1 = -0.5, 1 - 1 = 0; sum 0.5, sum of squares 1.25
    found = surprise(torch.tensor([-2.0, -0.5, -1.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert found == (pytest.approx(0.5 / 3), pytest.approx(0.5 / 1.25**0.5))
    assert str(surprise(torch.zeros(0), torch.zeros(0)).errors) == "nan"


def test_steps_learn_from_what_a_server_wrote(tmp_path: Path) -> None:
    """Of the loop of test_online_steps, whose policy is written where transformers can read it."""
    case = rolling.Case(("algo=esrl", "sampler.entropy_range=[4.8, 5.0]", "sampler.probe=2", *rolling.HOT))
    trainer = rolling.trainer_of(case, "zero0", tmp_path)
    engine, rollouts = trainer.engine, trainer.windows
    model = Model(engine, tiny.encoder(), PACKING)
    taker = Taker("name", engine.module.model)
    with serving(taker.writer()) as address:
        generated = rollouts.settings.generation.model_copy(update={"engine": address, "server": by(address).server})
        rollouts.settings = rollouts.settings.model_copy(update={"generation": generated})
        hand_over = HandOver(rollouts.settings, tmp_path)
        rollouts.server = lambda: hand_over.to_server(model)
        seen = rolling.run(trainer, steps=2)
        hand_over.close()
    assert len(seen) == 2 and all(one["ids"] for one in seen)
    assert [path for path, _ in taker.told].count("/reset") == 2 + 1  # one for each step, and the last
    assert {"perf/hand_over_seconds", "rollout/surprise"} <= rollouts.stats.keys()
    for group in rollouts.groups:
        for one in group.responses:
            assert len(one.stats.logps) == len(one.response_ids) and one.stats.logps.isfinite().all()


def refused(odd: Callable[[Taker], None], way: str, folder: Path, stay: dict[str, Any] | None = None) -> str:
    """The line of a hand-over that fails; nothing is left of it."""
    model, settings = trained(folder / "start", 0)
    taker = Taker(way, read(str(folder / "start")))
    odd(taker)
    writer = taker.writer()
    for name, value in (stay or {}).items():
        setattr(writer, name, value)
    with serving(writer) as address, pytest.raises(UserError) as caught:
        given = settings.model_copy(update={"generation": by(address)})
        with opened(given, tiny.ranks(), folder / "rl") as hand_over:
            hand_over.to_server(model)
    assert not (folder / "rl" / "handed").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_servers_that_take_no_weights(tmp_path: Path) -> None:
    assert (
        "it answers whatever model is asked for, and knows no way to change its own, wanted one that reads"
        in refused(lambda taker: None, "none", tmp_path, {"chosen": None})
    )
    line = refused(lambda taker: None, "none", tmp_path)
    assert "it answered 404 (no such model)" in line and "VLLM_SERVER_DEV_MODE=1" in line
    line = refused(lambda taker: setattr(taker, "fails", 400), "disk", tmp_path)
    assert "/update_weights_from_disk: it answered 400 (odd) to new weights, wanted 200: can it read" in line


def test_a_server_that_is_gone_between_steps(tmp_path: Path) -> None:
    model, settings = trained(tmp_path / "start", 0)
    with serving(Taker("disk", read(str(tmp_path / "start"))).writer()) as address:
        hand_over = to(address, settings, tmp_path / "rl")
        hand_over.to_server(model)
    model.engine.updates += 1
    with pytest.raises(
        UserError, match=r"/update_weights_from_disk: nobody listens there; 3 tries .* goes on from the l"
    ):
        hand_over.to_server(model)
    hand_over.close()
    assert not (tmp_path / "rl" / "handed").exists()


def test_an_encoder_decoder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = Model(speaker("t5"), tiny.encoder(), PACKING)
    model.encoder.encoder_decoder = True
    hand_over = to(f"http://127.0.0.1:{free_port()}/v1", tiny.settings("rl", "algo=reinforce"), tmp_path)
    with pytest.raises(UserError, match="with an encoder-decoder, wanted a causal model"):
        hand_over.to_server(model)
    assert not (tmp_path / "handed").exists()


def test_texts_whose_tokens_are_not_known_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, settings = trained(tmp_path / "start", 0)
    taker = Taker("name", read(str(tmp_path / "start")))
    writer = taker.writer()
    with serving(writer) as address:
        hand_over = to(address, settings, tmp_path / "rl")
        server = hand_over.to_server(model)
        writer.changed = {"usage": {"completion_tokens": 77}}
        for _ in range(2):
            answers = generate(model.engine, model.encoder, PROMPTS, by(address), 0, server)
        hand_over.close()
    assert ids_of(answers)
    (line,) = [one for one in caplog.messages if "tokenised anew" in one]
    assert "7 of 7 responses may have been drawn as other tokens than those that are learned" in line
