"""The page as a browser gets it: whole, self-contained, escaped, and readable without seeing it."""

from __future__ import annotations

import itertools
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest

from sdft_ray import report
from sdft_ray.generation.selection import MEANINGS, Reason
from sdft_ray.report.run.model import Gap, Plan, ReportData, Retention, Sample
from sdft_ray.report.run.page import render
from sdft_ray.report.run.words import removed_words
from tests.unit.report.made_up import FAMILIES, distances, report_data
from tests.unit.report.test_figures import contrast

VOID = {"meta", "link", "wbr"}
ALL_SECTIONS = [
    "recovery", "kept", "scores", "blocks", "size", "training", "grids", "selection", "gap", "correction",
    "forgetting", "gates", "stages", "recipe",
]  # fmt: skip
OPTIONAL = {
    "recovery": {"recovery": {}},
    "kept": {"retention": Retention()},
    "scores": {"scores": {}},
    "blocks": {"distances": None, "plan": None},
    "size": {"sizes": None, "speed": None},
    "training": {"loss_curves": {}},
    "grids": {"grids": {}},
    "correction": {"correction": None},
    "forgetting": {"forgetting": None},
    "selection": {"selection": {}, "samples": ()},
    "gap": {"gap": None},
    "gates": {"gates": (), "notes": ()},
    "stages": {"stages": ()},
    "recipe": {"recipe_yaml": "", "versions": {}},
}


