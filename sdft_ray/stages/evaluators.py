"""The pool that evaluates: actors that hold one model after another, and one that holds the harness.

They outlive the step that made them and wait for the next, because starting an engine takes longer than asking a small
model. They hold their share of the cluster while they wait: `release_idle` gives that back.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from sdft_ray.errors import EvaluationError
from sdft_ray.generation.sampler import EngineError
from sdft_ray.recipe.resources import Evaluate
from sdft_ray.stages.job import StageContext, remote_options, rss_bytes
from sdft_ray.stages.samplers import local_sampler, prepare_process
from sdft_ray.stages.spec import HARNESS_CPUS

if TYPE_CHECKING:
    from sdft_ray.evaluation.questions import Answer, Question
    from sdft_ray.generation.sampler import LocalSampler

CHUNK = 64
"""Questions that travel together."""
_IN_FLIGHT = 3
"""Chunks that one actor works on, so that its engine always has some to go on with."""

_idle: dict[str, list[WorkerPool]] = {}
_num_busy: Counter[str] = Counter()
_idle_lock = threading.Lock()


class Evaluator:
    """Answers questions to the model of a job, which it loads when it holds another."""

    def __init__(self) -> None:
        prepare_process()
        self._turn = threading.Lock()
        self._holds = ""
        self._sampler: LocalSampler | None = None
        self._has_answered = False

    def answer(self, job: StageContext, questions: list[Question]) -> tuple[list[Answer], int, dict[str, str]]:
        """Answers in order, the memory that this process takes, in bytes, and what runs the model."""
        try:
            sampler = self._sampler_of(job)
            found = dict(answers(sampler, questions))
        except EngineError:
            if not self._has_answered:
                raise  # it would die of the same thing again
            traceback.print_exc()
            os._exit(1)  # Ray starts the actor anew only when its process is gone
        self._has_answered = True
        return [found[index] for index in range(len(questions))], rss_bytes(), sampler.engine

    def _sampler_of(self, job: StageContext) -> LocalSampler:
        model = f"{job.inputs.get('model', repr(job.teacher.source))} in {job.teacher.dtype}"
        with self._turn:
            if self._sampler is None or self._holds != model:
                if self._sampler is not None:
                    self._sampler.close()
                    self._sampler = None
                job.phase("loading the engine")
                self._sampler = open_sampler(job, job.model("model"))
                job.phase("asking the first questions")
                self._holds = model
            return self._sampler


def open_sampler(job: StageContext, model_dir: Path) -> LocalSampler:
    """An engine over a checkpoint, as the resources of evaluation ask for it."""
    settings = job.resources.evaluate
    return local_sampler(model_dir, settings.sampler, settings, job.teacher.dtype)


def answers(sampler: LocalSampler, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
    """Ask a sampler in this process: an `Ask` of `evaluation.questions`. Raises `EvaluationError`."""
    from sdft_ray.evaluation.questions import Likelihoods, LoglikelihoodQuestion, Text, repetition
    from sdft_ray.generation.sampler import Sampled, SamplingParams
    from sdft_ray.generation.scoring import ScoreRequest

    places = {}
    for index, question in enumerate(questions):
        if isinstance(question, LoglikelihoodQuestion):
            asked: Any = sampler.submit_score(ScoreRequest(question.ids, question.num_scored, question.finals))
        else:
            params = SamplingParams(
                temperature=question.temperature,
                top_p=question.top_p,
                top_k=question.top_k,
                max_tokens=question.max_tokens,
                stop=question.stop,
            )
            asked = sampler.submit_ids(question.ids, params, question.seed)
        places[asked] = index
    for future in as_completed(places):
        given = future.result()
        if not isinstance(given, Sampled):
            yield places[future], Likelihoods(given.finals)
            continue
        if given.finish_reason == "error":
            raise EvaluationError(
                f"a question cannot be answered: {given.error}",
                "if the prompt is too long, raise evaluate.max_model_tokens in the resources file",
            )
        ids = given.token_ids
        yield places[future], Text(given.text, len(ids), given.finish_reason == "length", repetition(ids))


class EngineClient:
    """An `Ask` over actors.

    Answers are appended to a file as they come, so that an interrupted step resumes where it stopped.
    """

    def __init__(self, job: StageContext, actors: Sequence[Any], path: Path) -> None:
        self.peak_rss_bytes = 0
        self.num_reused = 0
        self.engines: list[dict[str, str]] = []
        """What answered, each once."""
        self._job = job
        self._actors = actors
        self._path = path

    def __call__(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """See `evaluation.questions.Ask`. Equal questions are asked once."""
        from sdft_ray.evaluation.questions import answer_to_json, key_of

        known = self._known()
        places: dict[str, list[int]] = {}
        for index, question in enumerate(questions):
            places.setdefault(key_of(question), []).append(index)
        for key in places.keys() & known.keys():
            self.num_reused += len(places[key])
            yield from ((index, known[key]) for index in places[key])
        left = [key for key in places if key not in known]
        left.sort(key=lambda key: -len(questions[places[key][0]].ids))  # rows of like length waste the least padding
        with self._path.open("a", encoding="utf-8") as kept:
            for keys, found in self._asked(left, {key: questions[places[key][0]] for key in left}):
                for key, answer in zip(keys, found, strict=True):
                    kept.write(json.dumps([key, answer_to_json(answer)]) + "\n")
                    yield from ((index, answer) for index in places[key])
                kept.flush()

    def _known(self) -> dict[str, Answer]:
        """What earlier attempts were answered; a torn last line is asked again."""
        from sdft_ray.evaluation.questions import answer_from_json

        known: dict[str, Answer] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    key, answer = json.loads(line)
                    known[key] = answer_from_json(answer)
        return known

    def _asked(self, keys: Sequence[str], by_key: dict[str, Question]) -> Iterator[tuple[list[str], list[Answer]]]:
        """Chunks go to whoever has room; the longest rows first, so that nobody ends late with one of them."""
        size = max(1, min(CHUNK, -(-len(keys) // (_IN_FLIGHT * len(self._actors)))))
        chunks = [list(keys[start : start + size]) for start in range(0, len(keys), size)][::-1]
        running: dict[Any, tuple[Any, list[str]]] = {}
        job = ray.put(self._job)
        free = list(self._actors) * _IN_FLIGHT
        while chunks or running:
            while chunks and free:
                actor, chunk = free.pop(), chunks.pop()
                running[actor.answer.remote(job, [by_key[key] for key in chunk])] = actor, chunk
            for done in ray.wait(list(running), num_returns=1)[0]:
                actor, chunk = running.pop(done)
                free.append(actor)
                found, rss, engine = ray.get(done)
                self.peak_rss_bytes = max(self.peak_rss_bytes, rss)
                if engine not in self.engines:
                    self.engines.append(engine)
                yield chunk, found


@dataclass(frozen=True)
class WorkerPool:
    """Who evaluates one model at a time: an actor that holds the harness, and engines that answer it."""

    harness: Any
    engines: list[Any]


@contextlib.contextmanager
def acquire(settings: Evaluate, harness: type) -> Iterator[WorkerPool]:
    """A crew as the resources ask for it, an idle one if there is; after an error it is not used again."""
    kind = settings.model_dump_json()
    with _idle_lock:
        idle = _idle.setdefault(kind, [])
        crew = idle.pop() if idle else None
        _num_busy[kind] += 1
    is_sound = False
    try:
        crew = crew or _new_crew(settings, harness)
        yield crew
        is_sound = True
    finally:
        with _idle_lock:
            _num_busy[kind] -= 1
            if crew and is_sound:
                _idle.setdefault(kind, []).append(crew)
        if crew and not is_sound:
            _end(crew)


def _new_crew(settings: Evaluate, harness: type) -> WorkerPool:
    lasting = {"max_restarts": 3, "max_task_retries": 3}
    engine = ray.remote(Evaluator).options(**remote_options(settings), **lasting, max_concurrency=_IN_FLIGHT)
    engines = [engine.remote() for _ in range(settings.num_actors)]
    return WorkerPool(ray.remote(harness).options(num_cpus=HARNESS_CPUS, **lasting).remote(), engines)


def release_idle(settings: Evaluate | None = None, num_steps: int = 0) -> None:
    """End the crews that wait for work, but those that evaluations under way take: `num_steps`, with `settings`."""
    with _idle_lock:
        kept = {kind: crews[_num_spare(kind, settings, num_steps) :] for kind, crews in _idle.items()}
        ended = [crew for kind, crews in _idle.items() for crew in crews[: len(crews) - len(kept[kind])]]
        _idle.update(kept)
    for crew in ended:
        _end(crew)


def idle_resources(settings: Evaluate | None = None, num_steps: int = 0) -> tuple[float, float]:
    """CPUs and GPUs that waiting crews hold, but those that evaluations under way take; see `release_idle`."""
    with _idle_lock:
        waiting = [(Evaluate.model_validate_json(kind), _num_spare(kind, settings, num_steps)) for kind in _idle]
    return (
        sum((kind.cpus * kind.num_actors + HARNESS_CPUS) * count for kind, count in waiting),
        sum(kind.gpus * kind.num_actors * count for kind, count in waiting),
    )


def num_idle(settings: Evaluate | None = None, num_steps: int = 0) -> int:
    """Crews that wait for work, but those that evaluations under way take; see `release_idle`."""
    with _idle_lock:
        return sum(_num_spare(kind, settings, num_steps) for kind in _idle)


def _num_spare(kind: str, settings: Evaluate | None, num_steps: int) -> int:
    """Steps that are admitted but have no crew yet take waiting ones first."""
    is_theirs = settings is not None and kind == settings.model_dump_json()
    num_taken = max(0, num_steps - _num_busy[kind]) if is_theirs else 0
    return max(0, len(_idle[kind]) - num_taken)


def _end(crew: WorkerPool) -> None:
    if not ray.is_initialized():
        return  # they went with it; any call would start another Ray
    for actor in (crew.harness, *crew.engines):
        ray.kill(actor)
