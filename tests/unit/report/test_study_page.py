"""The page, the picture and the terminal view of a study, as a reader gets them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console

from sdft_ray.report.study.figures import levels, plot, row_axis, share_axis, study_figure, tick_sizes
from sdft_ray.report.study.gather import gather_study
from sdft_ray.report.study.model import ALL, OFF_DOMAIN, TUNED, StudyData
from sdft_ray.report.study.page import render_study
from sdft_ray.report.study.terminal import study_lines
from sdft_ray.report.study.words import verdict
from sdft_ray.report.toolbox.figures import ARM_COLORS, TONES
from sdft_ray.statistics.estimate import Estimate
from tests.unit.report import made_up_study as made_up
from tests.unit.report.test_page import Reader

pytestmark = pytest.mark.slow

SECTIONS = ["findings", "curves", "more", "scores", "shared", "study"]
WORDS = {
    "title": "Recovery over data-set sizes",
    "description": "Five nested sizes of a made-up set.",
    "created": "2026-01-02T03:04:05",
    "shared": ("120 students stand on 61 artifacts.", "Making them took 2 h 10 min."),
    "yaml": "name: made_up\nnum_rows: [125, 4000]\n",
}


@pytest.fixture(scope="module")
def study() -> StudyData:
    return gather_study(made_up.table(made_up.rows(num_seeds=3, num_items=60, blocks=(3,))), name="made_up", **WORDS)


@pytest.fixture(scope="module")
def page(study: StudyData) -> str:
    return render_study(study)


def flat_text(page: str) -> str:
    return re.sub(r"\s+", " ", Reader(page).text.replace("\u202f", " "))


def test_everything_is_on_the_page(study: StudyData, page: str) -> None:
    assert Reader(page).sections() == SECTIONS
    text = flat_text(page)
    for expected in (*WORDS["shared"], "num_rows: [125, 4000]", WORDS["title"], "2026-01-02 03:04 UTC", *made_up.TASKS):
        assert expected in text, expected
    for panel in study.panels:
        assert panel.name in text
        assert made_up.plain_text(verdict(panel)).replace("\u202f", " ") in text
        for cell in panel.cells:
            assert f"{100 * cell.recovery[ALL].known:.1f}" in text
            for task, margin in cell.margins.items():
                assert f"{100 * cell.scores[task]:.1f} ± {100 * margin:.1f}" in text
    assert "falling: more data lowers the score here" in text
    assert "of sft, sdft, sdft_kd" in text


def test_no_figure_is_missing_in_print(page: str) -> None:
    assert not re.search(r"\b(nan|inf|None|True|False)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.S))


def test_parts_without_data_are_left_out(study: StudyData) -> None:
    bare = dataclasses.replace(study, title="", description="", created="", shared=(), yaml="")
    assert Reader(render_study(bare)).sections() == SECTIONS[:4]
    assert "<h1>made_up</h1>" in render_study(bare)
    assert Reader(render_study(StudyData("empty", ()))).sections() == []


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    reader = Reader(page)
    assert not {"script", "iframe", "object", "img", "base", "form"} & {tag for tag, _ in reader.tags}
    addresses = [value for _, attrs in reader.tags for name, value in attrs.items() if name in ("href", "src")]
    assert all(address.startswith("data:") for address in addresses)
    assert set(re.findall(r"https?://[^'\" ]+", page)) == {"http://www.w3.org/2000/svg"}
    identities = {attrs["id"] for _, attrs in reader.tags if "id" in attrs}
    links = [value for _, attrs in reader.tags for name, value in attrs.items() if name == "xlink:href"]
    references = [*links, *re.findall(r"url\(([^)]*)\)", page)]
    assert references
    assert {reference.removeprefix("#") for reference in references} <= identities
    assert "default-src 'none'" in page


def test_hostile_names_are_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    rows = made_up.rows(sizes=(125, 300), blocks=(3,), num_seeds=2, num_items=12, variants=("",))
    rows = [
        {
            **row,
            "variant": evil,
            "arm": evil if row["arm"] == "sdft" else row["arm"],
            "task": evil if row["task"] == "myths" else row["task"],
        }
        for row in rows
    ]
    page = render_study(
        gather_study(made_up.table(rows), name=evil, title=evil, description=evil, shared=(evil,), yaml=evil)
    )
    assert "<script" not in page
    assert Reader(page).text.count("alert('x')") > 20


def test_it_can_be_read_aloud(page: str) -> None:
    tags = Reader(page).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags) > 6
    labels = [attrs["aria-label"] for _, attrs in tags if attrs.get("role") == "img"]
    assert len(labels) == 2 * 3
    assert all(re.search(r"sdft \d+\.\d\u202f% at 125 to \d+\.\d\u202f% at 4,000", label) for label in labels)
    identities = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(set(identities)) == len(identities)


def places(line: Line2D) -> np.ndarray:
    """(N, 2)"""
    return np.asarray(line.get_xydata(), dtype=float)


def test_marks_stand_where_their_figures_are(study: StudyData) -> None:
    panel = study.panels[0]
    for group in panel.groups:
        axes = Figure().add_subplot()
        plot(axes, study, panel, group)
        share, ticks = share_axis(panel, group)
        assert [float(label.get_text()) for label in axes.get_yticklabels()] == pytest.approx(
            [100 * tick for tick in ticks]
        )
        assert axes.get_ylim() == pytest.approx((100 * share.low, 100 * share.high))
        for arm, color in zip(panel.arms, ARM_COLORS, strict=False):
            own = [line for line in axes.lines if line.get_color() == color and line.get_linestyle() == "-"]
            marks = [line for line in axes.lines if line.get_color() == color and line.get_marker() == "o"]
            bars = [line for line in own if line.get_marker() == "None" and len(places(line)) == 2]
            cells = [cell for cell in panel.cells if cell.arm == arm]
            for cell, mark, bar in zip(cells, marks, bars, strict=True):
                found = cell.recovery[group]
                assert found.low is not None
                assert found.high is not None
                ((x, y),) = places(mark)
                assert y == pytest.approx(100 * found.known)
                assert places(bar)[:, 1].tolist() == pytest.approx([100 * found.low, 100 * found.high])
                assert 0.85 < x / cell.num_rows < 1.18
                assert str(mark.get_gid()).startswith(f"title:{arm}, {cell.num_rows:,} rows: {y:.1f}")
            fit = panel.fits[arm, group]
            curves = [line for line in own if len(places(line)) > 2]
            assert bool(curves) == bool(fit.line)
            if fit.line:
                assert places(curves[0])[-1].tolist() == pytest.approx([4000, 100 * fit.line[32].value])


@pytest.mark.parametrize(("high", "last", "top"), [(1.02, 1.0, 1.02), (1.08, 1.2, 1.2), (0.93, 1.0, 1.0)])
def test_an_interval_a_little_above_a_tick_asks_for_no_other(
    study: StudyData, high: float, last: float, top: float
) -> None:
    panel = study.panels[0]
    ends = [Estimate(0.5, low=0.25, high=0.6), Estimate(0.9, low=0.8, high=high)]
    cells = [dataclasses.replace(cell, recovery={ALL: end}) for cell, end in zip(panel.cells, ends, strict=False)]
    share, ticks = share_axis(dataclasses.replace(panel, cells=tuple(cells), fits={}, pruned=()), ALL)
    assert (share.low, share.high) == pytest.approx((ticks[0], top))
    assert ticks[-1] == pytest.approx(last)


def test_the_row_axis_is_logarithmic_and_holds_twice_the_largest_size(study: StudyData) -> None:
    axes = Figure().add_subplot()
    plot(axes, study, study.panels[0], ALL)
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert (low, high) == pytest.approx(row_axis(study))
    assert low < 125
    assert high > 2 * 4000


def test_levels_far_off_are_told_instead_of_drawn(study: StudyData) -> None:
    panel = study.panels[0]
    far = dataclasses.replace(panel.pruned[0], recovery=dict.fromkeys((ALL, TUNED, OFF_DOMAIN), -9.0))
    panel = dataclasses.replace(panel, pruned=(far, panel.pruned[1]))
    found = levels(panel, ALL)
    assert [outside for *_, outside in found if outside] == ["pruned alone (sft, sdft, sdft_kd): −900.0\u202f%, below"]
    assert [arms for _, arms, outside in found if not outside] == [(), ("tail",)]
    assert "−900.0 %, below" in flat_text(render_study(dataclasses.replace(study, panels=(panel,))))


def test_labels_of_sizes_keep_apart(study: StudyData) -> None:
    panel = study.panels[0]
    crowded = dataclasses.replace(panel.cells[0], num_rows=3900)
    panel = dataclasses.replace(panel, cells=(*panel.cells, crowded))
    assert tick_sizes(panel, row_axis(study)) == [125, 300, 700, 1700, 4000]


@pytest.mark.parametrize(("sizes", "num_seeds"), [((500,), 1), ((0, 250), 2), ((125, 250, 500), 1)])
def test_small_studies_have_a_page_a_picture_and_lines(sizes: tuple[int, ...], num_seeds: int, tmp_path: Path) -> None:
    rows = made_up.rows(
        sizes=[size or 125 for size in sizes], num_seeds=num_seeds, num_items=12, arms=("sft",), blocks=(3,)
    )
    rows = [{**row, "num_rows": 0 if 0 in sizes and row["num_rows"] == 125 else row["num_rows"]} for row in rows]
    found = gather_study(made_up.table(rows), name="small")
    text = flat_text(render_study(found))
    assert "a curve needs 4 sizes" in text
    assert ("over test items alone" in text) == (num_seeds == 1)
    study_figure(found, tmp_path / "small.png")
    assert "a curve needs 4 sizes" in re.sub(r"\s+", " ", shown(found, 80))


def test_the_picture_is_as_wide_as_a_page_and_white(study: StudyData, tmp_path: Path) -> None:
    from matplotlib.image import imread

    study_figure(study, tmp_path / "study.png")
    pixels = imread(tmp_path / "study.png")
    assert pixels.shape[1] == 1000
    assert np.all(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1)
    one = dataclasses.replace(study, panels=study.panels[:1])
    study_figure(one, tmp_path / "study.svg")
    svg = (tmp_path / "study.svg").read_text(encoding="utf-8")
    assert all(color in svg for color in ARM_COLORS[:4])
    assert 'href="http' not in svg
    study_figure(one, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text(encoding="utf-8") == svg
    with pytest.raises(ValueError, match="nothing to draw"):
        study_figure(StudyData("empty", ()), tmp_path / "none.png")


def test_panels_stand_side_by_side_where_they_fit(study: StudyData, tmp_path: Path) -> None:
    from matplotlib.image import imread

    wide = study.panels[0]
    narrow = dataclasses.replace(wide, tuned=())
    assert (len(wide.groups), len(narrow.groups)) == (3, 1)
    heights = []
    for number, panels in enumerate([(wide,), (narrow, narrow, narrow, wide), (narrow, wide, narrow)]):
        study_figure(dataclasses.replace(study, panels=panels), tmp_path / f"{number}.png")
        heights.append(imread(tmp_path / f"{number}.png").shape[0])
    assert heights == [335, 595, 855]


def test_colours_are_those_of_the_page() -> None:
    from sdft_ray import report

    css = (Path(report.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(arm\d): (#[0-9a-f]{6})", css.split("@media")[0]))
    assert tuple(light.values()) == ARM_COLORS
    everything = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css.split("@media")[0]))
    assert {name: everything[name] for name in TONES} == TONES


def shown(study: StudyData, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(study_lines(study))
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_terminal_view_fits(study: StudyData, width: int) -> None:
    text = shown(study, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    cell = study.panels[0].cell("sdft", 4000)
    assert cell is not None
    assert f"{100 * cell.recovery[ALL].known:.1f}" in text
    joined = re.sub(r"\s+", " ", text)
    assert "8,000 rows would add" in joined
    assert "Off-domain sft is worse than no training" in joined
    assert ("1,700" in text) == (width > 40)


def test_the_terminal_view_loads_nothing_heavy() -> None:
    heavy = ["torch", "ray", "jinja2", "matplotlib", "numpy", "pyarrow"]
    code = f"import sys, sdft_ray.report.study.terminal; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
