"""What test_engine.py runs on two processes: `torchrun --nproc-per-node 2 -m tests.two_ranks FOLDER`.

Rank 0 writes what it saw to FOLDER/seen.pt; any assertion that fails on either rank fails the launch.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.rewards import Scale
from pipeline.data.batching import Packing
from pipeline.errors import UserError
from pipeline.models import loading, writing
from pipeline.models.policy import Policy
from pipeline.records import Example
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.rl import reference
from pipeline.rollout.generate import generate
from pipeline.trainer import engine, group
from pipeline.trainer.checkpoint import Checkpoints, State
from pipeline.trainer.metrics import Interval, Metrics
from reward_models import length
from tests import tiny
from tests.test_served import Writer, serving

PROMPTS = [Example(str(i), " ".join(tiny.WORDS[i : 2 * i + 1])) for i in range(5)]


def talk(ranks: group.Ranks) -> None:
    """Each thing that ranks say to each other."""
    mine = torch.tensor([1.0 + ranks.rank, 10.0])
    assert ranks.all_sum(mine).tolist() == [3.0, 20.0] and mine.tolist() == [1.0 + ranks.rank, 10.0]
    assert ranks.gather({"rank": ranks.rank}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.from_main(f"from {ranks.rank}") == "from 0"
    assert ranks.on_main(lambda: ranks.rank + 5) == 5

    def fails() -> None:
        raise UserError(f"place: found on rank {ranks.rank}")

    def fails_on_the_second() -> int:
        if ranks.rank == 1:
            fails()
        return 3

    with pytest.raises(UserError, match="found on rank 0"):
        ranks.on_main(fails)
    with pytest.raises(UserError, match="found on rank 1"):
        ranks.agreed(fails_on_the_second)
    assert ranks.agreed(lambda: ranks.rank) == ranks.rank
    ranks.barrier()


def standardise(ranks: group.Ranks, folder: Path) -> None:
    """What rewards are standardised by is that of all training rows, of whichever rank: as of one."""
    rewards = Rewards([WeightedReward("length", 1.0, length.reward, "standardise")])
    texts = ["a", "a b", "a b c", "a b c d"]  # the last is held out: mean 2, variance 2 / 3
    rows = [Example(str(i), "p", text) for i, text in enumerate(texts)]
    totals = scoring.score_logged(ranks, rewards, rows, texts, 3, folder).total
    unit = (2 / 3) ** 0.5
    assert totals == pytest.approx([-1 / unit, 0.0, 1 / unit, 2 / unit])
    assert ranks.gather(rewards.rewards[0].normalise) == [Scale(mean=2.0, std=unit)] * 2


def train(zero: str, precision: str) -> tuple[engine.Engine, dict]:
    """Two steps and what they left."""
    trained = tiny.trainer(Policy(tiny.language_model("llama"), 64), zero, precision)
    norms = tiny.two_steps(trained, tiny.items(9))
    return trained, {"norms": norms, "weights": trained.state_dict()}


def speak(trained: engine.Engine, **changes) -> list[tuple[int, ...]]:
    generation = tiny.settings("rl").generation.model_copy(update={"max_new_tokens": 6, "batch_size": 2, **changes})
    answers = generate(trained, tiny.encoder(), PROMPTS, generation, seed=3)
    assert [answer.example for answer in answers] == PROMPTS  # on every rank, in order
    return [answer.response_ids for answer in answers]


def speak_in_one_batch(trained: engine.Engine) -> list[tuple[int, ...]]:
    """A batch that all prompts would fit into is shared out: three of five prompts here, two there."""
    read: list[int] = []
    hook = trained.module.model.register_forward_hook(lambda module, given, out: read.append(len(out.logits)))
    said = speak(trained, do_sample=True, batch_size=64)
    hook.remove()
    assert trained.ranks.gather(read[0]) == [3, 2]
    return said


def speak_in_layers(folder: Path, whole: dict) -> None:
    """No weight is ever whole but while it is read: the same words as where all are, and the same steps after them.

    The last batch is of one rank alone, and prompts of one length end at different steps.
    """
    trained, _ = train(tiny.cut_whole(folder), "fp32")
    assert speak(trained, gather="layers", do_sample=False) == whole["greedy"]
    assert speak(trained, gather="layers", do_sample=True) == whole["sampled"]
    beams = [speak(trained, gather=gather, do_sample=False, num_beams=2) for gather in ("whole", "layers")]
    assert beams[0] == beams[1]
    assert tiny.two_steps(trained, tiny.items(9)) == pytest.approx(whole["after"], rel=1e-5)


def resume(trained: engine.Engine, zero: str, folder: Path) -> None:
    """Save, step; load into other weights, step: the same, bit for bit, on each rank's own part."""
    checkpoints = Checkpoints(folder / zero, trained.ranks, limit=1)
    checkpoints.save(trained, State(step=2, world=2), Interval(Metrics()))
    rows, packing = tiny.items(9), Packing(None, 40, False, tiny.PAD_ID)
    tiny.step(trained, rows, range(4), packing)
    other = tiny.trainer(Policy(tiny.language_model("llama", seed=1), 64), zero)
    assert checkpoints.load(other)[0] == State(step=2, world=2)
    tiny.step(other, rows, range(4), packing)
    ours, theirs = trained.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def start_a_reward_model(ranks: group.Ranks, folder: Path) -> None:
    """Each rank opens a policy's adapters as a scorer; transformers writes files on the first one alone."""
    settings, tokenizer, path = tiny.settings("sft").model, tiny.tokenizer(), folder / "start"
    settings = settings.model_copy(update={"path": str(path), "lora": settings.lora.model_copy(update={"r": 2})})
    if ranks.main:
        start = tiny.language_model("llama")
        writing.save(path, start, start.state_dict(), tokenizer)
        adapted = loading.load_policy(settings, tokenizer, 0)
        writing.save(folder / "adapters", adapted, adapted.state_dict(), tokenizer)
    ranks.barrier()
    settings = settings.model_copy(update={"path": str(folder / "adapters")})
    scorer = loading.hugging_face(loading.load_scalar(settings, tokenizer, 0, new_head=True))
    wanted = tiny.language_model("llama").model.embed_tokens.weight
    assert torch.equal(scorer.get_input_embeddings().weight, wanted)


