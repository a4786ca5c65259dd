"""The card of a student: valid for the hub, right in its figures, silent about machines, deaf to what names say."""

from __future__ import annotations

import re
import textwrap
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt

from sdft_ray.models.licence import Licence
from sdft_ray.pipeline.run import Run
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.yaml_model import parse_yaml
from sdft_ray.release.card_facts import card_facts, portable
from sdft_ray.release.model_card import _speedup, model_card
from sdft_ray.report.run.trainings import student_manifest
from tests.support.finished_run import CORRECT, REASONS, finished_run
from tests.support.recipes import make_recipe
from tests.unit.report.made_up import report_data

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ON_HUB = {
    "teacher": {"hub": "org/Big-Model", "commit": COMMIT},
    "seed_set": {"name": "gsm8k", "commit": "fedcba" + COMMIT[6:]},
}


def card_of(run: Run, student: str = "sdft", licence: Licence | None = None, **options: Any) -> str:
    made = student_manifest(run.manifests, student)
    assert made is not None
    names = [name for name in made.files if not name.endswith(".jsonl")]
    facts = card_facts(run.recipe, run.store, run.manifests, student, files=names, licence=licence)
    return model_card(run.report_data(), student, facts, **options)


def front_matter(card: str) -> dict[str, Any]:
    """By a YAML reader of its own, beside huggingface_hub's."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


def html_of(card: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("\n---\n", 1)[1])


def shown(card: str) -> str:
    """What a reader sees, tags taken away."""
    return re.sub(r"<[^>]*>", "", html_of(card))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def hub_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Teacher and seed set come from the hub."""
    folder = tmp_path_factory.mktemp("hub_run")
    return finished_run(
        folder, sources=ON_HUB, teacher={"model": "org/Big-Model", "revision": COMMIT}, seed_set={"source": "gsm8k"}
    )


def test_the_front_matter_is_what_the_hub_wants(hub_run: Run) -> None:
    card = card_of(hub_run, licence=Licence("apache-2.0", origin="its card"), repository="alice/small")
    found = front_matter(card)
    assert found["base_model"] == "org/Big-Model"
    assert found["base_model_relation"] == "finetune"
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    assert found["license"] == "apache-2.0"
    assert "license_name" not in found
    assert found["datasets"] == ["openai/gsm8k"]
    assert {"pruned", "depth-pruning", "self-data-distillation"} <= set(found["tags"])
    read = ModelCard(card)
    assert isinstance(read.data, ModelCardData)
    assert read.data.model_name == "alice/small"
    told = {result.dataset_name: result.metric_value for result in read.data.eval_results or ()}
    assert told == {task: marks.count("1") / 10 for task, marks in CORRECT["sdft"].items()}
    assert ModelCard(str(read)).data.to_dict() == read.data.to_dict()


def test_a_teacher_that_is_not_on_the_hub_is_no_base_model(run: Run) -> None:
    card = card_of(run)
    found = front_matter(card)
    assert not {"base_model", "base_model_relation", "datasets"} & set(found)
    assert (found["license"], found["license_name"]) == ("other", "same-as-the-teacher")
    assert "look it up" in shown(card)
    assert "a1a1a1a1a1a1a1a1…" in card
    assert "b2b2b2b2b2b2b2b2…" in card


def test_a_snapshot_in_the_cache_of_the_hub_is_known_by_its_repository(tmp_path: Path) -> None:
    cached = tmp_path / f"models--org--Big-Model/snapshots/{COMMIT}"
    run = finished_run(tmp_path, teacher={"model": str(cached)})
    card = card_of(run)
    assert front_matter(card)["base_model"] == "org/Big-Model"
    assert f"at commit `{COMMIT[:12]}`" in card


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (Licence("llama3.1", origin="the file LICENSE"), {"license": "llama3.1"}),
        (
            Licence("other", "the-terms", "https://x.org/terms", "its card"),
            {"license": "other", "license_name": "the-terms", "license_link": "https://x.org/terms"},
        ),
        (
            Licence("other", "the-terms", "LICENSE.md", "its card"),
            {"license": "other", "license_name": "the-terms"},
        ),
    ],
)
def test_the_teachers_licence_is_inherited(run: Run, licence: Licence, expected: dict[str, str]) -> None:
    card = card_of(run, licence=licence)
    assert {name: value for name, value in front_matter(card).items() if name.startswith("license")} == expected
    assert f"according to {licence.origin}" in card


