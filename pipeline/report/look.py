"""What to look at first: the verdicts on a run's numbers, gravest first, each with what to do and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.report import html as page
from pipeline.report.checks import LEVELS, Verdict, judge
from pipeline.report.readings import of_policies
from pipeline.report.spec import FINE
from pipeline.report.stages import Stage
from pipeline.report.tables import columns_of

Found = tuple[str, Verdict]  # where, what


def of_evaluation(stage: Stage) -> list[Found]:
    """The verdicts on every policy beside the first."""
    policies = columns_of(stage.results)
    monitors = list(stage.settings.get("monitors") or [])  # names, or the keys of a mapping
    first, *others = policies
    return [
        (f"{other} against {first}", judge(quantity, reading))
        for other in others
        for quantity, reading in of_policies(policies[first], policies[other], monitors).items()
    ]


def look(evaluation: Sequence[Found], stages: Sequence[tuple[Stage, Mapping[str, Verdict]]]) -> str:
    """The list; what the final evaluation has judged is not told again of RL's own looks on the way there."""
    told = {verdict.quantity for _, verdict in evaluation}
    found = list(evaluation)
    for stage, verdicts in stages:
        found += [(stage.title, v) for q, v in verdicts.items() if stage.kind != "rl" or q not in told]
    if not found:
        return ""
    found.sort(key=lambda one: LEVELS.index(one[1].level))  # stable: within a level as told above
    wrong = [_line(place, verdict) for place, verdict in found if verdict.level != FINE]
    fine = [_line(place, verdict) for place, verdict in found if verdict.level == FINE]
    html = page.heading(2, "What to look at first", "look")
    html += page.paragraph(f"{len(found)} checks: {len(wrong)} to look at, {len(fine)} fine.", "soft")
    html += page.findings(wrong) if wrong else ""
    return html + (page.folded(f"{len(fine)} checks that are fine", page.findings(fine)) if fine else "")


def _line(place: str, verdict: Verdict) -> page.Finding:
    return page.Finding(verdict.level, place, verdict.name, verdict.text, verdict.words, verdict.why)
