"""The picture of gains: where its names stand, when its axis is logarithmic, and that its marks differ."""

from __future__ import annotations

import re

import pytest

from pipeline.report import figure, svg


def policies(*places: tuple[float, float]) -> list[figure.Gained]:
    reaches = [(figure.Reach(x, x, x), figure.Reach(y, y, y)) for x, y in places]
    return [figure.Gained(i, f"p{i}", x, y) for i, (x, y) in enumerate(reaches)]


def test_names_that_would_touch_are_moved_apart_about_their_middle():
    drawn = figure.picture(policies((1.0, 0.5), (2.0, 0.5), (1.5, 0.5), (1.0, 1.0), (1.0, 0.0)), "gain", "KL")
    names = re.findall(r'<text x="[\d.]+" y="([\d.]+)" font-size="8.5"[^>]*>(p\d)<', drawn)
    heights = {name: float(y) for y, name in names}
    # 0 to 1 and 0.06 on both sides from 274 up to 10: 0.5 lies at 142, 3 above the foot of its name
    assert [heights[name] for name in ("p0", "p1", "p2")] == [135.0, 145.0, 155.0]
    assert heights["p3"] == pytest.approx(10 + 264 * 0.06 / 1.12 + 3, abs=0.05)
    assert heights["p4"] == pytest.approx(274 - 264 * 0.06 / 1.12 + 3, abs=0.05)


def test_one_policy_far_away_makes_the_axis_logarithmic():
    near = policies((0.2, 1.0), (0.3, 0.5), (1.0, 0.2))
    assert "logarithmic" not in figure.picture(near, "gain", "KL")  # 1.0 is less than 6 times the middle one
    far = policies((-0.01, 0.1), (12.0, 0.4))  # a KL by samples may be below 0
    drawn = figure.picture([*near, *far], "gain", "KL")
    assert "KL (logarithmic)<" in drawn
    columns = re.findall(r'<text x="([\d.]+)"[^>]*middle"[^>]*>([^<]+)<', drawn)
    assert [text for _, text in columns] == ["0", "0.2", "0.5", "1", "2", "5", "10"]
    places = [float(x) for x, _ in columns]
    # asinh(x / 0.2) of 0.2, 0.5 and 10: 0.8814, 1.6472, 4.6053
    shares = [(x - places[0]) / (places[6] - places[0]) for x in places[1:3]]
    assert shares == pytest.approx([0.8814 / 4.6053, 1.6472 / 4.6053], abs=0.002)


def test_35_policies_look_different():
    assert len({svg.mark(place, "", 0, 0) for place in range(35)}) == 35
