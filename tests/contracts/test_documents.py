"""README, docs/, Makefile and manifests: every command, option, path, link, snippet and quoted message exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.main import get_command

from sdft_ray.cli.app import app
from sdft_ray.errors import ServeError
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.recipe.study import Study
from sdft_ray.recipe.yaml_model import as_frozen, parse_yaml
from sdft_ray.serving.access import check_access
from sdft_ray.serving.metrics import ALL
from sdft_ray.serving.settings import ServeSettings
from sdft_ray.stages.registry import runner
from sdft_ray.stages.spec import STAGES, workers_of
from tests.support.documents import (
    ROOT,
    Block,
    anchors,
    blocks,
    inline_code,
    links,
    pages,
    shell_lines,
)
from tests.support.finished_run import finished_run
from tests.support.recipes import recipe_data

PAGES = pages()
README = PAGES["README.md"]


def hooks() -> ModuleType:
    """docs/hooks.py, which mkdocs loads by its path."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- commands -------------------------------------------------------------------------------------------------


def unknown_words(line: str) -> list[str]:
    """Commands and options of an `sdft` command line that there are not."""
    command: Any = get_command(app)
    words = shlex.split(line.replace("…", ""))[1:]
    words = words[: words.index("&&")] if "&&" in words else words
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return [] if words[0] in {"COMMAND", "--help"} else words[:1]
        command = command.commands[words.pop(0)]
    known = {option for part in command.params for option in (*part.opts, *part.secondary_opts)} | {"--help"}
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in known]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    lines = [part.strip() for line in shell_lines(page, PAGES[page]) for part in line.split("&&")]
    found = {line: unknown_words(line) for line in lines if re.match(r"sdft [a-zA-Z-]", line)}
    assert {line: words for line, words in found.items() if words} == {}


def test_the_readme_shows_the_commands_that_matter() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"(?:`|^)sdft ([a-z][a-z-]*)", README, flags=re.MULTILINE))
    assert named >= {"compress", "explain", "show", "verify", "submit"}
    assert named <= set(commands)


def test_a_wrong_command_is_noticed() -> None:
    assert unknown_words("sdft compres RECIPE") == ["compres"]
    assert unknown_words("sdft lab exprot build/lab") == ["exprot"]
    assert unknown_words("sdft push RUN sdft hf://owner/name --pubic") == ["--pubic"]
    assert unknown_words("sdft lab gates --seed-set mixed --learning-rate 0.1") == []


