"""Recovery: by hand on round numbers, and its standard errors against a paired bootstrap."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.recovery import Estimate, recovery
from sdft_ray.statistics.scores import Scores, TaskScore

N = 400


def score(task: str, items: np.ndarray, chance: float | None = 0.0) -> TaskScore:
    """A task whose value and error are worked out from 0/1 items as lm-eval does."""
    return TaskScore(
        task=task, metric="acc", filter="none", value=float(items.mean()),
        stderr=float(items.std(ddof=1) / np.sqrt(len(items))), n=len(items), num_fewshot=0, higher_is_better=True,
        chance=chance, items={str(i): float(value) for i, value in enumerate(items)},
    )  # fmt: skip


def fixed(task: str, value: float, **changes: Any) -> TaskScore:
    base = TaskScore(task, "acc", "none", value, 0.0, 100, 0, True, 0.25, {})
    return replace(base, **changes)


def near(value: float) -> Any:
    """A float up to rounding, where a type checker wants the float itself."""
    return pytest.approx(value, abs=1e-8)


def scores(*tasks: TaskScore) -> Scores:
    return Scores({task.task: task for task in tasks})


def correlated(seed: int, teacher: float, flip: float) -> tuple[np.ndarray, np.ndarray]:
    """0/1 items of a teacher, and of a student that changes each with probability `flip`."""
    random = np.random.default_rng(seed)
    t = (random.random(N) < teacher).astype(float)
    s = np.where(random.random(N) < flip, 1 - t, t)
    return t, s


def test_by_hand() -> None:
    teacher = scores(fixed("sums", 0.8), fixed("facts", 0.9), fixed("lists", 0.4))
    student = scores(fixed("sums", 0.4), fixed("facts", 0.9), fixed("lists", 0.3))
    result = recovery(teacher, student, tuned=["sums"])
    values = {name: ratio.value for name, ratio in result.tasks.items()}
    assert values == pytest.approx({"sums": 0.5, "facts": 1.0, "lists": 0.75})
    assert result.mean.value == pytest.approx(1.6 / 2.1)
    assert (result.min_task, result.min.value) == ("sums", pytest.approx(0.5))
    assert result.tuned == Estimate(near(0.5), 0.0)
    assert result.off_domain is not None
    assert result.off_domain.value == pytest.approx(1.2 / 1.3)
    assert result.teacher_mean.value == pytest.approx(0.7)
    assert result.student_off_domain_mean == Estimate(near(0.6), 0.0)
    assert result.left_out == ()


def test_chance_corrected_by_hand() -> None:
    teacher = scores(fixed("a", 0.75), fixed("b", 0.5, chance=0.0), fixed("c", 0.9, chance=None))
    student = scores(fixed("a", 0.5), fixed("b", 0.25, chance=0.0), fixed("c", 0.1, chance=None))
    result = recovery(teacher, student, chance_corrected=True)
    assert {name: ratio.value for name, ratio in result.tasks.items()} == {"a": 0.5, "b": 0.5}
    assert result.mean.value == pytest.approx(0.5)
    assert result.left_out == ("c",)
    assert result.teacher_mean.value == pytest.approx(2.15 / 3)


def test_a_teacher_that_may_be_guessing_has_no_corrected_ratio() -> None:
    teacher = scores(fixed("a", 0.75, stderr=0.04), fixed("b", 0.527, stderr=0.041, chance=0.5))
    student = scores(fixed("a", 0.5, stderr=0.04), fixed("b", 0.567, stderr=0.041, chance=0.5))
    result = recovery(teacher, student, chance_corrected=True)
    assert result.tasks["b"] == Estimate(None, None)
    assert result.min_task == "a"
    assert result.left_out == ()
    assert result.mean.value == pytest.approx((0.25 + 0.067) / (0.5 + 0.027))
    assert recovery(teacher, student).tasks["b"].value == pytest.approx(0.567 / 0.527)


def test_a_teacher_at_nothing_has_no_ratio_but_counts_in_the_mean() -> None:
    result = recovery(scores(fixed("a", 0.0), fixed("b", 0.5)), scores(fixed("a", 0.1), fixed("b", 0.4)))
    assert result.tasks["a"] == Estimate(None, None)
    assert result.mean.value == pytest.approx(1.0)
    assert result.min_task == "b"
    nothing = recovery(scores(fixed("a", 0.0)), scores(fixed("a", 0.0)))
    assert (nothing.mean, nothing.min, nothing.min_task) == (Estimate(None, None), Estimate(None, None), None)


def test_metrics_of_unknown_scale_are_left_out() -> None:
    """Also where only one model's values show that they are no shares."""
    odd = fixed("odd", 0.9, metric="rouge")
    other = fixed("odd", 41.0, metric="rouge", scale=None)
    result = recovery(scores(fixed("a", 0.5), other), scores(fixed("a", 0.4), odd))
    assert result.left_out == ("odd",)
    assert result.teacher_mean.value == pytest.approx(0.5)
    assert other.not_averaged == "the scale of rouge is not known"


