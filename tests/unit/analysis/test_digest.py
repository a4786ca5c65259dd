"""A digest: what goes in comes out, nothing is there twice, and the page shows the study's own figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdft_ray.analysis.digest import Digest, empty, merged, packed, read_digest, unpacked, write_digest
from sdft_ray.analysis.digest_page import digest_page
from sdft_ray.errors import StoreError
from sdft_ray.report.study.gather import gather_study
from sdft_ray.report.study.tables import study_markdown
from sdft_ray.report.toolbox.numbers import seconds
from tests.unit.report import made_up_study as made_up
from tests.unit.report.test_numbers import spaced

MADE = {"made": "2026-11-29T08:00", "seconds": 60.0, "versions": {"torch": "2"}}
KL = {"mean": {"value": 0.25, "stderr": 0.01}, "p99": {"value": 3.5, "low": 3.0, "high": 4.0, "level": 0.95}}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Two arms at two sizes, two seeds."""
    return made_up.rows(
        num_seeds=2, num_items=41, blocks=(3,), arms=("sft", "sdft"), sizes=(300, 700), variants=("mixed",)
    )


@pytest.fixture
def digest(rows: list[dict[str, Any]]) -> Digest:
    found = empty()
    found["studies"]["made_up"] = {"description": "Made up", "arms": ["sft", "sdft"]}

    def evaluation(own: list[dict[str, Any]], score: str, items: str | None) -> dict[str, Any]:
        tasks = {
            row["task"]: {
                "metric": "acc", "score": row[score], "n": row["n"], "chance": row["chance"],
                "items": packed([float(v) for v in row[items]] if items else [0.0] * row["n"]),
            }
            for row in own
        }  # fmt: skip
        return {"tasks": tasks, "texts": {"kl": KL}, **MADE}

    for row in rows:
        key = f"{row['arm']}{row['num_rows']}{row['seed']}"
        own = [other for other in rows if all(other[n] == row[n] for n in ("arm", "num_rows", "seed"))]
        found["evaluations"][key] = evaluation(own, "score", "items")
        found["evaluations"]["t"] = evaluation(own, "teacher_score", "teacher_items")
        found["evaluations"]["p"] = evaluation(own, "pruned_score", None)
        names = ("variant", "metric", "remove_blocks", "num_blocks", "arm", "num_rows", "seed", "learning_rate")
        found["students"][key] = {
            "study": "made_up", "training": key, "teacher": "t", "pruned": "p", "held_out_loss": row["held_out_loss"],
            "tuned": list(made_up.TUNED), **{name: row[name] for name in names},
        }  # fmt: skip
        found["trainings"][key] = {"study": "made_up", **MADE}
    return found


@pytest.mark.parametrize("values", [[1.0], [0.0, 1.0, 1.0], [1.0] * 4, [0.0] * 5 + [1.0], [0.25, 1.0, 0.12341]])
def test_values_come_back(values: list[float]) -> None:
    assert unpacked(packed(values)) == pytest.approx(values, abs=1e-4)


def test_a_file_holds_what_was_written_and_is_added_to(digest: Digest, tmp_path: Path) -> None:
    path = tmp_path / "results" / "digest.json"
    assert read_digest(path) == empty()
    write_digest(digest, path)
    assert read_digest(path) == digest
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60  # one entry a line
    whole, num_new = merged(read_digest(path), digest)
    assert (whole, num_new) == (digest, 0)
    assert merged(empty(), digest)[1] == sum(len(part) for name, part in digest.items() if name != "format")


def test_what_is_known_stays_and_what_it_lacks_is_added(digest: Digest) -> None:
    known, found = empty(), empty()
    known["evaluations"]["t"] = {"tasks": {"a": 1}, "seconds": 1.0}
    found["evaluations"]["t"] = {"tasks": {"a": 2}, "seconds": 2.0, "texts": {"kl": KL}}
    whole, num_new = merged(known, found)
    assert num_new == 0
    assert whole["evaluations"]["t"] == {"tasks": {"a": 1}, "seconds": 1.0, "texts": {"kl": KL}}


def test_the_page_has_the_tables_of_the_study(digest: Digest, rows: list[dict[str, Any]]) -> None:
    page = digest_page(digest, "Results")
    assert study_markdown(gather_study(made_up.table(rows), name="made_up")).rstrip() in page
    assert f"8 trainings finished ({spaced(seconds(480))}), 8 students evaluated" in page
    assert "8 students that can be compared, 2 seeds each" in page
    line = next(line for line in page.splitlines() if line.startswith("| sdft, 700 rows |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    lost = []
    for task in made_up.TASKS:
        own = [row for row in rows if (row["arm"], row["num_rows"], row["task"]) == ("sdft", 700, task)]
        lost.append(np.mean([np.array(row["teacher_items"]) > np.array(row["items"]) for row in own]))
    assert cells[1].startswith(f"{100 * np.mean(lost):.1f} (")
    assert cells[3] == "0.250"
    assert cells[5] == f"{0.2 + 1 / 700:.3f}"


def test_students_without_a_counterpart_wait(digest: Digest) -> None:
    del digest["students"]["sdft7001"]  # its other seed remains
    page = digest_page(digest, "Results")
    assert "7 students evaluated. The tables have the 4 students that can be compared, 1 seed each" in page
    assert "what another seed would change is in no interval" in page
    line = next(line for line in page.splitlines() if line.startswith("| sdft, 300 rows |"))
    assert "| 0.250 ± 0.010 | 3.500 (3.000 to 4.000) |" in line
    digest["students"].clear()
    assert "No group of students can be compared yet" in digest_page(digest, "Results")


def test_a_file_that_is_no_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    for text in ("{", "[]", '{"format": 0}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match="is no digest of studies"):
            read_digest(path)