class Reader(HTMLParser):
    """Checks that tags close in order, and notes what is there."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def page() -> str:
    return render(report_data())


@pytest.mark.slow
def test_how_rows_were_read_is_on_the_page() -> None:
    told = ("7 rows read: `question` asks, `answer` answers (7 rows).", "Left out: 1 because the answer is empty.")
    text = Reader(render(ReportData(name="x", selection={"kept": 6}, rows_read={"seed set": told}))).text
    assert f"Seed set: {' '.join(told)}" in text


def test_every_section_is_there(page: str) -> None:
    assert Reader(page).sections() == ALL_SECTIONS


@pytest.mark.slow  # draws every figure of a page anew, twenty times
@pytest.mark.parametrize("section", ALL_SECTIONS)
def test_a_section_without_data_is_left_out(section: str) -> None:
    found = Reader(render(report_data().model_copy(update=OPTIONAL[section]))).sections()
    assert found == [name for name in ALL_SECTIONS if name != section]


def test_a_teacher_in_a_directory_goes_by_its_last_names() -> None:
    page = render(ReportData(name="x", teacher_model="/home/somebody/models/lab/teacher/"))
    assert "<span>lab/teacher</span>" in page
    assert "somebody" not in page


def test_the_least_is_a_page() -> None:
    reader = Reader(render(ReportData(name="least")))
    assert reader.sections() == []
    assert "least" in reader.text


@pytest.mark.slow
def test_each_part_can_stand_alone() -> None:
    full = report_data()
    for field in ReportData.model_fields:
        if field != "name":
            Reader(render(ReportData(name="alone").model_copy(update={field: getattr(full, field)})))


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    reader = Reader(page)
    assert not {"script", "iframe", "object", "img", "base", "form"} & {tag for tag, _ in reader.tags}
    addresses = [value for _, attrs in reader.tags for name, value in attrs.items() if name in ("href", "src")]
    assert all(address.startswith("data:") for address in addresses)
    identities = {attrs["id"] for _, attrs in reader.tags if "id" in attrs}
    links = [value for _, attrs in reader.tags for name, value in attrs.items() if name == "xlink:href"]
    assert {link[1:] for link in links if link.startswith("#")} <= identities
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    references = re.findall(r"url\(([^)]*)\)", page)
    assert references
    assert {reference.removeprefix("#") for reference in references} <= identities
    assert "@import" not in page
    assert "default-src 'none'" in page


@pytest.mark.slow
def test_text_from_outside_is_escaped() -> None:
    evil = "<script>alert('x')</script>\"&"
    text = report_data().to_json()
    for word in ("made_up", "sdft", "word_problems", "mismatch", "lab/teacher", "annotators", "0b7e4410c2d98a6f"):
        text = text.replace(f'"{word}"', '"' + evil.replace('"', '\\"') + '"')
    data = ReportData.from_json(text)
    assert data.name == evil
    samples = tuple(sample.model_copy(update={"reference": evil, "distilled": evil}) for sample in data.samples)
    data = data.model_copy(update={"samples": samples, "recipe_yaml": evil, "notes": (evil,), "machine": evil})
    page = render(data)
    assert "<script" not in page
    reader = Reader(page)
    assert reader.text.count("alert('x')") > 20


def test_a_rewrite_that_loops_is_shown_within_seconds() -> None:
    looping = Sample(example_id="1", instruction="2", reference="?! " * 1000, distilled="!?" * 5000, reason="truncated")
    began = time.process_time()
    page = render(ReportData(name="x", samples=(looping,)))
    assert time.process_time() - began < 3
    assert "(7,000 more characters)" in page


def test_headings_go_down_one_level_at_a_time(page: str) -> None:
    levels = [int(tag[1]) for tag, _ in Reader(page).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_tables_and_figures_can_be_read_aloud(page: str) -> None:
    tags = Reader(page).tags
    assert all("scope" in attrs for tag, attrs in tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags) == 14
    labels = [attrs.get("aria-label", "") for _, attrs in tags if attrs.get("role") == "img"]
    assert len(labels) > 10
    assert any("sft ends at 0.63, sdft ends at 0.09; learning rate, largest 9.9e−4" in label for label in labels)
    assert any("block 4 .02 (removed)" in label for label in labels)
    assert all(len(label) > 10 for label in labels)
    identities = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(set(identities)) == len(identities)
    pointed = [attrs["aria-labelledby"] for _, attrs in tags if "aria-labelledby" in attrs]
    assert set(pointed) <= set(identities)


def test_figures_of_the_run_are_on_the_page(page: str) -> None:
    text = re.sub(r"\s+", " ", Reader(page).text.replace("\u202f", " "))
    for expected in (
        "31.1 % fewer parameters",
        "92.3 ± 0.9 %",
        "Releasable: sdft. Not releasable: sft. sdft is ahead of sft by 17.0 points (+14.7 to +19.4) of the mean score",
        "Mean recovery92.3 % 90.4 to 94.1 Worst task88.1 % lists",
        "Worse than after pruning alone, but within chance: facts: −3.5 points (−9.2 to +2.2); myths",
        "mean recovery at least 85 %; recovery on every task at least 80 %",
        "2.42 M → 1.67 M",
        "12 of 1,012 seed rows share 13 words in a row",
        "77aa02b1c3d4e5f6",
        "6.00 KiB",
        "Decoding, batch of 16+44.0 %1,210 → 1,742 tokens/s",
        "prompts of 64 tokens and 64 new ones",
        "9,480 → 13,650 1.44 × (1.43 to 1.45)121 → 167 1.38 × (1.37 to 1.39)6.75 ms → 4.69 ms",
        "computed1.45 × matmul FLOPs1.45 × weight bytes1.45 × matmul FLOPs",
        "11.9 MiB → 7.94 MiB",
        "Blocks 3 to 6 of 12 were removed",
        "82.4 %",
        "trained on self-distilled responses, learning rate 1e−3, the best of 6 trials",
        "5e−40.2310.2390.235",
        "1e−30.2170.213 chosen0.215",
        "0.1diverged9.876–",
        "compared on 103 held-out rows with 5,121 response tokens",
        "0.1, seed 0: training diverged at step 7",
        "60 steps on the references, learning rate 2e−5",
        "96 rows that it was not tuned on",
        "references0.413 ± 0.0110.288 ± 0.009−0.125 ± 0.004",
        "held-out text 256 rowsperplexity × the teacher’sreferences 88 rowsrewrites 88 rowsanswers similarity",
        "teacher2.104 ± 0.041–0.413 ± 0.0410.013 ± 0.041–",
        "pruned3.318 ± 0.052 +1.214 ± 0.0193.37 ± 0.063.271 ± 0.052 +2.858 ± 0.019",
        "sft2.871 ± 0.047 +0.767 ± 0.0152.15 ± 0.030.302 ± 0.047 −0.111 ± 0.015",
        "0.931 ± 0.003 5 % below 0.702",
        "in rows that no model was tuned on",
        "over 1,400 items; for at most 12 an answer is empty; for at most 2 one is longer than the embedding model",
        "Pruning made held-out text 1.214 ± 0.019 nats per token more surprising, and so on.",
        "sft 5,120 tokens/s, 31.2 % of the devices’ peak (MFU), at most 1.20 GiB per process",
        "sdft 4,987 tokens/s; 3 prompts were cut at their beginning to fit train.max_seq_len",
        "Worst family: sft 48.1 % (lists), sdft 88.1 % (lists).",
        "further from the teacher than its own rewrites",
        "0.413 ± 0.011",
        "512 of the 824 rows",
        "4 of 4 hold",
        "1 min 37 s",
        "2.60.0",
        "metric: angular_distance",
        *FAMILIES,
    ):
        assert expected in text, expected


def test_every_reason_is_shown_with_its_meaning() -> None:
    reasons: tuple[Reason, ...] = get_args(Reason)
    assert set(MEANINGS) == set(reasons)
    text = Reader(render(ReportData(name="x", selection=dict.fromkeys(map(str, reasons), 1)))).text
    for reason, meaning in MEANINGS.items():
        assert re.search(rf"{reason}\s+{re.escape(meaning)}", text), reason


@pytest.mark.slow
def test_the_whole_of_a_large_model_stays_small() -> None:
    adjacent = (0.45, *[0.01 + 0.0001 * i for i in range(124)], 0.15)
    plan = Plan(num_blocks=126, keep_blocks=tuple(range(100)), metric="angular_distance", position="last")
    page = render(report_data().model_copy(update={"distances": distances(adjacent), "plan": plan}))
    assert len(page.encode()) < 2_000_000


def test_a_set_without_rewrites_says_so() -> None:
    page = render(ReportData(name="x", gap=Gap(num_rows=0, nll={}, gaps={}, verdict="No rewrite was kept.")))
    assert Reader(page).sections() == ["gap"]
    assert "No rewrite was kept." in page
    assert "<table" not in page


def test_blocks_without_measurements_are_listed() -> None:
    plan = Plan(num_blocks=8, keep_blocks=(0, 2, 3, 7), metric="random")
    page = render(ReportData(name="x", plan=plan))
    assert "Blocks 1 and 4 to 6 of 8 were removed: drawn at random." in page
    assert "The most active stayed" not in page
    assert page.count('class="gone"') == 4


def test_colours_of_text_have_enough_contrast_in_both_themes() -> None:
    css = (Path(report.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(themes) == 3
    for theme in themes:
        for text in ("ink", "soft", "accent", "bad"):
            assert contrast(theme[text], theme["paper"]) >= 4.5, (text, theme["paper"])
        for ground in ("ins", "del", "warn", "panel"):
            assert contrast(theme["ink"], theme[ground]) >= 4.5, ground
        for mark in ("teacher", "pruned", "neutral", "good", *(f"arm{i}" for i in range(6))):
            assert contrast(theme[mark], theme["paper"]) >= 2.9, mark


def _compared() -> Plan:
    candidates = [
        {"blocks": (3, 4, 5), "metrics": ("block influence",), "loss": 3.4, "beyond": 0.9, "stderr": 0.2},
        {"blocks": (2, 5, 6), "metrics": ("perplexity of single blocks",), "loss": 2.5, "beyond": 0.0, "stderr": 0.0},
        {"blocks": (1, 2, 3), "metrics": (), "loss": 2.6, "beyond": 0.1, "stderr": 0.08},
    ]
    sure = {"share": 0.82, "runner_up": (1, 2, 3), "difference": 0.1, "stderr": 0.08, "num_parts": 64}
    return Plan.model_validate(
        {
            "num_blocks": 8, "keep_blocks": (0, 1, 3, 4, 7), "metric": "best", "candidates": candidates,
            "compared": {"whole_loss": 1.25, "num_rows": 64}, "stability": sure,
        }
    )  # fmt: skip


def test_what_was_compared_is_in_a_table_and_how_sure_the_choice_is_in_words() -> None:
    page = render(ReportData(name="x", plan=_compared()))
    words = removed_words(_compared())
    assert "of what all metrics would remove" in words
    assert "82" in words
    assert "1, 2 and 3, 0.1 ± 0.08 behind (nats per token), so the two cannot be told apart" in words.replace(
        "1 to 3", "1, 2 and 3"
    )
    assert page.index("2.500") < page.index("2.600") < page.index("3.400") < page.index("1.250")
    for text in ("perplexity of single blocks", "64 calibration rows", "0.900"):
        assert text in page


def test_a_measured_choice_says_how_sure_it_is() -> None:
    sure = {"share": 1.0, "runner_up": (1, 2), "difference": 0.01, "stderr": 0.001, "num_parts": 16}
    plan = Plan.model_validate(
        {
            "num_blocks": 6,
            "keep_blocks": (0, 1, 2, 5),
            "metric": "angular_distance",
            "position": "last",
            "stability": sure,
        }
    )
    assert "0.01 ± 0.001 behind (angular distance)." in removed_words(plan)
