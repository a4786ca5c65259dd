"""Models side by side as a page: whole, self-contained, escaped, and true to the comparison."""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sdft_ray.analysis.compare import compare
from sdft_ray.report.comparison.examples import example_groups, shortened, shown
from sdft_ray.report.comparison.model import Comparison
from sdft_ray.report.comparison.page import changes_chart, render
from sdft_ray.report.comparison.words import mean_rows
from sdft_ray.report.toolbox.lanes import axis_around_zero
from sdft_ray.store.store import Store
from tests.unit.report.made_up_comparison import CHOSEN, GENERATED, make_store
from tests.unit.report.test_page import Reader

ALL_SECTIONS = ["changes", "scores", "flips", "answers", "examples"]
HOSTILE = (
    "<script>alert('x')</script>\"&",
    "W" * 5000,
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "",
    "!?" * 4000,
    "a\x00b\x1b[31m\r\n</details></section><b>",
    "</style><style>body{display:none}",
    "{{ 7 * 7 }}{% raw %}",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("comparison") / "store")


@pytest.fixture(scope="module")
def found(store: Store) -> Comparison:
    return compare(store, ["small/teacher", "small/pruned", "small/sdft"], num_examples=4)


@pytest.fixture(scope="module")
def page(found: Comparison) -> str:
    return render(found)


def plain(page: str) -> str:
    return re.sub(r"\s+", " ", Reader(page).text.replace("\u202f", " "))


def test_every_section_is_there_once(page: str) -> None:
    assert Reader(page).sections() == ALL_SECTIONS


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    reader = Reader(page)
    assert not {"script", "iframe", "object", "img", "base", "form"} & {tag for tag, _ in reader.tags}
    addresses = [value for _, attrs in reader.tags for name, value in attrs.items() if name in ("href", "src")]
    assert all(address.startswith("data:") for address in addresses)
    assert not re.findall(r"url\((?!#)", page)
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_it_can_be_read_aloud_and_used_with_keys(page: str) -> None:
    tags = Reader(page).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in attrs for tag, attrs in tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags)
    labels = [attrs.get("aria-label", "") for _, attrs in tags if attrs.get("role") == "img"]
    assert len(labels) == page.count('class="lane-row"') + page.count('class="lane-row strong"') > 7
    figure = r"[+−]?[\d.]+ \([+−]?[\d.]+ to [+−]?[\d.]+\) points"
    assert all(re.fullmatch(rf".+: pruned {figure}; sdft {figure}", label) for label in labels)
    scrolled = [attrs for tag, attrs in tags if tag == "div" and attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolled)
    identities = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(set(identities)) == len(identities)
    assert sum(tag == "details" for tag, _ in tags) == sum(tag == "summary" for tag, _ in tags) > 4


def test_figures_of_the_comparison_are_on_the_page(found: Comparison, page: str) -> None:
    text = plain(page)
    for task in found.tasks:
        scores = [f"{100 * (score.value or 0):.1f} ± {100 * (score.stderr or 0):.1f}" for score in task.scores]
        assert re.search(rf"{task.name} (\w+, )?{task.metric}, 40 items", text)
        assert all(score in text for score in scores)
        for change in task.changes:
            assert change.low is not None
            assert f"{100 * change.value:+.1f}".replace("-", "−").replace("+0.0", "0.0") in text
            flips = change.flips
            assert flips is not None
            counts = (flips.num_both, flips.num_only_baseline, flips.num_only_other, flips.num_neither)
            assert f"{task.name}{''.join(map(str, counts))}" in text
        if task.name in GENERATED:
            told = [a for a in task.answers if a is not None]
            rows = [f"{a.num_right}{a.num_wrong}{a.num_no_answer}{a.num_truncated}" for a in told]
            assert len(rows) == 3
            assert all(row in text for row in rows)


def test_examples_are_shown_with_marks_and_the_first_of_each_is_open(found: Comparison, page: str) -> None:
    groups = example_groups(found)
    assert [(group.model, group.won) for group in groups] == list(itertools.product(("pruned", "sdft"), (False, True)))
    opened = [attrs for tag, attrs in Reader(page).tags if tag == "details" and "open" in attrs]
    assert len(opened) == len(groups)
    text = plain(page)
    for group in groups:
        assert len(group.rows) == min(4, group.num)
        for row in group.rows:
            assert f"item {row.item}" in text
            assert "".join(piece.text for piece in row.sides[0].pieces) in text
    marks = {mark for group in groups for row in group.rows for side in row.sides for mark in side.marks}
    assert all(mark in text for mark in marks)
    assert "no answer found" in marks


