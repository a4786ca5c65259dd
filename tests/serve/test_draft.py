"""A smaller model as the teacher's draft: the teacher's words, in fewer steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml

from sdft_ray.lab.export import TEACHER
from sdft_ray.models.surgery import prune_checkpoint
from tests.serve.service import Running, serving

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.service]

QUESTIONS = [f"A farmer has {n} hens and sells {n % 7}. How many are left?" for n in range(11, 23)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("draft")
    prune_checkpoint(TEACHER, home / "smaller", (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11))
    engine = {"dtype": "float32", "max_sequences": 8}  # in bfloat16 a near tie may fall the other way
    draft = {"source": str(home / "smaller"), "num_tokens": 3}
    models: list[Any] = [
        {"name": "teacher", "source": str(TEACHER), "engine": engine},
        {"name": "teacher+draft", "source": str(TEACHER), "engine": engine, "draft": draft},
    ]
    (home / "settings.yaml").write_text(yaml.safe_dump({"models": models}), encoding="utf-8")
    (home / "prompts.txt").write_text("\n".join(QUESTIONS), encoding="utf-8")
    with serving(home, "--config", home / "settings.yaml") as found:
        yield found


def test_with_a_draft_the_teacher_says_the_same_in_fewer_steps(running: Running) -> None:
    named = ["--model", "teacher", "--model", "teacher+draft", "--max-tokens", "40", "--json"]
    prompts = ["--prompts", str(running.log.with_name("prompts.txt"))]
    command = [sys.executable, "-m", "sdft_ray.cli", "bench-serve", f"{running.url}/v1", *named, *prompts]
    alone, drafted = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (alone["model"], drafted["model"]) == ("teacher", "teacher+draft")
    assert alone["acceptance_length"] is None
    assert drafted["same_share"] == 1.0
    assert 1.2 < drafted["acceptance_length"] <= 4.0
    assert min(alone["tokens_per_s"], drafted["tokens_per_s"]) > 0
    assert 0 < drafted["median_first_s"] < drafted["median_s"]


def test_what_became_of_the_drafts_tokens_is_told(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    asked: Any = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "max_tokens": 20}
    usage = client.chat.completions.create(model="teacher+draft", **asked).usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    accepted = usage.completion_tokens_details.accepted_prediction_tokens or 0
    assert 0 < accepted < usage.completion_tokens
    plain = client.chat.completions.create(model="teacher", **asked).usage
    assert plain is not None
    assert plain.completion_tokens_details is None
    figures = httpx.get(f"{running.url}/metrics").text
    assert 'sdft_serve_draft_tokens_total{kind="accepted",model="teacher+draft"}' in figures
