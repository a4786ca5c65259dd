"""Sentences of a model card: what a student learnt from, what was asked of it, and what nobody knows about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdft_ray.recipe.arms import Arm
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.release.card_facts import CardFacts
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.words import arm_notes, reversals
from sdft_ray.report.toolbox.markdown import Raw, escaped
from sdft_ray.report.toolbox.numbers import percent_error
from sdft_ray.statistics.scores import Scores

_PAPERS = {
    "2410.09982": "Thangarasa et al., Self-Data Distillation for Recovering Quality in Pruned Large Language Models",
    "2402.13669": "Yang et al., Self-Distillation Bridges Distribution Gap in Language Model Fine-Tuning",
    "2407.14679": "Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation",
    "2408.11796": "Sreenivas et al., LLM Pruning and Distillation in Practice: The Minitron Approach",
    "2403.17887": "Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers",
    "2403.03853": "Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    "2505.02819": "Shopkhoev et al., ReplaceMe",
    "2106.09685": "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models",
    "2306.13649": "Agarwal et al., On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
}


def release(releasable: bool | None, reasons: Sequence[str]) -> str:
    """A warning at the top of a card where bounds were missed; "" otherwise. Ends in an empty line."""
    if releasable is not False:
        return ""
    missed = "".join(f"> - {escaped(reason)}\n" for reason in reasons)
    told = ":\n>\n" + missed if missed else ".\n"
    return f"> [!WARNING]\n> **This model did not meet the release bounds of its recipe**{told}\n"


def arms_of(student: str, recipe: Recipe) -> list[Arm]:
    """The arms that a student is made of: itself, or the two that were merged."""
    merged = recipe.merged.get(student)
    names = merged[0].arms if merged else (student,)
    return [recipe.train.arms[name] for name in names if name in recipe.train.arms]


def _all_arms(student: str, recipe: Recipe) -> list[Arm]:
    """Those of earlier steps as well: the student stands on them."""
    return [*(step.arm for step in recipe.steps), *arms_of(student, recipe)]


def uses_rewrites(student: str, recipe: Recipe) -> bool:
    """Whether some of what it learnt from was written by the teacher."""
    return any(arm.data == "distilled" for arm in _all_arms(student, recipe))


def learnt(data: ReportData, student: str, recipe: Recipe) -> str:
    """What the student was trained on, and by which objective."""
    note = arm_notes(data).get(student, "")
    merged = recipe.merged.get(student)
    if merged is not None:
        merge, share = merged
        notes = " and ".join(f"{name} ({arm_notes(data).get(name, 'trained')})" for name in merge.arms)
        return f"A merge ({merge.kind}, {share:g} of the way) of two students: {notes}."
    return f"{note[:1].upper()}{note[1:]}." if note else ""


def rewriting(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    """How the teacher wrote its own responses; "" where nothing is known."""
    if not summary:
        return ""
    asked = recipe.generate
    way = "greedily" if asked.temperature == 0 else f"at temperature {asked.temperature:g}, top-p {asked.top_p:g}"
    samples = f", up to {asked.num_samples} samples a prompt" if asked.num_samples > 1 else ""
    tokens = summary.get("response_tokens")
    wrote = f" It wrote {tokens:,} tokens." if tokens else ""
    failed = summary.get("num_failed", 0)
    lost = f" {failed:,} rows could not be answered." if failed else ""
    cut = summary.get("finish_reasons", {}).get("length", 0)
    ended = f" {cut:,} responses ended at the token limit." if cut else ""
    return (
        "The unpruned teacher was shown each instruction with its reference response and answered in its own words, "
        f"{way}, in at most {asked.max_tokens:,} tokens{samples}.{wrote}{ended}{lost}"
    )


def asked(recipe: Recipe, scores: Mapping[str, Scores]) -> str:
    """How the tasks were put."""
    version = next((found.harness for found in scores.values() if found.harness), "")
    harness = f"lm-eval {version}" if version else "lm-eval"
    chat = "in the model’s chat format" if recipe.evaluate.apply_chat_template else "as plain text"
    part = _items(recipe.evaluate.limit)
    return f"Scored with {harness}, {part}, {chat}, teacher and student alike."


def _items(limit: int | dict[str, int] | None) -> str:
    if isinstance(limit, dict):
        return f"the first items of some tasks ({', '.join(f'{num:,} of {task}' for task, num in limit.items())})"
    return f"the first {limit:,} items of each task" if limit else "all items of each task"


def limitations(data: ReportData, student: str, facts: CardFacts) -> list[str]:
    """What a reader must not conclude, in sentences."""
    told = []
    num = len(data.scores.get(student, {}))
    where = f"on {num} tasks" if num != 1 else "on one task"
    told.append(
        f"It was evaluated {where} and on nothing else. Other languages and subjects, long texts, safety and refusal "
        "behaviour and tool use were not measured, and pruning may have harmed any of them."
        if num
        else "It was not evaluated at all."
    )
    own = facts.scores.get(student)
    kept = data.retention.students.get(student)
    corrected = kept.chance_corrected.mean if kept else None
    if corrected and corrected.value is not None and own and any(score.chance for score in own.tasks.values()):
        figure = percent_error(corrected.value, corrected.stderr)
        told.append(
            "Guessing scores above zero where options are given, so plain recovery flatters. With what guessing scores "
            f"taken off both models, mean recovery is {figure}, of the tasks whose chance level is known."
        )
    if own is not None and own.tasks and all(score.chance != 0 for score in own.tasks.values()):
        told.append(
            "No task asks it to write. A pruned model may choose well between options and still write badly "
            "(arXiv:2602.01997)."
        )
    if kept is not None:
        told += [said for said, beyond_chance in reversals(student, kept) if beyond_chance]
    if own is not None and own.num_truncated:
        told.append(f"{own.num_truncated:,} requests lost the beginning of their prompt: the context was too short.")
    told.append(
        "Standard errors are for the choice of test items. The spread between training seeds is not in them, and the "
        "worst of several tasks looks worse than it is by chance alone."
    )
    students = sum(name in data.recovery for name in data.arm_names)
    if students > 1:
        told.append(
            f"It is one of {students} students that were scored on the same items. If it was chosen for these scores, "
            "they are a little too good."
        )
    if data.tuned_families and set(data.tuned_families) >= set(data.scores.get(student, {})):
        told.append("All tasks are of the kind that it was tuned on; none tells what happened elsewhere.")
    told += [
        f"A condition that the recipe’s authors set for fair comparisons does not hold: {gate.name} ({gate.bound})."
        for gate in data.gates
        if not gate.passed
    ]
    return [*told, "What holds of the teacher’s biases, gaps and risks is to be expected of this model as well."]


def tags(data: ReportData, student: str, recipe: Recipe) -> list[str]:
    """For the hub's search."""
    plans = [plan for plan in (*data.earlier, data.plan) if plan]
    found = ["sdft-ray", "pruned"]
    found += ["depth-pruning"] if any(plan.removed_blocks for plan in plans) else []
    found += ["width-pruning"] if any(plan.widths for plan in plans) else []
    found += ["self-data-distillation"] if uses_rewrites(student, recipe) else []
    teaches = any(arm.objective.needs_teacher or arm.objective.cached for arm in _all_arms(student, recipe))
    return found + (["knowledge-distillation"] if teaches else [])


