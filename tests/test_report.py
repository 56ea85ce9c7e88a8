"""The report: it holds the numbers, escapes the texts, is sound HTML, and speaks up where a value is unhealthy."""

from __future__ import annotations

import json
import re
from html import escape, unescape
from html.parser import HTMLParser

import pytest

from pipeline.config.yaml_layers import load_yaml
from pipeline.errors import UserError
from pipeline.report import svg
from pipeline.report.curves import bounds, show_curves
from pipeline.report.numbers import MINUS, number
from pipeline.report.run_page import build
from pipeline.report.spec import FOLDER, Chart, charts, charts_for, metric_of, rules
from pipeline.report.stage_checks import series_of

VOID = {"meta", "br", "hr", "img", "link"}
SFT = {"reward": 0.41, "reward_se": 0.01, "completions/mean_words": 20.0, "rewards/oracle:helpfulness/mean": 0.6}
RL = {"reward": 0.63, "reward_se": 0.01, "completions/mean_words": 44.0, "rewards/oracle:helpfulness/mean": 0.5}


class Balanced(HTMLParser):
    """Collects the tags, and fails where one is closed that is not the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        self.anchors |= {value for name, value in attrs if name == "id"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def write_rows(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path):
    """A run of all kinds of stages, small but with every kind of file."""
    run = tmp_path / "trial & error"
    write_rows(run / "sft" / "metrics.jsonl", [{"step": i, "time": i, "train/loss": 4 / i} for i in range(1, 301)])
    (run / "sft" / "config.yaml").write_text("learning_rate: 0.001 # <slow>\n")
    (run / "sft" / "command.txt").write_text("bash run.sh stage=sft\n")
    (run / "sft" / "results.json").write_text('{"eval/loss": 1.375, "steps": 300}')
    pairs = {"eval/accuracy": 0.55, "eval/length_accuracy": 0.6, "eval/accuracy/forum": 0.52, "eval/pairs/forum": 80.0}
    pairs |= {"eval/pairs": 80.0}
    write_rows(run / "reward" / "helpfulness" / "metrics.jsonl", [{"step": i, **pairs} for i in (1, 2, 3)])
    (run / "reward" / "helpfulness" / "results.json").write_text(json.dumps(pairs))
    (run / "score").mkdir()
    (run / "score" / "results.json").write_text('{"train": {"rows": 4321, "reward": 0.48}}')
    rows = [
        {"step": i, "time": 2 * i, "ratio/clip_fraction_high": i / 20, "ratio/mean": None if i == 3 else 1.0}
        for i in range(1, 20)
    ]
    write_rows(run / "rl" / "metrics.jsonl", [{"step": 0, "time": 0, "value/r2": -0.2}, *rows])
    (run / "evaluate").mkdir()
    (run / "evaluate" / "results.json").write_text(json.dumps({"sft": SFT, "rl": RL}))
    sample = {"id": "7", "prompt": "<script>alert(1)</script>", "response": "a < b", "rewards": {"helpfulness": 0.25}}
    samples = [{**sample, "policy": "rl", "reward": 0.75}, {**sample, "policy": "sft", "reward": 0.125}]
    write_rows(run / "evaluate" / "samples" / "policies.jsonl", samples)
    return run


def test_the_page_is_one_sound_self_contained_file(run_dir):
    path = build(run_dir)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    page = parsed(html)
    assert not {"script", "link", "img", "iframe"} & set(page.seen)
    assert "http" not in html and "@import" not in html and "url(" not in html
    assert {link.removeprefix("#") for link in page.links} <= page.anchors
    assert not list(run_dir.glob("*.tmp"))


def test_it_holds_the_numbers(run_dir):
    html = build(run_dir).read_text(encoding="utf-8")
    # 0.63 - 0.41 = 0.22, far beyond 2 sqrt(0.01^2 + 0.01^2) = 0.028
    for text in ("trial &amp; error", "0.410", "0.630", "+0.220 ▲ better", "± 0.010", "4,321", "bash run.sh stage=sft"):
        assert text in html
    assert "True helpfulness (oracle)" in html
    # sft loss; reward accuracy, by source, and pairs twice; rl clipped share and ratio; no distribution of rewards
    assert html.count("<svg") == 7
    assert '<summary>Supervised fine-tuning <span class="note">300 steps in 5 min 0 s</span>' in html


def test_texts_are_escaped_and_policies_stand_in_the_order_of_the_results(run_dir):
    html = build(run_dir).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "<script" not in html
    assert "a &lt; b" in html and "# &lt;slow&gt;" in html
    assert html.index("<b>sft reward 0.125</b>") < html.index("<b>rl reward 0.750 (+0.625)</b>")


def test_it_says_what_is_unhealthy_the_most_serious_first(run_dir):
    html = build(run_dir).read_text(encoding="utf-8")
    look = html[html.index('id="look"') : html.index('id="results"')]
    found = re.findall(r'<li class="(\w+)" id="[^"]+">\s*<b[^>]*>[^<]*</b> <b>([^<]*)</b>\s*<span[^>]*>([^<,]*)', look)
    for one in (
        ("trouble", "Value fit (R2): \N{MINUS SIGN}0.200", "Reinforcement learning"),
        # of 19 points the last tenth is one: 19/20
        ("look", "Ratios at the clip: 95% (95% at the upper bound)", "Reinforcement learning"),
        ("trouble", "Length of responses: 20.0 to 44.0 words", "rl against sft"),  # 2.2 times
        ("trouble", "Rewards never trained on: True helpfulness (oracle) 0.600 to 0.500", "rl against sft"),
        ("fine", "Gain in reward: 0.410 to 0.630, 15.6 standard errors", "rl against sft"),
    ):
        assert one in found
    # 80 pairs: accuracy 0.55 - 0.6 of length alone is below 0
    assert "Lead over counting words: 0.550 against 0.600 on 80 pairs" in look
    levels = [level for level, _, _ in found]
    assert levels == sorted(levels, key=["trouble", "look", "fine"].index) and len({*levels}) == 3
    assert look.count("What to do:") == len(found) - levels.count("fine")


def test_the_table_and_the_checks_say_the_same_of_every_number(run_dir):
    """Every number of the table that has a rule links to its check, which is of the same level; no check stands twice,
    and what RL measured of the same policy on fewer prompts is not judged beside it."""
    sft = {"reward_length_correlation": 0.3, "completions/distinct_2": 0.30, "completions/repetition": 0.1}
    rl = {"reward_length_correlation": 0.49, "completions/distinct_2": 0.25, "completions/repetition": 0.3}
    shared = {"rewards/helpfulness/mean": 0.2, "rewards/helpfulness/length_correlation": 0.55, "objective/kl": 0.0}
    rl |= {**shared, "rewards/helpfulness/mean": 0.1, "completions/clipped_ratio": 0.6, "objective/kl": 2.0}
    results = {"sft": {**SFT, **sft, **shared, "completions/clipped_ratio": 0.6}, "rl": {**RL, **rl}}
    (run_dir / "evaluate" / "results.json").write_text(json.dumps(results))
    look = {"reward_length_correlation": 0.6, "completions/distinct_2": 0.1, "completions/repetition": 0.9}
    rows = [{"step": i, "time": i, **{f"eval/{tag}": value / (3 - i) for tag, value in look.items()}} for i in (1, 2)]
    write_rows(run_dir / "rl" / "metrics.jsonl", rows)
    html = build(run_dir).read_text(encoding="utf-8")
    checks = re.findall(r'<li class="(\w+)" id="([^"]+)">', html)
    assert len({anchor for _, anchor in checks}) == len(checks)
    judged = [(level, anchor) for level, anchor in re.findall(r'<a class="mark (\w+)" href="#([^"]+)"', html)]
    # reward, oracle, helpfulness, length, correlation, variety, repetition, cut, KL
    assert len(judged) == 9 and {level for level, _ in judged} == {"fine", "look", "trouble"}
    assert sorted(judged) == sorted(one for one in checks if one[1].startswith("check-evaluate-"))
    assert '\N{MINUS SIGN}0.050 ▼ worse <a class="mark fine"' in html and "within the healthy range" in html
    assert html.count("Reward and length:") == 1 and '<div class="warn">' not in html[html.index('id="rl"') :]


def test_a_warning_stands_below_its_chart_too(run_dir):
    html = build(run_dir).read_text(encoding="utf-8")
    assert '<div class="warn">Look. 0.550: it is wrong in two of five cases' in html
    assert "healthy from 0.6: what if not" in html and "two people agree on about three of four" in html


def test_every_chart_has_its_numbers_as_a_table(run_dir):
    html = build(run_dir).read_text(encoding="utf-8")
    assert html.count("<summary>numbers") == html.count("<svg") == 7
    assert '<td class="plain">1</td><td class="plain">0.550</td>' in html  # step 1 of the pair accuracy


def test_what_was_run(run_dir):
    (run_dir / "sft" / "config.yaml").write_text("seed: 7\ntrain: {batch_size: 32}\nolder: true\n")
    counts = {"rows": 4000, "responses": 4000, "cut_responses": 600}
    (run_dir / "sft" / "data.json").write_text(json.dumps({"train": counts, "validation": counts}))
    start = {"when": "2026-01-02T03:04:05+00:00", "device": "a card", "versions": {"torch": "2.6.0"}}
    write_rows(run_dir / "sft" / "starts.jsonl", [{**start, "step": 0}, {**start, "step": 1200}])
    write_rows(run_dir / "sft" / "non_finite" / "step-000007-rank-0.jsonl", [{"id": "a"}])
    write_rows(run_dir / "sft" / "non_finite" / "step-000007-rank-1.jsonl", [{"id": "b"}])
    rates = [{"step": i, "time": i, "train/loss": 1.0, "perf/tokens_per_second": 10.0**i} for i in (1, 2, 3)]
    write_rows(run_dir / "sft" / "metrics.jsonl", [*rates, {"step": 300, "time": 7260, "perf/peak_memory_gb": 71.5}])
    html = build(run_dir).read_text(encoding="utf-8")
    parsed(html)
    for text in ("4,000", "2, again from step 1,200", "2 h 1 min", ">100</td>", "71.5 GB", "on a card. torch 2.6.0."):
        assert text in html  # the median rate of 10, 100 and 1000 is 100
    rows = '<td class="plain">{}</td><td class="plain">{}</td><td class="plain">{}</td>'
    assert rows.format("seed", "7", "0") in html or rows.format("seed", "7", "1") in html
    assert rows.format("older", "True", "no such setting now") in html
    assert rows.format("train.batch_size", "32", "32") not in html
    assert "Steps that were not finite: 1 of 300" in html  # two ranks, one step
    assert "Responses cut in the data: 600 of 4,000" in html  # 15 %


def test_before_an_evaluation_the_samples_of_rl_are_shown(run_dir):
    (run_dir / "evaluate" / "samples" / "policies.jsonl").unlink()
    row = {"id": "1", "prompt": "Why?", "response": "So.", "reward": 0.25}
    for step, reward in ((0, 0.25), (40, 0.4), (80, 1.0)):
        write_rows(run_dir / "rl" / "samples" / f"step-{step:06d}.jsonl", [{**row, "reward": reward}])
    html = build(run_dir).read_text(encoding="utf-8")
    assert "<b>step 0 reward 0.250</b>" in html and "<b>step 80 reward 1.00 (+0.750)</b>" in html
    assert "step 40 reward" not in html


def composed(name: str, mean: float) -> dict:
    """A row of the table of compositions, as pipeline/rl/composition_samples.py makes it."""
    text = {"reward": mean, "text": "a <b>", "parts": [["a", False], [" <b>", True]]}
    return {
        "id": name,
        "prompt": "Where?",
        "reference": "here & there",
        "static": {"text": "a mat", "parts": [["a", False], [" mat", True]]},
        "samples": 64,
        "mean": mean,
        "greedy": {**text, "reward": 0.375},
        "compositions": [{**text, "reward": 0.5}, {**text, "reward": 0.125}],
        "praised": [{"token": " <b>", "instead_of": " mat", "credit": 0.25}],
        "blamed": [],
    }


def test_compositions_stand_below_the_responses(run_dir):
    responses = [{"id": "1", "prompt": "Why?", "response": "So.", "reward": 0.25}]
    for step, mean in ((0, 0.125), (40, 0.5), (80, 0.25)):
        rows = [*responses, *(composed(f"row {i}", mean) for i in range(5))]
        write_rows(run_dir / "rl" / "samples" / f"step-{step:06d}.jsonl", rows)
    html = build(run_dir).read_text(encoding="utf-8")
    parsed(html)
    shown = html[html.index("<h3>Compositions</h3>") : html.index('id="evaluate"')]
    assert "Static responses of 5 rows trained on, at step 80" in shown and "2 more rows" in shown  # three stand open
    assert "64 texts, mean reward 0.250; the best and the worst 2. At step 0: mean 0.125, greedy 0.375." in shown
    assert "a<mark> mat</mark>" in shown and "a<mark> &lt;b&gt;</mark>" in shown and "here &amp; there" in shown
    assert shown.index("<td>0.500</td>") < shown.index("<td>0.375</td><td>greedy</td>") < shown.index("<td>0.125</td>")
    assert "<mark> &lt;b&gt;</mark> +0.250, for <mark> mat</mark>" in shown
    (run_dir / "evaluate" / "samples" / "policies.jsonl").unlink()
    html = build(run_dir).read_text(encoding="utf-8")  # compositions are no responses of RL's looks
    assert html.index("<b>step 80 reward 0.250</b>") < html.index("<h3>Compositions</h3>")


def test_compositions_of_named_stages_stand_in_their_stage_and_mistakes_name_their_line(run_dir):
    path = run_dir / "rl" / "other" / "samples" / "step-000004.jsonl"
    write_rows(path, [composed("row 1", 0.5)])
    write_rows(run_dir / "rl" / "other" / "metrics.jsonl", [{"step": 1, "time": 1}])
    html = build(run_dir).read_text(encoding="utf-8")
    shown = html[html.index('id="rl-other"') : html.index('id="evaluate"')]
    assert "<h3>Compositions</h3>" in shown and "At step" not in html  # one look has no earlier one
    write_rows(path, [composed("row 1", 0.5), {"compositions": []}])
    with pytest.raises(UserError, match=r"step-000004\.jsonl:2: no 'id' in the row; run the stage again"):
        build(run_dir)


def sampled(prompt: str, *rewards: float) -> list[dict]:
    """Responses to one prompt, as pipeline/rollout/groups.py makes them."""
    mean = sum(rewards) / len(rewards)
    shared = {"kind": "rollout", "prompt": prompt, "k": len(rewards), "capability": None, "temperature": 0.5}
    return [
        {**shared, "response": f"no. {i} <b>", "reward": r, "advantage": r - mean, "tokens": 1200 + i}
        for i, r in enumerate(rewards)
    ]


def test_sampled_responses_stand_below_their_prompt_the_best_first(run_dir):
    (run_dir / "evaluate" / "samples" / "policies.jsonl").unlink()
    held_out = [{"id": "1", "prompt": "Why?", "response": "So.", "reward": 0.25}]
    rows = [*sampled("few", 0.25, 0.75), *sampled("many", *range(10)), *sampled("same", 1.0, 1.0), *sampled("one", 2.0)]
    write_rows(run_dir / "rl" / "samples" / "step-000000.jsonl", held_out)
    write_rows(run_dir / "rl" / "samples" / "step-000004.jsonl", [*held_out, *sampled("Earlier?", 0.0)])
    write_rows(run_dir / "rl" / "samples" / "step-000008.jsonl", [*held_out, *rows])
    html = build(run_dir).read_text(encoding="utf-8")
    parsed(html)
    assert html.index("<b>step 8 reward 0.250</b>") < html.index("<h3>Sampled responses</h3>")  # and are none of these
    shown = html[html.index("<h3>Sampled responses</h3>") : html.index('id="evaluate"')]
    assert "4 prompts trained on, with all responses sampled at step 8" in shown and "1 more prompts" in shown
    assert "Earlier?" not in shown and shown.count("All earn the same") == 1
    assert "2 responses at temperature 0.500, mean reward 0.500. Capability before the step: unknown." in shown
    best = '<td>0.750</td><td>+0.250</td><td>1,201</td><td dir="auto">no. 1 &lt;b&gt;</td>'
    assert shown.index(best) < shown.index("<td>0.250</td><td>\N{MINUS SIGN}0.250</td><td>1,200</td>")
    # of ten the best four and the worst four, two between
    assert shown.index("no. 6 ") < shown.index("<summary>2 between</summary>") < shown.index("no. 3 ")
    assert "1 response at" in shown


def test_a_broken_row_of_sampled_responses_names_its_line(run_dir):
    path = run_dir / "rl" / "other" / "samples" / "step-000004.jsonl"
    write_rows(path, sampled("a", 0.5))
    write_rows(run_dir / "rl" / "other" / "metrics.jsonl", [{"step": 1, "time": 1}])
    assert "<h3>Sampled responses</h3>" in build(run_dir).read_text(encoding="utf-8")
    write_rows(path, [*sampled("a", 0.5), {"kind": "rollout", "prompt": "a"}])
    with pytest.raises(UserError, match=r"step-000004\.jsonl:2: no 'response' in the row; run the stage again"):
        build(run_dir)


def test_charts_of_sampled_responses():
    tags = ["rollout/queue_mean", "train/reward", "esrl/tokens_saved", "loss/mle", "perf/sampling_seconds"]
    drawn = {chart.title: (chart.group, names) for chart, names in charts_for("rl", tags)}
    assert drawn["Baseline"] == ("Sampled responses", ["rollout/queue_mean", "train/reward"])
    assert drawn["Parts of the loss"] == ("Learning", ["loss/mle"])  # with hidden tokens or without
    assert drawn["Seconds of sampling per step"] == ("Speed", ["perf/sampling_seconds"])
    rows = [{"step": i, **dict.fromkeys(tags, 0.5), "rollout/generated_tokens": 640.0} for i in (1, 2)]
    parsed(show_curves("rl", series_of(rows), {}))


def test_what_was_generated_stands_among_the_final_numbers(tmp_path):
    rows = [{"step": i, "rollout/generated_tokens": 1000.0, "esrl/tokens_saved": 0.5} for i in (1, 2, 3)]
    write_rows(tmp_path / "rl" / "metrics.jsonl", rows)
    (tmp_path / "rl" / "results.json").write_text('{"steps": 3, "model_step": 3}')
    html = build(tmp_path).read_text(encoding="utf-8")
    assert "<dt>tokens generated</dt><dd>3,000</dd>" in html and "<dt>share of tokens saved</dt><dd>0.500</dd>" in html
    assert "50%, 3,000 tokens in place of 6,000" in html


def test_charts_of_hidden_tokens():
    tags = ["semi_offline/greedy_reward", "semi_offline/reward", "eval/reward", "eval/loss", "eval/masked_loss"]
    drawn = {chart.title: names for chart, names in charts_for("rl", tags)}
    assert drawn["Compositions and decoded responses"] == ["semi_offline/greedy_reward", "eval/reward"]
    assert drawn["Reward"] == ["semi_offline/reward", "eval/reward"] and drawn["Loss"] == ["eval/loss"]
    assert drawn["Held-out loss, inputs masked"] == ["eval/masked_loss", "eval/loss"]
    rows = [{"step": i, **dict.fromkeys(tags, 0.5)} for i in (1, 2)]
    parsed(show_curves("rl", series_of(rows), {}))
    assert "Compositions and decoded responses" not in str(charts_for("rl", tags[1:]))


def test_healthy_curves_bring_no_warning(tmp_path):
    write_rows(tmp_path / "sft" / "metrics.jsonl", [{"step": i, "train/loss": 1 / i} for i in range(1, 5)])
    html = build(tmp_path).read_text(encoding="utf-8")
    assert "1 checks: 0 to look at, 1 fine." in html and "Steps that were not finite: 0 of 4" in html


def test_what_is_missing_is_left_out(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.yaml").write_text("seed: 0\n")
    html = build(tmp_path).read_text(encoding="utf-8")
    parsed(html)
    assert "Supervised fine-tuning" in html
    assert "started, nothing learned yet" in html
    assert not any(word in html for word in ("<svg", "Samples", "difference", "#look", "#model", "Reward model"))


def test_a_comparison_and_a_benchmark_in_the_run_are_left_out(run_dir):
    alone = build(run_dir).read_text(encoding="utf-8")
    spread = {"mean": 1.0, "min": 1.0, "max": 1.0, "sd": None, "per_seed": {"1": 1.0}, "minus": {}}
    others = {"compare": {"alol": {"reward": spread}}, "bench": {"settings": {"rounds": 7}, "results": [{}]}}
    for name, results in others.items():
        (run_dir / name).mkdir()
        (run_dir / name / "results.json").write_text(json.dumps(results))
    assert build(run_dir).read_text(encoding="utf-8") == alone


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_run_is_a_user_error_with_the_cure(tmp_path, exists):
    place = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(UserError, match=r"no stage has left anything to report, wanted .* run a stage first"):
        build(place)


@pytest.mark.parametrize("text, said", [('{"sft": ', "not JSON"), ("[1]", "found list, wanted a JSON object")])
def test_a_broken_results_file_names_its_place(run_dir, text, said):
    (run_dir / "evaluate" / "results.json").write_text(text)
    with pytest.raises(UserError, match=f"evaluate/results.json.*{said}"):
        build(run_dir)


def test_a_broken_sample_names_its_line(run_dir):
    path = run_dir / "evaluate" / "samples" / "policies.jsonl"
    path.write_text(path.read_text() + '{"policy": "sft"}\n')
    with pytest.raises(UserError, match=r"policies\.jsonl:3: no 'id' in the row"):
        build(run_dir)
    path.write_text('{"policy": \n')
    with pytest.raises(UserError, match=r"policies\.jsonl:1: not JSON"):
        build(run_dir)


def test_an_uncertain_or_small_change_counts_as_the_same(tmp_path):
    (tmp_path / "evaluate").mkdir()
    # 0.02 < 2 sqrt(0.01^2 + 0.01^2) = 0.028; 0.301 - 0.300 < 0.02 * 0.3
    sft = {"reward": 0.40, "reward_se": 0.01, "completions/distinct_2": 0.3}
    rl = {"reward": 0.42, "reward_se": 0.01, "completions/distinct_2": 0.301}
    (tmp_path / "evaluate" / "results.json").write_text(json.dumps({"sft": sft, "rl": rl}))
    html = build(tmp_path).read_text(encoding="utf-8")
    assert "+0.020 ≈ same" in html and "+0.001 ≈ same" in html
    assert "▲ better" not in html and "▼ worse" not in html


def test_a_band_may_be_relative():
    values = [2.0] * 5 + [1.0] * 5 + [3.0] * 10  # begins at 2
    assert bounds("length", values) == (2 * 0.67, 2 * 1.33)
    assert bounds("kept", values) == (0.2, 0.8)
    assert bounds("variety", [-1.0, 2.0]) == (None, None)  # a share of -1 bounds nothing
    assert bounds("grad_spike", values) == bounds("", values) == (None, None)


def test_held_out_stands_beside_trained_and_no_tag_is_lost():
    tags = ["train/loss", "eval/loss", "logged/reward", "eval/reward", "my/own", "eval/rewards/a/mean"]
    drawn = charts_for("rl", tags)
    assert next(names for _, names in drawn) == ["train/loss", "eval/loss"]
    assert ["logged/reward", "eval/reward"] in [names for _, names in drawn]
    assert sorted(tag for _, names in drawn for tag in names) == sorted(tags)


def test_every_key_of_the_measures_is_read():
    entries = [one for file in FOLDER.glob("*.yaml") for group in load_yaml(file).values() for one in group]
    assert len(entries) > len(charts()) > 50 and len(rules()) == len({rule.name for rule in rules().values()})
    read = {*Chart._fields, "name", "unit", "drawn", "reads", "where", "limits"}
    assert {key for entry in entries for key in entry} <= read
    assert all({"title", "caption", "tags"} <= entry.keys() for entry in entries if "title" in entry)


def test_labels_of_metrics():
    assert metric_of("rewards/oracle:helpfulness/mean")[1] == "True helpfulness (oracle)"
    assert metric_of("rewards/my_rouge/mean")[1] == "Reward: my rouge"
    assert metric_of("unheard/of")[1] == "unheard/of"


def test_thin_keeps_mean_and_span():
    # four points in two runs: steps (0+1)/2 and (2+3)/2, values (1+3)/2 and (5+5)/2
    assert svg.thin([(0, 1.0), (1, 3.0), (2, 5.0), (3, 5.0)], limit=2) == [
        (0.5, 2.0, 1.0, 3.0),
        (2.5, 5.0, 5.0, 5.0),
    ]
    assert svg.thin([(0, 1.0)], limit=2) == [(0, 1.0, 1.0, 1.0)]


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.5, "0.500"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (-0.25, "-0.250"),
        (3e-5, "3e-5"),
        (0.0004, "4e-4"),
        (1e9, "1e9"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text.replace("-", MINUS)


@pytest.mark.parametrize("points", [[(5, 1.0)], [(0, 2.0), (10, 2.0)], [(1, -1e-6), (2, 1e6)], [(0, 0.0), (1, 0.0)]])
def test_odd_curves_draw_without_nonsense(points):
    picture = svg.Plot([svg.Curve("a", "#000", points)], low=0.0, high=1.0, axis=(0.0, 1.0))
    drawn = svg.line_chart(picture, 'a "quoted" <curve>')
    parsed(drawn)
    assert "nan" not in drawn and "inf" not in drawn


def test_ticks_of_a_nearly_level_curve_can_be_told_apart():
    points = [(1, 10.8409), (2, 10.8396), (3, 10.8414)]
    drawn = svg.line_chart(svg.Plot([svg.Curve("a", "#000", points)]), "loss")
    assert [tick for tick in ("10.835", "10.840", "10.845") if f">{tick}<" in drawn] == ["10.835", "10.840", "10.845"]


def test_curves_are_named_by_what_differs():
    rows = [
        {"step": i, "train/margin": 1.0, "eval/margin": 2.0, "scores/a/mean": 0.5, "scores/b/mean": 0.25}
        for i in (1, 2)
    ]
    html = show_curves("reward", series_of(rows), {})
    for name in ("training 1.00", "held-out 2.00", "a 0.500", "b 0.250"):
        assert f"</i>{name}</span>" in html


def test_ticks_of_a_scatter_plot_differ() -> None:
    """Rewards of neighbouring policies may differ in the fourth digit."""
    marks = [svg.Mark(i, f"seed {i}", 0.0004 * i, 1.0 + 0.0004 * i) for i in range(3)]
    drawn = re.findall(r'<text[^>]*text-anchor="end"[^>]*>([^<]+)</text>', svg.scatter(marks, "KL", "reward over KL"))
    assert drawn == ["1.0000", "1.0005", "KL"]


def test_the_rewards_of_all_responses_are_drawn_as_distributions(run_dir):
    rows = [{"policy": "sft", "id": f"q{i}", "reward": 0.25 * (i % 4)} for i in range(8)]  # 0, 0.25, 0.5, 0.75 twice
    rows += [
        {**row, "policy": "rl", "reward": min(1.0, row["reward"] + 0.5 * (i < 6) + 1e-9)} for i, row in enumerate(rows)
    ]
    write_rows(run_dir / "evaluate" / "rewards.jsonl", rows)
    html = build(run_dir).read_text(encoding="utf-8")
    parsed(html)
    shown = html[html.index('class="spread"') : html.index('class="sample"')]
    # the means: (0 + 0.25 + 0.5 + 0.75) / 4; rl 0.5, 0.75, 1, 1, 0.5, 0.75, 0.5, 0.75: 5.75 / 8
    assert "sft, mean 0.375" in shown and "rl, mean 0.719" in shown
    assert shown.count("<title>0 to 0.05: 25.0%</title>") == 1 and "6 of 8 prompts are answered better by rl" in shown
    assert "0 worse, 2 the same." in shown
    write_rows(run_dir / "evaluate" / "rewards.jsonl", rows[:7])
    assert 'class="spread"' not in build(run_dir).read_text(encoding="utf-8")  # too few to draw
    write_rows(run_dir / "evaluate" / "rewards.jsonl", [{"policy": "sft", "id": "q"}])
    with pytest.raises(UserError, match=r"rewards\.jsonl:1: no 'reward' in the row; run the stage again"):
        build(run_dir)


def test_equal_rewards_draw_one_bar(run_dir):
    write_rows(run_dir / "evaluate" / "rewards.jsonl", [{"policy": "sft", "id": i, "reward": -1.5} for i in range(9)])
    html = build(run_dir).read_text(encoding="utf-8")
    parsed(html)
    assert html.count(": 100.0%</title>") == 1 and "nan" not in html


def test_words_are_counted_as_in_the_table_and_rounding_is_no_change(run_dir):
    text = {"id": "1", "prompt": "?", "response": "\u628a\u571f\u88c5\u8fdb\u82b1"}
    rows = [{**text, "policy": "sft", "reward": 0.5}, {**text, "policy": "rl", "reward": 0.5 + 1e-8}]
    write_rows(run_dir / "evaluate" / "samples" / "policies.jsonl", rows)
    html = build(run_dir).read_text(encoding="utf-8")
    assert html.count("5 words") == 2 and "<b>rl reward 0.500</b>" in html


def test_long_texts_are_cut_and_whole_after_a_click_whatever_their_script(run_dir):
    path = run_dir / "evaluate" / "samples" / "policies.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["response"], rows[1]["response"] = "\u0645\u0631\u062d\u0628\u0627 " * 400, "<b>" + "\u4e2d" * 1200
    write_rows(path, rows)
    html = build(run_dir).read_text(encoding="utf-8")
    parsed(html)
    assert html.count('<details class="text long ">') == 2 and html.count("\u0645\u0631\u062d\u0628\u0627") == 400
    assert html.count("\u4e2d") == 1200 and "&lt;b&gt;\u4e2d" in html
    assert '<summary dir="auto">' in html and '<div class="text soft" dir="auto">' in html


def test_where_the_model_is_and_how_it_is_called(run_dir):
    assert 'id="model"' not in build(run_dir).read_text(encoding="utf-8")
    (run_dir / "sft" / "model").mkdir()
    page = build(run_dir).read_text(encoding="utf-8")
    assert "What Supervised fine-tuning left" in page and f"{escape(run_dir.name)}/sft/model</pre>" in page
    (run_dir / "rl" / "model").mkdir()
    code = 'from pathlib import Path\n\ndirectory = "DIRECTORY"  # here\nfound = Path(directory).is_dir() and 1 < 2\n'
    (run_dir / "rl" / "model" / "README.md").write_text(
        f"# A model\n\n```python\n{code}```\n\n```python\nmore()\n```\n"
    )
    page = build(run_dir).read_text(encoding="utf-8")
    assert "What Reinforcement learning left" in page and "more()" not in page
    shown = re.search(r'in Python:</p><pre class="copy">(.*?)</pre>', page, re.DOTALL).group(1)
    assert "1 &lt; 2" in shown and "# here" not in shown
    pasted: dict[str, bool] = {}
    exec(unescape(shown), pasted)
    assert pasted["found"]


def test_a_start_that_learned_nothing_is_a_line(run_dir):
    (run_dir / "rl" / "again").mkdir()
    (run_dir / "rl" / "again" / "config.yaml").write_text("seed: 0\n")
    html = build(run_dir).read_text(encoding="utf-8")
    assert 'Reinforcement learning: again <span class="note">started, nothing learned yet</span>' in html


def test_it_opens_with_one_sentence_and_its_verdict(run_dir):
    html = build(run_dir).read_text(encoding="utf-8")
    top = html[html.index("<h1>") : html.index("<nav>")]
    # the oracle fell while the reward rose
    assert 'class="headline trouble"' in top and "Reward 0.410 to 0.630 (+0.220, sure)" in top
    (run_dir / "evaluate" / "results.json").unlink()
    untrained = {"steps": 20, "model_step": 0, "eval/loss": 1.0}
    (run_dir / "rl" / "results.json").write_text(json.dumps(untrained))
    html = build(run_dir).read_text(encoding="utf-8")
    assert '<p class="headline trouble">' in html and "Taught nothing: in 20 steps" in html


def test_the_next_command_follows_the_last_stage_that_ended(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "command.txt").write_text("bash run.sh recipe=demo stage=sft run=mine\n")
    (tmp_path / "sft" / "results.json").write_text('{"steps": 3, "model_step": 3}')
    html = build(tmp_path).read_text(encoding="utf-8")
    assert '<pre class="copy">bash run.sh stage=reward name=helpfulness run=mine recipe=demo</pre>' in html
    (tmp_path / "sft" / "command.txt").write_text("bash run.sh stage=sft gone=1\n")
    assert "bash run.sh stage=reward" not in build(tmp_path).read_text(encoding="utf-8")


def test_every_evaluation_has_its_checks_and_the_last_one_opens_the_page(run_dir):
    named = run_dir / "evaluate" / "again"
    named.mkdir()
    (named / "results.json").write_text(json.dumps({"sft": SFT, "rl": {**RL, "reward": 0.2}}))
    html = build(run_dir).read_text(encoding="utf-8")
    page = parsed(html)
    assert {link.removeprefix("#") for link in page.links} <= page.anchors
    assert "Evaluation: again: reward 0.410 to 0.200" in html[: html.index("<nav>")] and "rl against sft, again" in html
    assert html.index("0.200") < html.index('id="stages"') < html.index("+0.220 ▲ better")
