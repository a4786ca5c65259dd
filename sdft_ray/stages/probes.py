"""Probes of a rehearsal: what stages do, on a little of a run's data, timed. Nothing is committed.

Each runs in a worker like that of its stage, because Ray's share of the CPUs sets the number of threads. `submitted` is
when the driver asked for a probe, in seconds since the epoch: starting a worker and loading a model count too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from os import devnull
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.scoring import Speed
from sdft_ray.stages.evaluate import Harness, eval_config
from sdft_ray.stages.evaluators import EngineClient
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.views import train_view, trial_view

if TYPE_CHECKING:
    from sdft_ray.evaluation.questions import Answer, Ask, Question
    from sdft_ray.evaluation.shift import ResponseNll

_NOWHERE = Path(devnull)
"""Where answers go that no later attempt needs."""
Texts = list[tuple[Mapping[str, Any], str]]
"""Rows, each with a response to it."""


@dataclass(frozen=True)
class Timed:
    """`start_s` until work began, `unit_s` for each unit of it, and how many units a run has, where the probe knows."""

    start_s: float
    unit_s: float
    num_units: int = 0


# -- measure -------------------------------------------------------------------------------------------------


def measure_probe(job: StageContext, rows: pa.Table, num_dropped: int, submitted: float, num_batches: int = 3) -> Timed:
    """Units are batches of all calibration `rows`; some, spread over them, are measured after one that warms up."""
    from sdft_ray.data.calibration import calibration_batches
    from sdft_ray.data.subset import spread
    from sdft_ray.importance.depth import measure
    from sdft_ray.importance.perplexity import drop_losses
    from sdft_ray.importance.width import watched
    from sdft_ray.models.loading import load_model

    settings = job.resources.measure
    batches = calibration_batches(
        rows,
        job.teacher.tokenizer,
        max_tokens=job.slice["max_tokens"],
        batch_tokens=settings.batch_tokens,
        chat=job.teacher.chat_settings,
    )
    model: Any = load_model(job.teacher.directory, job.teacher.dtype)
    model.to("cuda" if settings.gpus else "cpu")
    chosen = [batches[index] for index in spread(len(batches), num_batches)]
    start_s = time.time() - submitted
    measure(model, [chosen[0][:2]])
    began = time.perf_counter()
    with watched(model) if job.slice.get("channels") else nullcontext() as watch:
        measure(model, [batch[:2] for batch in chosen], watch=watch)
    unit_s = (time.perf_counter() - began) / len(chosen)
    if num_dropped:
        began = time.perf_counter()
        drop_losses(model, [chosen[len(chosen) // 2]], num_dropped)
        unit_s += time.perf_counter() - began
    return Timed(start_s, unit_s, len(batches))


# -- gap -----------------------------------------------------------------------------------------------------


def nll_probe(job: StageContext, texts: Texts, submitted: float) -> tuple[list[ResponseNll], Timed]:
    """How likely the teacher finds responses. Units are tokens of documents."""
    from sdft_ray.data.messages import row_prompt
    from sdft_ray.evaluation.shift import response_nll
    from sdft_ray.models.loading import load_model

    settings, chat = job.resources.gap, job.teacher.chat
    documents = [chat.encode(row_prompt(row), response) for row, response in texts]
    model: Any = load_model(job.teacher.directory, job.teacher.dtype)
    model.to("cuda" if settings.gpus else "cpu")
    start_s = time.time() - submitted
    began = time.perf_counter()
    found = response_nll(model, documents, batch_tokens=settings.batch_tokens)
    num_tokens = sum(len(document.ids) for document in documents)
    return found, Timed(start_s, (time.perf_counter() - began) / num_tokens, num_tokens)


# -- train ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainTimes:
    """Seconds of a worker: until training began, for a micro-batch forward and backward, and for an update."""

    start_s: float
    micro_batch_s: float
    update_s: float


def train_probe(
    job: StageContext, config: Mapping[str, Any], num_teacher_blocks: int, texts: Texts, submitted: float
) -> TrainTimes:
    """A step of one micro-batch and one of two, of a student of the planned size with random weights.

    Signals that generation would have stored are not there: such an objective is timed as plain cross-entropy.
    """
    from sdft_ray.data.documents import training_documents
    from sdft_ray.data.messages import row_prompt
    from sdft_ray.data.packing import pack
    from sdft_ray.models.loading import load_model, random_model
    from sdft_ray.recipe.arms import Objective
    from sdft_ray.stages.train import tuned
    from sdft_ray.training.loop import StepRecord, train
    from sdft_ray.training.losses import Teacher
    from sdft_ray.training.objective import mapped_blocks
    from sdft_ray.training.plan import arm_plan

    settings, asked = job.resources.train, train_view(job.step)
    device = "cuda" if settings.gpus else "cpu"
    conversations = [(row_prompt(row), response) for row, response in texts]
    rows = pack(
        training_documents(job.teacher.chat, conversations, asked.max_seq_len, "drop").documents, asked.max_seq_len
    )
    plan = replace(arm_plan(asked, job.step.label, settings, rows.num_rows), checkpoint_every=0)
    if trial_view(job.step).objective.cached:
        plan = replace(plan, objective=Objective())
    model: Any = random_model(config, job.teacher.dtype if asked.lora else "float32")
    model = tuned(model.to(device), asked, plan.seed)
    teacher = None
    if plan.objective.needs_teacher:
        unpruned: Any = load_model(job.teacher.directory, job.teacher.dtype)
        blocks = mapped_blocks(range(config["num_hidden_layers"]), num_teacher_blocks)
        teacher = Teacher(unpruned.to(device), blocks if plan.objective.matches else [])
    start_s = time.time() - submitted

    def steps(num_steps: int, micro_batches: int) -> float:
        records: list[StepRecord] = []
        now = replace(plan, num_steps=num_steps, rows_per_step=plan.micro_batch_rows * micro_batches)
        train(model, rows, now, teacher=teacher, report=records.append)
        return records[-1].wall_s

    one, two = steps(2, 1), steps(1, 2)
    micro_batch_s = min(max(two - one, one / 2), one)
    return TrainTimes(start_s, micro_batch_s, one - micro_batch_s)


# -- speed ---------------------------------------------------------------------------------------------------


def speed_probe(job: StageContext, asked: Speed, submitted: float, num_tokens: int = 8) -> Timed:
    """The teacher alone, a few new tokens of each batch. Units are rounds."""
    from sdft_ray.evaluation.speed import measure_speed

    figures = measure_speed(
        {"teacher": job.teacher.directory},
        batch_rows=asked.batches,
        prompt_tokens=asked.prompt_tokens,
        new_tokens=min(num_tokens, asked.new_tokens),
        rounds=1,
        dtype=job.teacher.dtype,
        device="cuda" if job.resources.speed.gpus else "cpu",
    )["teacher"]
    round_s = sum(
        batch.batch_rows * asked.prompt_tokens / batch.prefill.median
        + batch.batch_rows * (asked.new_tokens - 1) / batch.decode.median
        for batch in figures.batches
    )
    return Timed(max(0.0, time.time() - submitted - 2 * round_s * num_tokens / asked.new_tokens), round_s)


# -- evaluate ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskTime:
    """Seconds that a task takes before its questions are asked, seconds for an item, and how many items a run asks."""

    task: str
    start_s: float
    item_s: float
    num_items: int


class TimedHarness(Harness):
    """Asks a few items of every task, and counts all."""

    def open(self, job: StageContext, engines: list[Any], submitted: float) -> tuple[float, float]:
        """Seconds until every engine has answered a question, and until it has one of another model."""
        _ask_all(job, engines)
        start_s = time.time() - submitted
        began = time.perf_counter()
        # The same files by another path are another model to an engine.
        again = ModelSource(directory=f"{job.teacher.directory}/.")
        _ask_all(replace(job, teacher=replace(job.teacher, source=again)), engines)
        return start_s, time.perf_counter() - began

    def time(self, job: StageContext, engines: list[Any], num_items: int) -> list[TaskTime]:
        """Tasks one after another; a run asks all at once, which is a little faster."""
        from sdft_ray.evaluation.harness import evaluate
        from sdft_ray.evaluation.tasks import leaf_tasks, load_tasks

        config, found = eval_config(job), []
        for name in config.tasks:
            began = time.perf_counter()
            leaves = leaf_tasks(load_tasks([name], config.places, config.shots)[name])
            limit = config.limit_of(name)
            sizes = [len(leaf.eval_docs) if limit is None else min(limit, len(leaf.eval_docs)) for leaf in leaves]
            start_s = time.perf_counter() - began
            few = max(1, num_items // len(leaves))
            few = few if limit is None else min(few, limit)
            ask = _TimedAsk(EngineClient(job, engines, _NOWHERE))
            part = replace(config, tasks=[name], limit=few, samples=None)
            evaluate(job.teacher.directory, part, ask, max_length=job.resources.evaluate.context_tokens)
            num_asked = sum(min(few, size) for size in sizes)
            factor = 1 + (config.samples.num if config.samples and ask.writes else 0)
            found.append(TaskTime(name, start_s, factor * ask.wall_s / num_asked, sum(sizes)))
        return found


def _ask_all(job: StageContext, engines: list[Any]) -> None:
    """A question to every engine, at the same time."""
    from sdft_ray.evaluation.questions import LoglikelihoodQuestion

    ray.get([engine.answer.remote(job, [LoglikelihoodQuestion((0,), 0, (0,))]) for engine in engines])


class _TimedAsk:
    """An `Ask` that adds up how long answers take."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.wall_s = 0.0
        self.writes = False

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        from sdft_ray.evaluation.questions import GenerationQuestion

        began = time.perf_counter()
        answers = list(self._ask(questions))
        self.wall_s += time.perf_counter() - began
        self.writes = self.writes or any(isinstance(question, GenerationQuestion) for question in questions)
        return iter(answers)