def test_the_command_reference_has_every_command_and_option() -> None:
    text = hooks().command_reference()
    seen = 0
    for name, command in _leaves("sdft", get_command(app)):
        (section,) = re.findall(rf"^## `{re.escape(name)}`$(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
        assert " ".join((command.help or "").split()) in " ".join(section.split())
        for part in command.params:
            for option in part.opts if part.param_type_name == "option" else ():
                assert f"`{option}`" in section or option == "--help", (name, option)
                seen += 1
    assert seen > 60
    assert hooks().COMMANDS in PAGES["docs/reference/commands.md"]


def _leaves(name: str, command: Any) -> list[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        return [(name, command)]
    return [leaf for child, part in command.commands.items() for leaf in _leaves(f"{name} {child}", part)]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    lines = [line for line in shell_lines(page, PAGES[page]) if line.startswith("make ")]
    assert {line.split()[1] for line in lines} <= targets


def test_the_readme_has_its_two_commands() -> None:
    assert {"make quickstart", "make test"} <= set(shell_lines("README.md", README))


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_their_options_exist(page: str) -> None:
    for line in shell_lines(page, PAGES[page]):
        for script, rest in re.findall(r"python (\S+\.py)([^&]*)", line):
            assert (ROOT / script).is_file(), (page, line)
            if "/bench/" in script:
                text = (ROOT / script).read_text(encoding="utf-8")
                options = re.findall(r"(?<!\S)--[a-z-]+", rest)
                assert [option for option in options if f'"{option}"' not in text] == [], (page, line)


def test_benchmarks_are_all_on_their_page() -> None:
    names = {path.stem for path in (ROOT / "jobs/bench").glob("*.py")} - {"shapes"}  # a study, not a bound
    assert names <= set(re.findall(r"^\| `([a-z_]+)`", PAGES["docs/benchmarks.md"], flags=re.MULTILINE))


# --- paths and links ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    pattern = r"(?<![\w./:-])((?:jobs|cluster|requirements|tests|docs|sdft_ray|serve)/[\w./-]*)"
    paths = {path.rstrip(".") for path in re.findall(pattern, PAGES[page])}
    missing = {path for path in paths if not (ROOT / path).exists()}
    # A test or a file of ours may have moved since an old entry of the log was written.
    assert {path for path in missing if page != "jobs/recipes/LOG.md"} == set()


def test_the_readme_names_paths() -> None:
    assert re.findall(r"\b((?:jobs|cluster|requirements|tests|docs)/[\w./-]+)", README)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(PAGES[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), (page, target)
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), (page, target)


def test_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = set(re.findall(r": ([\w/]+\.md)$", text, flags=re.MULTILINE))
    written = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert written <= shown
    assert {f"docs/{page}" for page in shown - written} <= {f"docs/{page}" for page in hooks().GENERATED}


def test_links_out_of_the_site_become_text() -> None:
    rewritten = hooks().site_links
    log = "see the [log](../jobs/recipes/LOG.md) and [the study](../sdft_ray/lab/study.yaml)"
    assert rewritten(log, "training.md") == "see the [log](results/log.md) and the study"
    assert rewritten("[log](../../jobs/recipes/LOG.md#a)", "results/laboratory.md") == "[log](log.md#a)"
    assert rewritten("![figure](../../docs/images/a.png)", "results/log.md") == "![figure](../images/a.png)"
    assert rewritten("```\n[a](../b.md)\n```", "index.md") == "```\n[a](../b.md)\n```"
    assert rewritten("[arXiv](https://arxiv.org/abs/1)", "index.md") == "[arXiv](https://arxiv.org/abs/1)"


def test_the_site_fetches_nothing() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in text
    assert "://" not in text


# --- snippets -------------------------------------------------------------------------------------------------


def recipe_of(block: Block, folder: Path) -> Recipe:
    """The recipe of a snippet: what it leaves out is a small recipe's."""
    return Recipe.parse({**recipe_data(folder, folder), **as_frozen(parse_yaml(block.text))}, origin=str(block))


def snippets(page: str, title: str) -> list[Block]:
    return [block for block in blocks("yaml") if block.page == page and block.title == title]


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_parses_as_what_it_is(block: Block, tmp_path: Path) -> None:
    match block.title:
        case "recipe.yaml":
            recipe_of(block, tmp_path)
        case "resources.yaml":
            Resources.model_validate(as_frozen(parse_yaml(block.text)))
        case "study.yaml":
            Study.model_validate(as_frozen(parse_yaml(block.text)))
        case "service.yaml":
            ServeSettings.parse(as_frozen(parse_yaml(block.text)), str(block))
        case _:
            pytest.fail(f'{block}: say what the block is an excerpt of, such as ```yaml title="recipe.yaml"')


def test_the_readmes_recipe_is_whole_and_short() -> None:
    (block,) = snippets("README.md", "recipe.yaml")
    recipe = Recipe.parse(parse_yaml(block.text), origin=str(block))
    assert len(block.text.splitlines()) <= 20
    assert set(recipe.train.arms) == {"sft", "sdft"}
    assert (
        recipe.evaluate.tasks == Recipe.load(ROOT / "jobs/recipes/llama31_8b_instruct_depth6_sdft.yaml").evaluate.tasks
    )


def test_the_training_that_the_docs_show_has_its_merges_and_terms(tmp_path: Path) -> None:
    (block,) = snippets("docs/training.md", "recipe.yaml")
    recipe = Recipe.parse(json.loads(json.dumps(recipe_data(tmp_path, tmp_path))) | parse_yaml(block.text))
    assert set(recipe.merged) == {"both_25", "both_50", "both_75"}
    assert recipe.train.arms["kd"].objective.terms == ("forward_kl",)


def test_the_evaluation_that_the_docs_show_is_the_leaderboard(tmp_path: Path) -> None:
    block, *_ = snippets("docs/evaluation.md", "recipe.yaml")
    recipe = recipe_of(block, tmp_path)
    written_out = Recipe.load(ROOT / "jobs/recipes/llama31_8b_instruct_depth6_sdft.yaml").evaluate
    assert recipe.evaluate.tasks == written_out.tasks
    assert recipe.evaluate.apply_chat_template is written_out.apply_chat_template is False
    assert recipe.release is not None


def test_the_pruning_that_the_docs_show_has_one_target(tmp_path: Path) -> None:
    (block,) = snippets("docs/pruning.md", "recipe.yaml")
    recipe = recipe_of(block, tmp_path)
    assert [name for name, part in recipe.prunings.items() if part.target] == [""]


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_its_imports_exist(block: Block) -> None:
    tree = ast.parse(block.text, filename=str(block))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == [], str(block)
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


def needs_a_run_only(block: Block) -> bool:
    """Whether a block reads a finished run; what makes one starts Ray, and is run in tests/ray.

    The blocks of a page for contributors depend on each other: `test_contributing.py` runs them.
    """
    return "compress(" not in block.text and not _is_for_contributors(block)


def _is_for_contributors(block: Block) -> bool:
    return block.page.startswith("docs/contributing/")


@pytest.mark.slow
@pytest.mark.parametrize("block", [each for each in blocks("python") if needs_a_run_only(each)], ids=str)
def test_python_that_reads_a_run_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a finished run of tiny models, by the name and at the place that the docs give it."""
    run = finished_run(tmp_path)
    (tmp_path / "store").rename(tmp_path / ".sdft")
    record = tmp_path / f".sdft/runs/{run.name}.json"
    record.rename(record.with_name("quickstart.json"))
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {})


def test_python_blocks_are_run_by_someone() -> None:
    """The others start Ray: `tests/ray/test_documents.py` runs them."""
    text = (ROOT / "tests/ray/test_documents.py").read_text(encoding="utf-8")
    others = [each for each in blocks("python") if not needs_a_run_only(each) and not _is_for_contributors(each)]
    assert [str(block) for block in others if f'"{block.page}"' not in text] == []


def test_modules_of_the_api_reference_exist() -> None:
    text = PAGES["docs/reference/api.md"]
    for name, members in re.findall(
        r"^::: (\S+)(?:\n    options: \{members: \[([\w, ]+)\]\})?", text, flags=re.MULTILINE
    ):
        module = importlib.import_module(name)
        assert [member for member in members.split(", ") if member and not hasattr(module, member)] == [], name


def test_the_api_reference_lists_what_is_public() -> None:
    import sdft_ray

    named = set(re.findall(r"^\| `sdft_ray\.(\w+)`", PAGES["docs/reference/api.md"], flags=re.MULTILINE))
    assert named == set(sdft_ray.__all__)


# --- tables ---------------------------------------------------------------------------------------------------


def test_supported_families_are_listed() -> None:
    from sdft_ray.models.families import FAMILIES

    table = PAGES["docs/pruning.md"].split("## Supported architectures")[1]
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", table, flags=re.MULTILINE))
    assert listed == {name: family.architecture for name, family in FAMILIES.items()}
    assert f"{len(FAMILIES)} dense families" in README


def test_named_sets_and_suites_are_listed() -> None:
    from sdft_ray.data.hub import NAMED_SETS
    from sdft_ray.recipe.suites import SUITES

    assert set(NAMED_SETS) <= set(inline_code(PAGES["docs/generation.md"]))
    assert [name for name in SUITES if name not in PAGES["docs/evaluation.md"]] == []


# --- manifests, pins, stages ---------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_the_entry_points_are_those_that_the_documents_name() -> None:
    there = {path.name for path in (ROOT / "jobs").glob("*.py")}
    assert there == {"compress.py", "digest.py", "study.py", "stage.py"}
    assert options_of("digest") >= {"--help", "--into", "--store", "--data"}
    for name in there - {"digest.py"}:
        assert options_of(name.removesuffix(".py")) >= {"--help", "--store", "--resources", "--progress"}
    named = re.findall(r"jobs/(\w+\.py)", README + (ROOT / "cluster/rayjob.yaml").read_text(encoding="utf-8"))
    assert set(named) <= there


def serve_configs() -> dict[str, dict[str, Any]]:
    service, policy = yaml.safe_load_all((ROOT / "cluster/rayservice.yaml").read_text(encoding="utf-8"))
    assert policy["kind"] == "NetworkPolicy"
    assert service["spec"]["rayClusterConfig"]["authOptions"]["mode"] == "token"
    local = yaml.safe_load((ROOT / "serve/config.yaml").read_text(encoding="utf-8"))
    return {"local": local, "cluster": yaml.safe_load(service["spec"]["serveConfigV2"])}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "cluster"])
def test_serve_configs_are_ones(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_configs()[name]
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    module, _, function = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    settings = ServeSettings.parse(application["args"], name)
    check_access(settings.access)
    assert settings.limits.request_timeout_s < config["http_options"]["request_timeout_s"]
    with pytest.raises(ServeError, match="no API keys are configured"):
        check_access(settings.access.model_copy(update={"keys_file": None}))


def test_the_dashboard_asks_for_figures_that_there_are() -> None:
    text = (ROOT / "cluster/dashboards/serving.json").read_text(encoding="utf-8")
    asked = set(re.findall(r"\$\{prefix\}(\w+?)(?:_total|_bucket)?\b", text))
    assert asked == {metric.name for metric in ALL}
    panels = json.loads(text)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 8


def test_every_stage_has_a_version_and_a_runner() -> None:
    resources = Resources()
    for stage, spec in STAGES.items():
        assert spec.version >= 1
        assert callable(runner(stage)) if spec.module else stage == "report"
        device = workers_of(stage, resources)
        assert device is None or not spec.num_workers or getattr(device, spec.num_workers) >= 1


def test_pins_are_exact_and_name_no_host() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "://" not in line, path
            if line and not line.startswith("#") and path.name != "overrides.txt":
                assert "==" in line, (path, line)
