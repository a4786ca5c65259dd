"""README, Makefile and manifests say what is there."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from sdft_ray.cli.app import app
from sdft_ray.errors import ServeError
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.yaml_model import as_frozen, parse_yaml
from sdft_ray.serving.access import check_closed
from sdft_ray.serving.metrics import ALL
from sdft_ray.serving.settings import ServeSettings
from sdft_ray.stages.graph import VERSIONS
from sdft_ray.stages.registry import _MODULES
from tests.support.recipes import recipe_data

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_commands_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"(?:`|^)sdft ([a-z][a-z-]*)", README, flags=re.MULTILINE))
    assert named >= {"compress", "explain", "show", "verify", "submit"}
    assert named <= set(commands)


def test_readme_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets


def test_readme_tree_is_the_tree() -> None:
    block = README.split("## The house")[1].split("```")[1]
    named = set(re.findall(r"^  ([a-z_]+(?:\.py|/))  ", block, flags=re.MULTILINE))
    parts = [path for path in (ROOT / "sdft_ray").iterdir() if not path.name.startswith("__")]
    inside = {path.name + ("/" if path.is_dir() else "") for path in parts}
    assert named == inside


def test_readme_paths_exist() -> None:
    paths = re.findall(r"\b((?:jobs|cluster|requirements|tests|docs)/[\w./-]+)", README)
    assert paths
    assert [path for path in paths if not (ROOT / path.rstrip(".")).exists()] == []


def test_readme_recipe_is_one(tmp_path: Path) -> None:
    shown = parse_yaml(README.split("## Recovering what was lost")[1].split("```yaml")[1].split("```")[0])
    recipe = Recipe.parse(json.loads(json.dumps(recipe_data(tmp_path, tmp_path))) | shown)
    assert set(recipe.merged) == {"both_25", "both_50", "both_75"}
    assert recipe.train.arms["kd"].objective.terms == ("forward_kl",)


def test_the_evaluation_that_the_readme_shows_is_the_leaderboard(tmp_path: Path) -> None:
    shown = parse_yaml(README.split("## Evaluating")[1].split("```yaml")[1].split("```")[0])
    recipe = Recipe.parse({**recipe_data(tmp_path, tmp_path), **as_frozen(shown)})
    written_out = Recipe.load(ROOT / "jobs/recipes/llama31_8b_instruct_depth6_sdft.yaml").evaluate
    assert recipe.evaluate.tasks == written_out.tasks
    assert recipe.evaluate.apply_chat_template is written_out.apply_chat_template is False
    assert recipe.release is not None


def test_the_pruning_that_the_readme_shows_is_one(tmp_path: Path) -> None:
    shown = parse_yaml(README.split("## What is removed")[1].split("```yaml")[1].split("```")[0])
    recipe = Recipe.parse({**recipe_data(tmp_path, tmp_path), **shown})
    assert [name for name, part in recipe.prunings.items() if part.target] == [""]


def test_the_job_on_a_cluster_calls_an_entry_point_of_the_image() -> None:
    manifest = yaml.safe_load((ROOT / "cluster/rayjob.yaml").read_text(encoding="utf-8"))
    python, script, *words = manifest["spec"]["entrypoint"].split()
    image = (ROOT / "cluster/Containerfile").read_text(encoding="utf-8")
    home = re.findall(r"^WORKDIR (.+)$", image, re.MULTILINE)[-1]
    assert (python, script) == ("python", f"{home}/jobs/compress.py")
    assert "COPY jobs jobs" in image.splitlines()
    assert (ROOT / "jobs/compress.py").is_file()
    assert manifest["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"
    known = options_of("compress")
    given = {word for word in words if word.startswith("--")}
    assert given >= {"--store", "--resources", "--progress"}
    assert given <= known


def options_of(job: str) -> set[str]:
    """The options of an entry point, from its own help page."""
    page = subprocess.run(
        [sys.executable, ROOT / f"jobs/{job}.py", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    return set(re.findall(r"--[a-z][a-z-]*", page.stdout))


def test_the_entry_points_are_those_that_the_documents_name() -> None:
    there = {path.name for path in (ROOT / "jobs").glob("*.py")}
    assert there == {"compress.py", "study.py", "stage.py"}
    for name in there:
        assert options_of(name.removesuffix(".py")) >= {"--help", "--store", "--resources", "--progress"}
    named = re.findall(r"jobs/(\w+\.py)", README + (ROOT / "cluster/rayjob.yaml").read_text(encoding="utf-8"))
    assert set(named) <= there


def serve_configs() -> dict[str, dict[str, Any]]:
    service, policy = yaml.safe_load_all((ROOT / "cluster/rayservice.yaml").read_text(encoding="utf-8"))
    assert policy["kind"] == "NetworkPolicy"
    assert service["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"
    local = yaml.safe_load((ROOT / "serve/config.yaml").read_text(encoding="utf-8"))
    return {"local": local, "cluster": yaml.safe_load(service["spec"]["serveConfigV2"])}


@pytest.mark.parametrize("name", ["local", "cluster"])
def test_serve_configs_are_ones(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_configs()[name]
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    module, _, function = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    settings = ServeSettings.parse(application["args"], name)
    check_closed(settings.access)
    assert settings.limits.request_timeout_s < config["http_options"]["request_timeout_s"]
    with pytest.raises(ServeError, match="no API keys are configured"):
        check_closed(settings.access.model_copy(update={"keys_file": None}))


def test_the_dashboard_asks_for_figures_that_there_are() -> None:
    text = (ROOT / "cluster/dashboards/serving.json").read_text(encoding="utf-8")
    asked = set(re.findall(r"\$\{prefix\}(\w+?)(?:_total|_bucket)?\b", text))
    assert asked == {metric.name for metric in ALL}
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 8


def test_every_stage_has_a_version_and_a_runner() -> None:
    assert set(_MODULES) == set(VERSIONS) - {"report"}


def test_pins_are_exact_and_name_no_host() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "://" not in line, path
            if line and not line.startswith("#") and path.name != "overrides.txt":
                assert "==" in line, (path, line)