def test_hostile_texts_are_escaped_and_keep_the_page_whole(found: Comparison) -> None:
    first = found.examples[0]
    examples = tuple(
        replace(
            first,
            item=text[:40],
            prompt=text,
            target=text,
            before=replace(first.before, text=text, filtered=text),
            after=replace(first.after, text=f"{text[::-1]}?!", filtered=text[::-1]),
        )
        for text in HOSTILE
    )
    began = time.monotonic()
    page = render(replace(found, examples=examples))
    assert time.monotonic() - began < 5
    reader = Reader(page)
    assert reader.sections() == ALL_SECTIONS
    assert "<script" not in page
    assert page.count("<style>") == 1
    assert "alert('x')" in reader.text
    assert "{{ 7 * 7 }}" in reader.text
    assert not {chr(code) for code in range(32)} - set("\n\t") & set(page)
    assert max(map(len, re.findall(r"W+", reader.text))) == 2000
    # An override of direction ends with the element that holds it.
    for text in re.findall(r"<(\w+)[^>]*>[^<>]*\u202e", page):
        assert text in {"p", "bdi", "del", "ins", "wbr", "span"}


def test_names_from_outside_are_escaped_everywhere(found: Comparison) -> None:
    evil = "<script>x</script>"
    models = tuple(replace(model, name=f"{evil}{i}", run=evil) for i, model in enumerate(found.models))
    tasks = tuple(replace(task, name=f"{task.name}{evil}", metric=evil) for task in found.tasks)
    examples = tuple(replace(e, other=f"{evil}{1 + (e.other == 'sdft')}", task=evil, item=evil) for e in found.examples)
    page = render(replace(found, models=models, tasks=tasks, examples=examples, harness=evil))
    assert "<script" not in page
    assert Reader(page).text.count(evil) > 40


def test_an_answer_of_nothing_says_so(found: Comparison) -> None:
    example = replace(found.examples[0], after=replace(found.examples[0].after, text="", filtered=""))
    text = plain(render(replace(found, examples=(example,))))
    assert "(empty)" in text
    assert "→ nothing" in text


def test_sections_without_figures_are_left_out(store: Store, found: Comparison) -> None:
    old = compare(store, ["small/teacher", "other/old"])
    page = render(old)
    assert Reader(page).sections() == ["changes", "scores", "flips", "answers", "examples"][:4]
    assert "other/old was evaluated before answers were kept" in plain(page)
    bare = tuple(
        replace(task, kind="other", answers=(None,) * 3, changes=tuple(replace(c, flips=None) for c in task.changes))
        for task in found.tasks
    )
    none = replace(found, tasks=bare, means=(), capabilities=(), overall=None, examples=())
    assert Reader(render(none)).sections() == ["scores"]


def test_places_of_the_chart_are_those_of_the_figures(found: Comparison) -> None:
    chart = changes_chart(found)
    assert chart is not None
    drawn = {row.name: row.lanes for _, rows in chart.groups for row in rows}
    assert list(drawn)[:7] == [*GENERATED, *CHOSEN]
    assert len(drawn) == 7 + len(mean_rows(found))
    left, right = chart.axis.ticks[0], chart.axis.ticks[-1]
    assert [float(label.replace("−", "-")) for label in chart.labels] == pytest.approx(
        [100 * tick for tick in chart.axis.ticks]
    )
    for task in found.tasks:
        for lane, change in zip(drawn[task.name], task.changes, strict=True):
            assert lane.value is not None
            assert lane.value == change.value
            assert chart.axis.place(lane.value) == pytest.approx(100 * (change.value - left) / (right - left))
            assert lane.low is not None
            assert lane.high is not None
            assert left <= lane.low <= lane.value + 1e-9
            assert lane.value - 1e-9 <= lane.high <= right


@pytest.mark.parametrize("values", [[0.0], [-0.67, 0.12], [0.003, 0.02], [-1.0, 1.0], [-0.004], [0.31]])
def test_axes_hold_their_values_and_zero_in_round_steps(values: list[float]) -> None:
    ticks = axis_around_zero(values).ticks
    assert 0.0 in ticks
    assert ticks[0] <= min(0.0, *values)
    assert ticks[-1] >= max(0.0, *values)
    assert 2 <= len(ticks) <= 8
    steps = {round(after - before, 9) for before, after in itertools.pairwise(ticks)}
    assert len(steps) == 1


def test_long_texts_keep_their_ends() -> None:
    text = "".join(f"{i:04d} " for i in range(1000))
    short = shortened(text)
    assert short.startswith("0000 0001")
    assert short.endswith("0999")
    assert f"{len(text.strip()) - 1700:,} more characters" in short
    assert shortened("short ") == "short"
    assert shown("a\x1b[0m\r\nb") == "a\u241b[0m\nb"


def test_the_wheel_has_the_templates() -> None:
    folder = Path(__file__).resolve().parents[3] / "sdft_ray" / "report" / "templates"
    included = re.findall(r'include "(compare/[^"]+)"', (folder / "compare.html.j2").read_text(encoding="utf-8"))
    assert {path.relative_to(folder).as_posix() for path in (folder / "compare").iterdir()} == set(included)