def papers(data: ReportData, student: str, recipe: Recipe) -> list[Raw]:
    """The methods that the recipe used for this student, linked."""
    arms, parts = _all_arms(student, recipe), list(recipe.prunings.values())
    objectives = [arm.objective for arm in arms]
    metrics = {part.depth.metric for part in parts if part.depth.metric != "explicit"}
    if "best" in metrics:  # it compares what these would remove
        metrics |= {"angular_distance", "block_influence", "perplexity"}
    rewrites = uses_rewrites(student, recipe)
    online = any(objective.needs_teacher for objective in objectives)
    used = {
        "2410.09982": rewrites or student in recipe.merged,
        "2402.13669": rewrites,
        "2407.14679": online or bool(recipe.steps) or any(part.width for part in parts) or "perplexity" in metrics,
        "2408.11796": recipe.teacher_correction is not None and online,
        "2403.17887": "angular_distance" in metrics,
        "2403.03853": "block_influence" in metrics,
        "2505.02819": any(part.patch for part in parts),
        "2106.09685": recipe.train.lora is not None,
        "2306.13649": any(objective.jensen_shannon for objective in objectives),
    }
    return [
        Raw(f"{escaped(_PAPERS[paper])}, [arXiv:{paper}](https://arxiv.org/abs/{paper})")
        for paper, applies in used.items()
        if applies
    ]
