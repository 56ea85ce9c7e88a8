"""Models that are whole on no rank: they speak layer by layer, or learn without speaking."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.errors import UserError
from tests import tiny

GAIN = itemgetter("eval/gain/dr")


def test_two_ranks_speak_and_learn_without_whole_weights(tmp_path: Path) -> None:
    seen = tiny.on_two_processes("tests.unspoken", tmp_path)
    for shape in ("llama", "t5", "bart"):
        assert seen[shape]["whole"] == seen[shape]["all"] and seen[shape]["layers"] == 0
    # what evaluates, fits V and saves the weights asks for one at a time
    assert 0 < seen["alol"]["most"] <= seen["alol"]["largest"] < seen["llama"]["all"]
    left = tmp_path / "runs" / "default" / "rl"
    lines = [json.loads(line) for line in (left / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert "value/mse" in lines[0] and all("eval/gain/dr" in line for line in lines)  # which chooses the weights
    assert json.loads((left / "results.json").read_text())["model_step"] == max(lines, key=GAIN)["step"]
    assert not [tag for line in lines for tag in line if "completions" in tag or "eval/reward" in tag]


@pytest.mark.parametrize("algo", ["esrl", "semi_offline"])
def test_only_responses_choose_the_weights_of_what_samples(algo: str) -> None:
    with pytest.raises(UserError, match=rf"eval\.generate is false, .* of algo={algo}: set train\.keep=last"):
        resolve(["stage=rl", f"algo={algo}", "eval.generate=false"])
    assert resolve(["stage=rl", f"algo={algo}", "eval.generate=false", "train.keep=last"]).settings.train.keep == "last"
