"""A run's directory -> report.html: one page that a person can read and send.

Read are, per stage directory, config.yaml, command.txt, data.json (counts), starts.jsonl, metrics.jsonl,
non_finite/ and results.json; and of evaluate also samples/*.jsonl with rows {"policy", "id", "prompt", "response",
"reward", "rewards"}. What is missing is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.metrics import flatten, write_text
from pipeline.records import UserError
from pipeline.report import html as page
from pipeline.report.checks import Verdict
from pipeline.report.curves import show_curves
from pipeline.report.facts import duration, what_was_run
from pipeline.report.look import look, of_evaluation
from pipeline.report.samples import show_samples
from pipeline.report.stage_checks import spent
from pipeline.report.stages import FILES, STAGES, Stage, stages_of, verdicts
from pipeline.report.tables import columns_of, comparison, final_numbers, side_by_side


def build(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path. Raises UserError if no stage has left anything there."""
    run_dir = Path(run_dir)
    stages = stages_of(run_dir)
    if not stages:
        raise UserError(
            f"{run_dir}: no stage has left anything to report, wanted at least one of {', '.join(STAGES)} with "
            f"{' or '.join(FILES)}; run a stage first, or name another run with run="
        )
    final = [stage for stage in stages if stage.name == "evaluate" and columns_of(stage.results)]
    policies = columns_of(final[0].results) if final else {}
    judged = [(stage, verdicts(stage)) for stage in stages]
    parts = [
        ("look", "What to look at first", look(of_evaluation(final[0]) if final else [], judged)),
        ("results", "Results", page.heading(2, "Results", "results") + comparison(policies) if policies else ""),
        ("samples", "Samples", show_samples(run_dir, list(policies))),
        *((stage.anchor, stage.title, _section(stage, found)) for stage, found in judged),
        ("commands", "What was run", what_was_run(stages)),
    ]
    links = [(anchor, title) for anchor, title, html in parts if html]
    path = run_dir / "report.html"
    body = _top(run_dir, stages, links) + "".join(html for _, _, html in parts)
    write_text(path, page.document(f"Report: {run_dir.resolve().name}", body))
    return path


def _top(run_dir: Path, stages: Sequence[Stage], links: Sequence[tuple[str, str]]) -> str:
    files = [stage.folder / name for stage in stages for name in FILES]
    newest = max(path.stat().st_mtime for path in files if path.is_file())
    when = time.strftime("%d %B %Y, %H:%M", time.localtime(newest))
    words = f"{len(stages)} stages, {duration(sum(stage.seconds for stage in stages))} of training, last changed {when}"
    return page.heading(1, run_dir.resolve().name) + page.paragraph(words, "soft") + page.links(links)


def _section(stage: Stage, found: Mapping[str, Verdict]) -> str:
    html = page.heading(2, stage.title, stage.anchor) + page.paragraph(STAGES[stage.kind][1])
    if stage.steps:
        html += page.paragraph(f"{stage.steps:,} steps in {duration(stage.seconds)}", "soft")
    if stage.results and stage.name == "evaluate":
        html += page.paragraph("Its table stands above, under Results.")
    elif stage.results:
        columns = columns_of(stage.results)
        table = comparison if stage.kind == "evaluate" else side_by_side
        html += table(columns) if columns else final_numbers({**flatten(stage.results), **spent(stage.series)})
    return html + show_curves(stage.kind, stage.series, flatten(stage.results), found)