def test_an_unknown_licence_links_to_the_teacher(hub_run: Run) -> None:
    assert front_matter(card_of(hub_run))["license_link"] == "https://huggingface.co/org/Big-Model"


def naive(model: str, task: str) -> float:
    return CORRECT[model][task].count("1") / 10


def test_the_table_has_scores_and_recovery(run: Run) -> None:
    card = card_of(run)
    for task in CORRECT["sdft"]:
        row = next(line for line in card.splitlines() if line.startswith(f"| `{task}` | "))
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        figures = [float(cell.split(" ± ")[0]) for cell in cells[2:]]
        scores = [naive(model, task) for model in ("teacher", "pruned", "sdft")]
        assert figures == pytest.approx([100 * value for value in (*scores, scores[2] / scores[0])], abs=0.051)
        assert all(" ± " in cell for cell in cells[2:])
        assert "5-shot, 10 items" in cells[1]
    teacher, student = (sum(naive(model, task) for task in CORRECT[model]) / 2 for model in ("teacher", "sdft"))
    mean = next(line for line in card.splitlines() if line.startswith("| mean |"))
    assert f"{100 * student:.1f} ± " in mean
    assert f"keeps **{100 * student / teacher:.1f} ± " in card
    worst = min(CORRECT["sdft"], key=lambda task: naive("sdft", task) / naive("teacher", task))
    assert f"{100 * naive('sdft', worst) / naive('teacher', worst):.1f} % on the worst of them (`{worst}`)" in card


def test_recovery_without_what_guessing_scores(run: Run) -> None:
    taken = {"tiny_task": 0.25, "tiny_words": 0.0}
    teacher, student = (sum(naive(model, task) - c for task, c in taken.items()) for model in ("teacher", "sdft"))
    assert f"mean recovery is {100 * student / teacher:.1f} ± " in shown(card_of(run))


def test_it_says_what_was_pruned_and_from_what_it_learnt(run: Run) -> None:
    card, text = card_of(run), shown(card_of(run))
    assert "Block 2 of 4 was removed" in text
    assert "Kept blocks, counted from 0 in the teacher: 0, 1, 3." in text
    assert "25.0 % fewer parameters" in text
    for before, after in (("4,000", "3,000"), ("8,000", "6,100"), ("512 B", "384 B")):
        assert f"| {before} | {after} | " in card
    assert f"| `kept` | {REASONS['kept']} | 83.3 % |" in card
    assert f"| `mismatch` | {REASONS['mismatch']} | 16.7 % | the answers differ |" in card
    assert "6 rows of a data set that was not published" in text
    assert "2 steps of 2 packed rows of 128 tokens" in text


def test_how_answers_look_stands_beside_the_teachers(run: Run) -> None:
    rows = [line for line in card_of(run).splitlines() if line.startswith("| `tiny_words` |") and "12.5" in line]
    assert [row.split(" | ")[1] for row in rows] == ["teacher", "sdft"]
    assert all("| 12.5 | 10.0 % | 20.0 % | 30.0 % |" in row for row in rows)


def test_digests_of_all_files_are_the_manifests(run: Run) -> None:
    made = student_manifest(run.manifests, "sdft")
    assert made is not None
    lines = card_of(run).splitlines()
    for name, entry in made.files.items():
        if name != "history.jsonl":
            assert f"| `{name}` | {entry.num_bytes:,} | `{entry.sha256}` |" in lines
    assert sum(name.endswith(".safetensors") for name in made.files) > 1


