"""The harness against lm-eval called naively, and its choices against log-likelihoods worked out with torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import env

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.errors import EvaluationError, ModelError
from sdft_ray.evaluation import harness
from sdft_ray.evaluation.harness import EvalConfig
from sdft_ray.evaluation.lm import BatchedLM
from sdft_ray.evaluation.pass_at_k import Samples
from sdft_ray.evaluation.questions import Likelihoods, LoglikelihoodQuestion, Question
from sdft_ray.models.loading import load_model
from sdft_ray.statistics.scores import Scores
from tests.support.asking import evaluate, result_of
from tests.support.tiny import make_model

pytestmark = pytest.mark.slow

LM_EVAL = (lm_eval, lm_eval.utils, env, ConfigurableTask)

CHOICES = [
    {
        "question": f"Who has {i} apples, Ann or Tom?",
        "choices": ["Ann", "Tom has", f"{i} pears"][: 2 + i % 2],
        "gold": i % 2,
    }
    for i in range(12)
]  # fmt: skip
SUMS = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(6)]

CHOICE_TASK: dict[str, Any] = {
    "task": "tiny_choice",
    "tag": "tiny",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/choice.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
SUM_TASK: dict[str, Any] = {
    "task": "tiny_sum",
    "tag": "tiny",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": ["data/sum.jsonl"]}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["<|end|>"], "do_sample": False, "max_gen_toks": 12},
    "filter_list": [
        {"name": "last", "filter": [{"function": "regex", "regex_pattern": "(.)", "group_select": -1},
                                    {"function": "take_first"}]},
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Two task files with their data in a folder below. The model's own replies make some sums right."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data").mkdir()
    _write(folder / "data" / "choice.jsonl", CHOICES)
    _write(folder / "data" / "sum.jsonl", SUMS)
    (folder / "choice.yaml").write_text(yaml.safe_dump(CHOICE_TASK))
    (folder / "sum.yaml").write_text(yaml.safe_dump(SUM_TASK))
    replies = evaluate(checkpoint, ["tiny_sum"], include=folder, num_outputs=6).tasks["tiny_sum"].outputs
    rows = [{**row, "answer": reply.filtered} for row, reply in zip(SUMS[::2], replies[::2], strict=True)]
    _write(folder / "data" / "sum.jsonl", [*rows, *SUMS[1::2]])
    return folder


@pytest.fixture(scope="module")
def scores(checkpoint: Path, folder: Path) -> Scores:
    return evaluate(checkpoint, ["tiny_choice", "tiny_sum"], include=folder)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _naive(checkpoint: Path, folder: Path, **changes: Any) -> Any:
    """lm-eval as its manual says, with absolute paths, one row at a time."""
    return _plain(checkpoint, folder, {"choice": CHOICE_TASK, "sum": SUM_TASK}, **changes)


def _plain(checkpoint: Path, folder: Path, by_file: dict[str, dict[str, Any]], **changes: Any) -> Any:
    from lm_eval.tasks import TaskManager

    tasks = []
    for file, task in by_file.items():
        data_files = {"test": str(folder / "data" / f"{file}.jsonl")}
        tasks.append({**task, "dataset_kwargs": {"data_files": data_files}})
    run: Any = lm_eval.simple_evaluate
    settings = {"apply_chat_template": True, "batch_size": 1, "device": "cpu", **changes}
    manager = TaskManager(include_defaults=False)
    return run(
        model="hf", model_args=f"pretrained={checkpoint},dtype=float32", tasks=tasks, task_manager=manager, **settings
    )


def test_scores_equal_plain_lm_eval(checkpoint: Path, folder: Path, scores: Scores) -> None:
    naive = _naive(checkpoint, folder)
    for name, metric, filtered_by in (("tiny_choice", "acc_norm", "none"), ("tiny_sum", "exact_match", "last")):
        score = scores.tasks[name]
        assert (score.metric, score.filter) == (metric, filtered_by)
        assert score.value == naive["results"][name][f"{metric},{filtered_by}"]
        assert score.stderr == naive["results"][name][f"{metric}_stderr,{filtered_by}"]
        rows = [row for row in naive["samples"][name] if row["filter"] == filtered_by]
        assert score.n == len(rows) == len(score.items)
        assert score.items == {str(row["doc_id"]): row[metric] for row in rows}
        assert score.value == sum(score.items.values()) / score.n
    assert 0 < scores.tasks["tiny_choice"].value < 1
    assert 0 < scores.tasks["tiny_sum"].value < 1


def test_choices_equal_likelihoods_worked_out_with_torch(checkpoint: Path, folder: Path) -> None:
    score = evaluate(checkpoint, ["tiny_choice"], include=folder, metrics={"tiny_choice": "acc"}).tasks["tiny_choice"]
    model, chat = load_model(checkpoint, "float32"), ChatFormat(load_tokenizer(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    for index, row in enumerate(CHOICES):
        prompt = chat.prompt_ids(row["question"])
        sums = []
        for choice in row["choices"]:
            ids = [*prompt, *tokenizer.encode(choice, add_special_tokens=False)]
            with torch.no_grad():
                logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            sums.append(sum(float(logprobs_TV[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        assert score.items[str(index)] == (sums.index(max(sums)) == row["gold"])
    assert score.metric == "acc"
    assert score.chance == pytest.approx((6 / 2 + 6 / 3) / 12)


def test_prompts_are_those_of_training(checkpoint: Path) -> None:
    lm = BatchedLM(checkpoint, ask=lambda questions: iter(()))
    prompt = lm.apply_chat_template([{"role": "user", "content": "Who is taller?"}])
    ids = ChatFormat(load_tokenizer(checkpoint)).prompt_ids("Who is taller?")
    assert lm.tok_encode(prompt) == ids
    assert ids.count(lm.tokenizer.bos_token_id) == 1


def test_outputs_progress_and_json(checkpoint: Path, folder: Path, scores: Scores) -> None:
    outputs = scores.tasks["tiny_sum"].outputs
    assert [output.item for output in outputs] == ["0", "1", "2", "3"]
    assert outputs[0].prompt == "<|bos|><|user|>0 + 1 =<|end|><|assistant|>"
    assert outputs[0].value == 1
    assert outputs[0].response.endswith(outputs[0].filtered)
    assert scores.tasks["tiny_choice"].outputs == ()
    assert scores.tasks["tiny_sum"].chance == 0
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
    told: list[tuple[int, int]] = []
    limited = evaluate(
        checkpoint, ["tiny"], include=folder, limit=4,
        on_item=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert list(limited.tasks) == ["tiny_choice", "tiny_sum"]
    assert [task.n for task in limited.tasks.values()] == [4, 4]
    assert told[-1] == (8, 8)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_nothing_is_printed_and_logging_is_put_back(
    checkpoint: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [(name, logging.getLogger(name).level) for name in ("lm_eval", "datasets", "transformers")]
    handlers = list(logging.getLogger().handlers)
    evaluate(checkpoint, ["tiny_sum"], include=folder, limit=1, apply_chat_template=False)
    assert capfd.readouterr() == ("", "")
    assert before == [(name, logging.getLogger(name).level) for name, _ in before]
    assert handlers == list(logging.getLogger().handlers)


def test_lm_eval_is_not_patched_while_it_runs(checkpoint: Path, folder: Path) -> None:
    before = [dict(vars(part)) for part in LM_EVAL]
    during = []

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Likelihoods]]:
        during.append([dict(vars(part)) for part in LM_EVAL])
        for index, question in enumerate(questions):
            assert isinstance(question, LoglikelihoodQuestion)
            yield index, Likelihoods(tuple((-1.0, False) for _ in question.finals))

    harness.evaluate(checkpoint, EvalConfig(["tiny_choice"], include=folder), ask)
    assert during == [before]


def test_fewshot_examples_and_their_seed(checkpoint: Path, folder: Path) -> None:
    tasks = {"tiny_choice": 2, "tiny_sum": None}
    ours = evaluate(checkpoint, list(tasks), include=folder, num_fewshot=tasks, seed=7)
    assert [score.num_fewshot for score in ours.tasks.values()] == [2, 0]
    naive = _naive(checkpoint, folder, num_fewshot=2, fewshot_random_seed=7)
    assert ours.tasks["tiny_choice"].value == naive["results"]["tiny_choice"]["acc_norm,none"]


def test_items_tell_what_was_answered(checkpoint: Path, folder: Path) -> None:
    result = result_of(checkpoint, ["tiny_choice", "tiny_sum"], include=folder)
    for name, score in result.scores.tasks.items():
        rows = [row for row in result.items if row["task"] == name]
        assert {row["item"]: row["value"] for row in rows} == score.items
    chosen = [row for row in result.items if row["task"] == "tiny_choice"]
    for row, asked in zip(chosen, CHOICES, strict=True):
        assert row["response"].strip() in asked["choices"]
        assert row["target"].strip() == asked["choices"][asked["gold"]]
        assert row["num_tokens"] is row["truncated"] is row["no_answer"] is None
    written = [row for row in result.items if row["task"] == "tiny_sum"]
    tokenizer = load_tokenizer(checkpoint)
    for row, output in zip(written, result.scores.tasks["tiny_sum"].outputs, strict=False):
        assert (row["response"], row["filtered"], row["target"]) == (output.response, output.filtered, output.target)
    for row in written:
        assert row["truncated"] == (row["num_tokens"] == 12)
        if not row["truncated"]:
            assert row["num_tokens"] >= len(tokenizer.encode(row["response"], add_special_tokens=False))
    told = result.scores.tasks["tiny_sum"].written
    assert told is not None
    assert told.num_answers == len(written)
    assert told.mean_tokens == pytest.approx(sum(row["num_tokens"] for row in written) / len(written))
    assert told.truncated == sum(row["truncated"] for row in written) / len(written)
    assert result.scores.tasks["tiny_choice"].written is None
    assert result.scores.harness


def test_a_filter_that_finds_nothing_is_a_failure_of_format(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    nothing = {"name": "never", "filter": [{"function": "regex", "regex_pattern": "(never said)"},
                                           {"function": "take_first"}]}  # fmt: skip
    (tmp_path / "sum.yaml").write_text(yaml.safe_dump({**SUM_TASK, "filter_list": [nothing]}))
    result = result_of(checkpoint, ["tiny_sum"], include=tmp_path)
    assert all(row["no_answer"] for row in result.items)
    written = result.scores.tasks["tiny_sum"].written
    assert written is not None
    assert written.no_answer == 1


def test_pass_at_k_is_drawn_from_the_model(checkpoint: Path, folder: Path) -> None:
    """Near temperature 0 every sample is the greedy answer; at a high one, more samples find more."""
    cold = result_of(checkpoint, ["tiny_sum"], include=folder, samples=Samples(4, temperature=1e-4)).scores
    hot = result_of(checkpoint, ["tiny_sum"], include=folder, samples=Samples(6, temperature=1.5, top_p=1.0)).scores
    score = cold.tasks["tiny_sum"]
    assert score.written is not None
    assert hot.tasks["tiny_sum"].written is not None
    assert score.written.pass_at_k == {"1": score.value, "2": score.value, "4": score.value}
    assert score.items == hot.tasks["tiny_sum"].items  # the greedy score is another matter
    found = hot.tasks["tiny_sum"].written.pass_at_k
    assert list(found) == ["1", "2", "4", "6"]
    assert 0 <= found["1"] < found["6"] <= 1


def test_options_that_differ_in_their_last_token_are_one_question(checkpoint: Path) -> None:
    asked: list[Question] = []

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Likelihoods]]:
        asked.extend(questions)
        for index, question in enumerate(questions):
            assert isinstance(question, LoglikelihoodQuestion)
            yield index, Likelihoods(tuple((-float(final), False) for final in question.finals))

    lm = BatchedLM(checkpoint, ask)
    pairs = [("a b", " c"), ("a b", " d"), ("a b c", " d"), ("a b", " c"), ("x", " c d")]
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", 0, 1)) for pair in pairs]
    found = lm.loglikelihood(requests)
    spelt = [lm.tok_encode("".join(pair)) for pair in pairs]
    assert [-logprob for logprob, _ in found] == [ids[-1] for ids in spelt]
    starts = {(tuple(ids[:-1]), len(ids) - len(lm.tok_encode(context)))
              for ids, (context, _) in zip(spelt, pairs, strict=True)}  # fmt: skip
    assert len(asked) == len(starts) < len(set(pairs))


ROLLING_TASK = {
    "task": "tiny_text",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/text.jsonl"}},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}


def test_whole_texts_and_stop_texts_as_in_lm_eval(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """Texts longer than the context in windows; answers that end at a text, within a token or over several."""
    (tmp_path / "data").mkdir()
    _write(tmp_path / "data" / "text.jsonl", [{"text": "a b c d " * count} for count in (1, 7, 150)])
    _write(tmp_path / "data" / "sum.jsonl", SUMS)
    plain = evaluate(checkpoint, ["tiny_sum"], include=folder, num_outputs=6, metrics={"tiny_sum": "exact_match,whole"})
    said = [output.response for output in plain.tasks["tiny_sum"].outputs]
    stops = [text[len(text) // 2 :][:2] for text in said if len(text) > 3][:2] or ["e"]
    kwargs = {**SUM_TASK["generation_kwargs"], "until": stops}
    stopped = {**SUM_TASK, "dataset_kwargs": {"data_files": {"test": "data/sum.jsonl"}}, "generation_kwargs": kwargs}
    for name, task in (("text", ROLLING_TASK), ("sum", stopped)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    ours = evaluate(checkpoint, ["tiny_text", "tiny_sum"], include=tmp_path, num_outputs=6, apply_chat_template=False)
    naive = _plain(checkpoint, tmp_path, {"text": ROLLING_TASK, "sum": stopped}, apply_chat_template=False)
    key = f"{ours.tasks['tiny_text'].metric},none"
    assert ours.tasks["tiny_text"].value == pytest.approx(naive["results"]["tiny_text"][key], rel=1e-5)
    theirs = [row["resps"][0][0] for row in naive["samples"]["tiny_sum"] if row["filter"] == "last"]
    assert [output.response for output in ours.tasks["tiny_sum"].outputs] == theirs


def test_prompts_that_do_not_fit_are_counted(checkpoint: Path, folder: Path, tmp_path: Path, scores: Scores) -> None:
    assert scores.num_truncated == 0
    (tmp_path / "data").mkdir()
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(CHOICE_TASK))
    (tmp_path / "sum.yaml").write_text(yaml.safe_dump(SUM_TASK))
    _write(tmp_path / "data" / "choice.jsonl", [*CHOICES, {**CHOICES[1], "question": "a b " * 200}])
    _write(tmp_path / "data" / "sum.jsonl", [*SUMS, {**SUMS[1], "question": "a b " * 200}])
    cut = evaluate(checkpoint, ["tiny"], include=tmp_path)
    by_task = {name: score.num_truncated for name, score in cut.tasks.items()}
    assert by_task == {"tiny_choice": len(CHOICES[1]["choices"]), "tiny_sum": 1}
    assert cut.num_truncated == sum(by_task.values())


def test_metric_and_filter_named_by_the_caller(checkpoint: Path, folder: Path) -> None:
    wanted = {"tiny_sum": "exact_match,whole"}
    score = evaluate(checkpoint, ["tiny_sum"], include=folder, metrics=wanted).tasks["tiny_sum"]
    assert (score.metric, score.filter, score.value) == ("exact_match", "whole", 0.0)


def test_a_group_is_scored_as_a_whole(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(CHOICE_TASK))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**CHOICE_TASK, "task": "tiny_choice_2"}))
    group = {
        "group": "pair",
        "task": ["tiny_choice", "tiny_choice_2"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    score = evaluate(checkpoint, ["pair"], include=tmp_path).tasks["pair"]
    assert score.metric == "acc"
    assert score.n == len(score.items) == 24
    assert score.value == pytest.approx(sum(score.items.values()) / 24)
    assert set(score.items) == {f"{task}/{i}" for task in group["task"] for i in range(12)}


# --- bad input ----------------------------------------------------------------------------------------------


def test_unknown_task_names_the_nearest(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(EvaluationError, match="no task named 'tiny_choise'") as caught:
        evaluate(checkpoint, ["tiny_choise"], include=folder)
    assert "tiny_choice" in caught.value.hint


def test_unknown_metric_is_found_before_the_model_is_loaded(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(EvaluationError, match="has no metric 'accuracy'") as caught:
        evaluate(tmp_path / "no model", ["tiny_choice"], include=folder, metrics={"tiny_choice": "accuracy"})
    assert "acc, acc_norm" in caught.value.hint


NO_FILTER = [{"name": "a", "filter": [{"function": "nosuch"}]}]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no .yaml file"),
        ({"a.yaml": yaml.safe_dump(CHOICE_TASK)}, "data file data/choice.jsonl does not exist"),
        (
            {"a.yaml": yaml.safe_dump({**CHOICE_TASK, "filter_list": NO_FILTER}), "data/choice.jsonl": "{}\n"},
            "task 'tiny_choice' cannot be loaded",
        ),
        (
            {"a.yaml": yaml.safe_dump({**CHOICE_TASK, "test_split": "nosuch"}), "data/choice.jsonl": "{}\n"},
            "task 'tiny_choice' cannot be loaded",
        ),
        ({"a.yaml": yaml.safe_dump(CHOICE_TASK), "data/choice.jsonl": "{bad"}, "task 'tiny_choice' cannot be loaded"),
        ({"a.yaml": "task: [unclosed"}, "a.yaml cannot be read"),
    ],
)  # fmt: skip
def test_bad_task_folders(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "data").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=message):
        evaluate(tmp_path / "no model", ["tiny_choice"], include=tmp_path)


def test_missing_folder_no_tasks_and_bad_limit(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not exist"):
        evaluate(checkpoint, ["x"], include=tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match="no tasks are given"):
        evaluate(checkpoint, [])
    with pytest.raises(EvaluationError, match="limit is 0"):
        evaluate(checkpoint, ["x"], limit=0)


def test_chat_template_that_doubles_bos_is_refused(tmp_path: Path, folder: Path) -> None:
    checkpoint = make_model(tmp_path, "llama")
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    with pytest.raises(ModelError, match="BOS"):
        evaluate(checkpoint, ["tiny_sum"], include=folder)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        evaluate(checkpoint, ["tiny_sum"], include=folder)