def ask_a_server(trained: engine.Engine, said: list[tuple[int, ...]]) -> None:
    """Both ranks send their share of the requests; what fails for one of them ends both."""
    with contextlib.ExitStack() as stack:
        writer = Writer(trained.module.model)
        address = trained.ranks.from_main(stack.enter_context(serving(writer)) if trained.ranks.main else None)
        assert speak(trained, do_sample=False, engine=address) == said
        trained.ranks.barrier()
        if trained.ranks.main:
            assert len(writer.heard) == 1 + len(PROMPTS)  # one to find out how
            writer.changed = {"choices": []}
        with pytest.raises(UserError, match="it gave 0 responses"):
            speak(trained, do_sample=False, engine=address)
        trained.ranks.barrier()


def main(folder: Path) -> None:
    ranks = tiny.ranks()
    talk(ranks)
    standardise(ranks, folder)
    start_a_reward_model(ranks, folder)
    seen = {}
    for stage in range(4):
        trained, seen[f"zero{stage}"] = train(f"zero{stage}", "fp32")
        if stage in (0, 3):
            packing = Packing(None, 40, False, tiny.PAD_ID)
            seen[f"zero{stage}"] |= {
                "greedy": speak(trained, do_sample=False),
                "sampled": speak(trained, do_sample=True),
                "reference": reference.reference_logps(trained, tiny.items(9), packing),
            }
            assert trained.ranks.gather(speak(trained, do_sample=True))[0] == seen[f"zero{stage}"]["sampled"]
            if stage == 0:
                assert speak_in_one_batch(trained) == seen["zero0"]["sampled"]
                ask_a_server(trained, seen["zero0"]["greedy"])
            after = tiny.two_steps(trained, tiny.items(9))  # training goes on after the weights were gathered
            seen[f"zero{stage}"]["after"] = after
        if stage > 0:
            resume(trained, f"zero{stage}", folder)
    if ranks.main:
        (folder / "cut").mkdir()
    ranks.barrier()
    speak_in_layers(folder / "cut", seen["zero3"])
    seen["bf16"] = train("zero3", "bf16")[1]
    if ranks.main:
        torch.save(seen, folder / "seen.pt")
    ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