def test_a_student_of_references_is_not_called_self_distilled(run: Run) -> None:
    card = card_of(run, "sft")
    assert "self-data-distillation" not in front_matter(card)["tags"]
    assert "in its own words" not in card
    assert "2410.09982" not in card
    assert "Trained on the references" in card


def test_a_merge_of_two_students(tmp_path: Path) -> None:
    correct = {**CORRECT, "mix": CORRECT["sdft"]}
    run = finished_run(tmp_path, correct=correct, merges={"mix": {"arms": ("sft", "sdft"), "t": (0.25,)}})
    card = card_of(run, "mix")
    assert "A merge (slerp, 0.25 of the way) of two students: sft (trained on the references" in shown(card)
    assert "Training took" not in card
    assert "arXiv:2410.09982" in card


def test_speed_is_told_for_each_batch() -> None:
    data = report_data()
    assert data.speed is not None
    for (was, now), told in zip(data.speed.batches, _speedup(data).split(", "), strict=True):
        assert told == f"{now.decode.median / was.decode.median:.2f} times as fast with {was.batch_rows} at once"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, {"2410.09982", "2402.13669"}, {"2407.14679", "2403.17887", "2106.09685"}),
        ({"width": {"mlp": 0.5}}, {"2407.14679"}, {"2408.11796"}),
        ({"depth": {"remove_blocks": 1}}, {"2403.17887"}, {"2403.03853"}),
        ({"depth": {"metric": "block_influence", "remove_blocks": 1}}, {"2403.03853"}, {"2403.17887"}),
        ({"depth": {"metric": "best", "remove_blocks": 1}}, {"2403.03853", "2403.17887", "2407.14679"}, {"2408.11796"}),
    ],
)
def test_the_methods_that_were_used_are_cited(
    tmp_path: Path, changes: dict[str, Any], present: set[str], absent: set[str]
) -> None:
    card = card_of(finished_run(tmp_path, **changes))
    cited = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", card))
    assert present <= cited
    assert not absent & cited


@pytest.mark.parametrize(
    ("releasable", "said"),
    [(None, "not judged"), (True, "| met |"), (False, "did not meet the release bounds")],
)
def test_release_bounds(run: Run, releasable: bool | None, said: str) -> None:
    card = card_of(run, releasable=releasable, reasons=("Mean recovery is 70 %, *below* 90 %",))
    assert said in card
    assert ("70 %" in card) == (releasable is False)
    assert "<em>below" not in html_of(card)


def test_neither_paths_nor_credentials(tmp_path: Path) -> None:
    secret = "s3://AKIAKEY:hush@bucket/rows.jsonl?X-Amz-Signature=abc"
    run = finished_run(
        tmp_path, sources={"seed_set": {"url": secret}}, seed_set={"source": secret}, gates=str(tmp_path / "gates.json")
    )
    card = card_of(run)
    assert "s3://bucket/rows.jsonl" in card
    for hidden in (str(tmp_path), "hush", "AKIAKEY", "Signature"):
        assert hidden not in card


def test_the_same_card_twice(run: Run) -> None:
    assert card_of(run) == card_of(run)


HOSTILE = "a | b `c` *d* <script>alert(1)</script> [e](javascript:f)\n---\nlicense: mit\n---\n# g ```\u202egnp ${1}"


@pytest.mark.slow
def test_what_users_write_is_shown_and_does_nothing(tmp_path: Path) -> None:
    task = "t|x <img src=y> `z` *_u_*"
    correct = {model: {task: "1110111111"} for model in CORRECT}
    folder = tmp_path / "te*ach*er <b>"
    run = finished_run(tmp_path, correct=correct, description=HOSTILE, teacher={"model": str(folder)})
    card = card_of(run, releasable=False, reasons=(HOSTILE,))
    found = front_matter(card)
    assert found["license"] == "other"
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == task
    page = html_of(card)
    for tag in ("<script", "<img", "<b>", 'javascript:f"'):
        assert tag not in page
    assert page.count("<h1") == 1
    assert "\u202e" not in page.split("<summary>The recipe")[0]
    assert "alert(1)" in page
    assert "t|x &lt;img src=y&gt; `z` *_u_*" in page
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        widths = {row.count("<td") + row.count("<th") - row.count("<thead") for row in table.split("<tr>")[1:]}
        assert len(widths) == 1


