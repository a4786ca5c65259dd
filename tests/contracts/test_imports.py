"""What an import may load, checked in a fresh interpreter; the floors themselves are `make check`'s contracts."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "vllm", "transformers", "datasets", "lm_eval", "matplotlib", "pyarrow")


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "import sdft_ray",
        "from sdft_ray import Recipe, Resources, UserError",
        "import sdft_ray.stages.graph, sdft_ray.cli.app, sdft_ray.pipeline.explain",
        "import sdft_ray.models.size, sdft_ray.pruning.plan",
    ],
)
def test_light_modules_load_nothing_heavy(statement: str) -> None:
    assert _loaded_after(statement) == set()


def test_the_check_itself_can_fail() -> None:
    assert "pyarrow" in _loaded_after("import pyarrow")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


FILES = sorted((ROOT / "sdft_ray").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_holds_both_ray_and_torch(path: Path) -> None:
    assert not {"ray", "torch"} <= _imports(path)


def test_single_homes() -> None:
    homes = {
        "vllm": {
            "generation/vllm_sampler.py",
            "generation/vllm_scoring.py",
            "generation/vllm_arguments.py",
            "engines/vllm.py",
        },
        "lm_eval": {
            f"evaluation/{name}.py"
            for name in ("endpoint", "harness", "items", "lm", "pass_at_k", "progress", "tasks", "templates")
        },
    }
    for package, allowed in homes.items():
        found = {p.relative_to(ROOT / "sdft_ray").as_posix() for p in FILES if package in _imports(p)}
        assert found <= allowed, package
        assert found, f"{package} is imported nowhere: the list above is stale"


def test_torch_distributed_has_its_homes() -> None:
    users = {
        p.relative_to(ROOT / "sdft_ray").as_posix()
        for p in FILES
        if "torch.distributed" in p.read_text(encoding="utf-8")
    }
    assert users == {"training/parallel.py", "training/sharding.py"}
