"""The report: it holds the numbers, escapes the texts, is sound HTML, and speaks up where a value is unhealthy."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from pipeline import charts
from pipeline.chart_table import CHARTS, charts_for
from pipeline.glossary import METRICS, Range, metric_of
from pipeline.records import UserError
from pipeline.report import build
from pipeline.report_curves import bounds, series_of, show_curves

VOID = {"meta", "br", "hr", "img", "link"}
SFT = {"reward/mean": 0.41, "reward/se": 0.01, "completions/mean_length": 20.0, "rewards/oracle:helpfulness/mean": 0.6}
RL = {"reward/mean": 0.63, "reward/se": 0.01, "completions/mean_length": 44.0, "rewards/oracle:helpfulness/mean": 0.5}


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
    write_rows(run / "reward" / "helpfulness" / "metrics.jsonl", [{"step": i, **pairs} for i in (1, 2, 3)])
    (run / "reward" / "helpfulness" / "results.json").write_text(json.dumps(pairs))
    (run / "score").mkdir()
    (run / "score" / "results.json").write_text('{"train": {"rows": 4321, "reward/mean": 0.48}}')
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
    assert html.count("<svg") == 6  # sft loss; reward accuracy, by source, and pairs; rl clipped share and ratio
    assert "300 steps in 5 min 0 s" in html


def test_texts_are_escaped_and_policies_stand_in_the_order_of_the_results(run_dir):
    html = build(run_dir).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "<script" not in html
    assert "a &lt; b" in html and "# &lt;slow&gt;" in html
    assert html.index("<b>sft</b>") < html.index("<b>rl</b>")


def test_it_warns_of_what_is_unhealthy(run_dir):
    html = build(run_dir).read_text(encoding="utf-8")
    assert "value/r2 is −0.200 (healthy: at least 0)" in html  # noqa: RUF001
    assert (
        "ratio/clip_fraction_high ends at 0.950 (healthy: at most 0.500)" in html
    )  # the last tenth of 19 is one point
    assert "eval/accuracy ends at 0.550, no better than length alone (0.600)" in html
    assert "Length (words) went from 20.0 to 44.0 with rl: responses are more than half as long again" in html
    assert "although the reward rose: the policy exploits the reward models" in html


def test_healthy_curves_bring_no_warning(tmp_path):
    write_rows(tmp_path / "sft" / "metrics.jsonl", [{"step": i, "train/loss": 1 / i} for i in range(1, 5)])
    assert "Every curve ended in its healthy range." in build(tmp_path).read_text(encoding="utf-8")


def test_what_is_missing_is_left_out(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.yaml").write_text("seed: 0\n")
    html = build(tmp_path).read_text(encoding="utf-8")
    parsed(html)
    assert "Supervised fine-tuning" in html
    assert not any(word in html for word in ("<svg", "Samples", "difference", "What was run", "Reward model"))


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
    sft = {"reward/mean": 0.40, "reward/se": 0.01, "completions/distinct_2": 0.3}
    rl = {"reward/mean": 0.42, "reward/se": 0.01, "completions/distinct_2": 0.301}
    (tmp_path / "evaluate" / "results.json").write_text(json.dumps({"sft": sft, "rl": rl}))
    html = build(tmp_path).read_text(encoding="utf-8")
    assert "+0.020 ≈ same" in html and "+0.001 ≈ same" in html
    assert "▲ better" not in html and "▼ worse" not in html


def test_a_healthy_range_may_be_relative():
    values = [2.0] * 5 + [1.0] * 5 + [3.0] * 10  # begins at 2, lowest 1
    assert bounds(Range(0.5, 1.5, against="start"), values) == (1.0, 3.0)
    assert bounds(Range(high=1.5, against="lowest"), values) == (None, 1.5)
    assert bounds(Range(0.3, 0.7), values) == (0.3, 0.7)
    assert bounds(Range(0.5, 1.5, against="start"), [-1.0, 2.0]) == (None, None)  # a share of -1 bounds nothing


def test_a_rising_held_out_loss_is_called_memorising():
    rows = [{"step": i, "train/loss": 1.0, "eval/loss": loss} for i, loss in enumerate((2.0, 1.0, 1.2))]
    warnings = show_curves("sft", series_of(rows), {}).warnings
    assert len(warnings) == 1 and "eval/loss ends at 1.20 (healthy: at most 1.10)" in warnings[0]
    assert show_curves("rl", series_of(rows), {}).warnings == []  # a weighted loss means nothing of the kind


def test_held_out_stands_beside_trained_and_no_tag_is_lost():
    tags = ["train/loss", "eval/loss", "reward/mean", "eval/reward/mean", "my/own", "rewards/a/mean"]
    drawn = charts_for("rl", tags)
    assert next(names for _, names in drawn) == ["train/loss", "eval/loss"]
    assert ["reward/mean", "eval/reward/mean"] in [names for _, names in drawn]
    assert sorted(tag for _, names in drawn for tag in names) == sorted(tags)


def test_every_range_says_what_is_wrong_outside_it():
    for entry in (*CHARTS, *METRICS):
        healthy = entry.healthy
        assert (healthy.low is None) == (healthy.below == "") and (healthy.high is None) == (healthy.above == ""), entry
        assert healthy.against in ("value", "start", "lowest")


def test_labels_of_metrics():
    assert metric_of("rewards/oracle:helpfulness/mean")[1] == "True helpfulness (oracle)"
    assert metric_of("rewards/my_rouge/mean")[1] == "Reward: my rouge"
    assert metric_of("unheard/of")[1] == "unheard/of"


def test_thin_keeps_mean_and_span():
    # four points in two runs: steps (0+1)/2 and (2+3)/2, values (1+3)/2 and (5+5)/2
    assert charts.thin([(0, 1.0), (1, 3.0), (2, 5.0), (3, 5.0)], limit=2) == [
        (0.5, 2.0, 1.0, 3.0),
        (2.5, 5.0, 5.0, 5.0),
    ]
    assert charts.thin([(0, 1.0)], limit=2) == [(0, 1.0, 1.0, 1.0)]


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
    assert charts.number(value) == text.replace("-", charts.MINUS)


@pytest.mark.parametrize("points", [[(5, 1.0)], [(0, 2.0), (10, 2.0)], [(1, -1e-6), (2, 1e6)], [(0, 0.0), (1, 0.0)]])
def test_odd_curves_draw_without_nonsense(points):
    picture = charts.Picture([charts.Curve("a", "#000", points)], low=0.0, high=1.0, axis=(0.0, 1.0))
    svg = charts.line_chart(picture, 'a "quoted" <curve>')
    parsed(svg)
    assert "nan" not in svg and "inf" not in svg


def test_curves_are_named_by_what_differs():
    rows = [
        {"step": i, "train/margin": 1.0, "eval/margin": 2.0, "scores/a/mean": 0.5, "scores/b/mean": 0.25}
        for i in (1, 2)
    ]
    html = show_curves("reward", series_of(rows), {}).html
    for name in ("training 1.00", "held-out 2.00", "a 0.500", "b 0.250"):
        assert f"</i>{name}</span>" in html