def test_backticks_in_a_recipe_stay_in_its_block(tmp_path: Path) -> None:
    text = "a\n\n```\n\n</details><script>x</script>\n\n````\n\nz"
    run = finished_run(tmp_path, description=text)
    page = html_of(card_of(run))
    assert "<script>" not in page
    assert page.count("</details>") == 3
    (block,) = re.findall(r'<code class="language-yaml">(.*?)</code>', page, re.DOTALL)
    assert Recipe.parse(parse_yaml(unescape(block))).description == text


def test_code_examples_are_whole(run: Run) -> None:
    card = card_of(run, repository="alice/small_model")
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(example, "card", "exec")
    assert 'name = "alice/small_model"' in example
    assert "vllm serve alice/small_model" in card


class TestPortable:
    """The recipe that is given away."""

    def test_files_that_lie_together_keep_their_places(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        recipe = make_recipe(tmp_path, tmp_path / "teacher", seed_set={"source": str(tmp_path / "data/rows.jsonl")})
        short = portable(recipe)
        assert (short.teacher.model, short.seed_set.source) == ("./teacher", "./data/rows.jsonl")
        assert short.calibration.source == "./calibration.jsonl"

    @pytest.mark.parametrize("teacher", ["/models/big", "/home/bob/deep/down/big"])
    def test_strewn_files_go_by_role(self, teacher: str) -> None:
        data = {"seed_set": {"source": "/home/bob/rows.jsonl"}, "calibration": {"source": "/data/bob/rows.jsonl"}}
        recipe = _recipe(teacher, data)
        short = portable(recipe)
        assert short.teacher.model == "./teacher/big"
        assert (short.seed_set.source, short.calibration.source) == (
            "./seed_set/rows.jsonl",
            "./calibration/rows.jsonl",
        )
        assert "bob" not in short.to_yaml()

    def test_held_out_text_and_its_embedding_model_have_places_too(self) -> None:
        asked = {"source": "/home/bob/texts.jsonl", "embedding": "/srv/deep/bob/embedder"}
        short = portable(_recipe("/home/bob/big", {"forgetting": asked}))
        assert "bob" not in short.to_yaml()
        assert Recipe.parse(parse_yaml(short.to_yaml())) == short
        hub = portable(_recipe("org/big", {"forgetting": {**asked, "embedding": "org/embedder"}})).forgetting
        assert hub is not None
        assert (hub.source, hub.embedding) == ("./texts.jsonl", "org/embedder")
        assert portable(_recipe("org/big", {})).forgetting is None

    def test_urls_of_files_are_paths_too(self) -> None:
        short = portable(_recipe("org/big", {"seed_set": {"source": "file:///home/bob/rows.jsonl"}}))
        assert "bob" not in short.seed_set.source
        assert short.teacher.model == "org/big"

    def test_it_can_be_read_again(self, tmp_path: Path) -> None:
        recipe = make_recipe(tmp_path, tmp_path / "teacher")
        short = portable(recipe)
        assert Recipe.parse(parse_yaml(short.to_yaml())) == short
        assert short.train == recipe.train


def _recipe(teacher: str, changes: dict[str, Any]) -> Recipe:
    text = textwrap.dedent(f"""
        name: r
        teacher: {{model: {teacher}}}
        seed_set: {{source: gsm8k}}
        calibration: {{source: gsm8k}}
        depth: {{remove_blocks: 1}}
        train: {{num_steps: 1, arms: {{a: {{data: reference, learning_rate: 0.1}}}}}}
        evaluate: {{tasks: [{{name: t}}]}}
    """)
    return Recipe.parse({**parse_yaml(text), **changes})
