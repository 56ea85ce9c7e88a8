"""The figures of the studies: each is what its table says, and each study with a table of gains has one."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from pipeline.errors import UserError
from pipeline.report import comparison
from tests.documents import DOCUMENTS, ROOT

HERE = ROOT / "stages" / "recipes"
RESULTS = DOCUMENTS["stages/recipes/RESULTS.md"]
TWO = """## A study

![x](figures/a.svg)

| | reward | oracle | KL | generated tokens |
|---|---|---|---|---|
| `SFT` | -1.0 | 1.0 | 0 | |
| `alol`, [twice](there) | +0.30 (+0.10 .. +0.50) | \N{MINUS SIGN}0.20 (\N{MINUS SIGN}0.30 .. +0.10) | 2.00 | 7 |
| `nll` | +0.10 | +0.05 | 1.00 (0.50 .. 1.50) | 8 |
| other | +0.10 | +0.05 | | 9 |
"""


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_studies", HERE / "draw_studies.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def marks(drawn: str) -> set[str]:
    return set(re.findall(r"<title>([^<]*)</title>", drawn))


def test_the_figures_are_those_of_the_tables(module: ModuleType) -> None:
    drawn = module.figures(RESULTS)
    kept = {f"figures/{path.name}": path.read_text(encoding="utf-8") for path in (HERE / "figures").iterdir()}
    assert kept.keys() == drawn.keys()
    changed = [name for name in drawn if kept[name] != drawn[name]]
    assert not changed, "python stages/recipes/draw_studies.py draws them anew"


def test_each_study_with_a_table_of_gains_has_a_figure(module: ModuleType) -> None:
    studies = [
        (start, "\n".join(section))
        for start, section in module.sections(RESULTS)
        if any(module.gain_column(table) is not None for table in module.tables_of(section, start))
    ]
    assert len(studies) >= 10
    assert [f"RESULTS.md:{start}" for start, text in studies if not module.IMAGE.search(text)] == []


def test_a_table_is_drawn_by_the_oracle_over_the_kl(module: ModuleType) -> None:
    drawn = module.figures(TWO)["figures/a.svg"]
    assert marks(drawn) == {"alol, twice: -0.2 (-0.3 .. +0.1)", "nll: +0.05 (+0.05 .. +0.05)"}  # the start is none
    assert ">gain, oracle (bars: brackets of the table); no distance is known of other<" in drawn
    assert ">KL from the start, nats per response<" in drawn


def test_a_table_without_kl_is_drawn_over_what_was_generated(module: ModuleType) -> None:
    text = TWO.replace("KL", "words").replace("oracle", "chrF").replace("-1.0", "1.0")
    drawn = module.figures(text)["figures/a.svg"]
    assert ">generated tokens<" in drawn and "gain, reward (bars" in drawn
    assert "other: +0.1 (+0.1 .. +0.1)" in marks(drawn)


def test_the_tables_of_a_comparison_are_drawn_as_they_are(module: ModuleType) -> None:
    """The differences, over the KL of the table before them."""
    judged = {
        1: {"sft": {"reward": -1.0}, "alol": {"reward": -0.5, "objective/kl": 2.0}},
        2: {"sft": {"reward": -2.0}, "alol": {"reward": -1.75, "objective/kl": 4.0}},
    }
    table = comparison.summary(judged, ["sft"])
    drawn = module.figures(f"## A\n\n![x](figures/a.svg)\n\n{comparison.markdown(table, ['sft'], [1, 2])}")
    assert marks(drawn["figures/a.svg"]) == {"alol: +0.375 (+0.25 .. +0.5)"}  # 0.5 and 0.25
    assert marks(comparison.gain_picture(table, "sft")) == marks(drawn["figures/a.svg"])


def test_what_cannot_be_drawn_is_said(module: ModuleType) -> None:
    with pytest.raises(UserError, match=r"RESULTS.md:3: no table of gains .* below figures/a.svg"):
        module.figures(TWO.replace("+", ""))
    with pytest.raises(UserError, match=r"RESULTS.md:5: no column .* KL, generated tokens, seconds"):
        module.figures(TWO.replace("KL", "x").replace("generated", "y"))
    with pytest.raises(UserError, match=r"RESULTS.md:5: two lines"):
        module.figures(TWO.replace("other", "nll"))
    with pytest.raises(UserError, match=r"RESULTS.md:5: the gain of other has no sign"):
        module.figures(TWO.replace("| other | +0.10 | +0.05 |", "| other | +0.10 | 0.000 (-0.01 .. +0.02) |"))
    with pytest.raises(UserError, match=r"RESULTS.md:5: other has not as many cells"):
        module.figures(TWO.replace("| 9 |", "|"))
    with pytest.raises(UserError, match=r"RESULTS.md:\d+: figures/a.svg is shown above too"):
        module.figures(TWO + TWO)


def anchored(module: ModuleType) -> dict[str, list]:
    """{anchor of a heading: the tables below it}"""
    return {
        re.sub(r"[,:?*]", "", section[0].lstrip("# ")).lower().replace(" ", "-"): module.tables_of(section, start)
        for start, section in module.sections(RESULTS)
        if section
    }


def over_the_control(module: ModuleType, tables: list, name: str, word: str) -> str:
    """What the overview says of a method: its gain less that of shuffled rewards, and the KL, of the first table.

    The control is the table's own, else that of the table before.
    """
    control = None
    for table in tables:
        control = next((row[column_of(table, word)] for n, row in table.lines.items() if "shuffled" in n), control)
        rows = [row for of, row in table.lines.items() if re.split(r"[, ]", of)[0] == name and "shuffled" not in of]
        if rows:
            gain, far = rows[0][column_of(table, word)], rows[0][column_of(table, "KL")]
            over = module.reach(gain).mean - module.reach(control).mean
            return f"{over:.3f} at {module.reach(far).mean:.2f}".replace("-0.000", "0.000")
    return ""


def column_of(table, word: str) -> int:
    return next(i for i, title in enumerate(table.head) if word in title)


def test_the_overview_is_what_the_tables_say(module: ModuleType) -> None:
    """Each cell is of the sections that its column links to, and of their column with the last word of its title."""
    tables = anchored(module)
    overview, _ = tables["what-each-method-gains"]
    section = RESULTS[RESULTS.index("## What each method gains") :]
    titles = module.cells(section[section.index("| `algo=` |") :].splitlines()[0])[1:]
    assert len(overview.lines) >= 19 and len(titles) == 4
    for i, title in enumerate(titles):
        of = [table for anchor in re.findall(r"\(#([\w-]+)\)", title) for table in tables[anchor][:1]]
        word = title.split(" ")[-1]
        for name, row in overview.lines.items():
            assert row[i] == over_the_control(module, of, name, word), (name, title)