def test_scores_that_an_earlier_version_wrote() -> None:
    """Without a scale: what is no share has none."""
    data = scores(fixed("a", 0.5), fixed("chrf", 41.0)).to_json()
    for fields in data["tasks"].values():
        del fields["scale"]
    found = Scores.from_json(data).tasks
    assert (found["a"].scale, found["chrf"].scale) == (1.0, None)


def test_metrics_that_should_be_low_are_left_out() -> None:
    low = fixed("ppl", 12.0, metric="perplexity", higher_is_better=False)
    result = recovery(scores(fixed("a", 0.5), low), scores(fixed("a", 0.4), low))
    assert result.left_out == ("ppl",)
    assert result.mean.value == pytest.approx(0.8)


@pytest.mark.parametrize("chance_corrected", [False, True])
def test_standard_errors_against_a_paired_bootstrap(chance_corrected: bool) -> None:
    chance = {"sums": 0.0, "facts": 0.25, "pairs": 0.5}
    drawn = {"sums": correlated(1, 0.8, 0.3), "facts": correlated(2, 0.9, 0.15), "pairs": correlated(3, 0.7, 0.2)}
    teacher = scores(*(score(name, t, chance[name]) for name, (t, _) in drawn.items()))
    student = scores(*(score(name, s, chance[name]) for name, (_, s) in drawn.items()))
    result = recovery(teacher, student, tuned=["sums"], chance_corrected=chance_corrected)

    random = np.random.default_rng(0)
    draws = 4000
    means = {}
    for name, (t, s) in drawn.items():
        index = random.integers(N, size=(draws, N))
        level = chance[name] if chance_corrected else 0.0
        means[name] = (t[index].mean(axis=1) - level, s[index].mean(axis=1) - level)
    for name, (t, s) in means.items():
        assert result.tasks[name].stderr == pytest.approx(np.std(s / t), rel=0.06)
    mean = sum(s for _, s in means.values()) / sum(t for t, _ in means.values())
    assert result.mean.stderr == pytest.approx(np.std(mean), rel=0.06)
    off = [means["facts"], means["pairs"]]
    assert result.off_domain is not None
    assert result.off_domain.stderr == pytest.approx(np.std(sum(s for _, s in off) / sum(t for t, _ in off)), rel=0.06)
    student_mean = np.mean([s for _, s in means.values()], axis=0)
    assert result.student_mean.stderr == pytest.approx(np.std(student_mean), rel=0.06)


def test_pairing_narrows_the_error() -> None:
    t, s = correlated(5, 0.7, 0.1)
    paired = recovery(scores(score("a", t)), scores(score("a", s))).tasks["a"].stderr
    apart = recovery(scores(score("a", t)), scores(replace(score("a", s), items={}))).tasks["a"].stderr
    assert paired is not None
    assert apart is not None
    assert paired < 0.7 * apart


def test_a_student_equal_to_its_teacher_has_no_error() -> None:
    t, _ = correlated(6, 0.7, 0.0)
    assert recovery(scores(score("a", t)), scores(score("a", t))).mean == Estimate(1.0, near(0.0))


def test_unknown_errors_stay_unknown() -> None:
    result = recovery(scores(fixed("a", 0.5, stderr=None)), scores(fixed("a", 0.4)))
    assert result.tasks["a"] == Estimate(near(0.8), None)
    assert result.mean.stderr is None


def test_different_tasks_or_metrics_are_refused() -> None:
    with pytest.raises(EvaluationError, match="only one of the two models was scored on 'b'"):
        recovery(scores(fixed("a", 0.5)), scores(fixed("a", 0.5), fixed("b", 0.5)))
    with pytest.raises(EvaluationError, match="scored with different settings on 'a'"):
        recovery(scores(fixed("a", 0.5)), scores(fixed("a", 0.5, num_fewshot=5)))


def test_light_rooms_load_neither_torch_nor_lm_eval() -> None:
    modules = ["evaluation.recovery", "statistics.scores"]
    modules += [f"generation.{name}" for name in ("answers", "numbers", "prompts", "selection", "sampler")]
    code = "import sys\n" + "".join(f"import sdft_ray.{name}\n" for name in modules)
    code += "print(sorted({'torch', 'transformers', 'vllm', 'lm_eval', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
