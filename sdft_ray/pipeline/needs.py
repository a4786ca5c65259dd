"""The memory that each step of a recipe needs, from the shapes of its models, lengths of rows, and resources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sdft_ray.models.description import UNLIMITED_TOKENS
from sdft_ray.models.families import Config
from sdft_ray.models.precision import AUTO, expected_precision
from sdft_ray.pipeline.lengths import Lengths
from sdft_ray.planning.engines import Work, transformers_need, vllm_need
from sdft_ray.planning.need import HARNESS_PROCESS, TEXT_PROCESS, Need
from sdft_ray.planning.passes import checkpoint_need, gap_need, measure_need, patch_need, speed_need
from sdft_ray.planning.shape import ModelShape, dtype_bytes
from sdft_ray.planning.training import Training, worker_need
from sdft_ray.recipe.arms import Lora
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Engine, Evaluate, Generate, Resources, Train
from sdft_ray.stages.graph import Step
from sdft_ray.stages.views import train_view, trial_view

LONGEST_ITEM_TOKENS = 2048
"""What an item of an evaluation is taken to have at most, where its tokens are scored: MMLU with five examples. Longer
ones take more memory than planned: 9 bytes x vocabulary for each token in float32."""

SHORTEST_CONTEXT = 1024
"""Tokens; a context is not made shorter than this to fit."""


@dataclass(frozen=True)
class Situation:
    """A recipe, its teacher's config, the shapes of the teacher (`whole`) and of the model after each pruning, and
    lengths of its rows.
    """

    recipe: Recipe
    config: Config
    whole: ModelShape
    pruned: Mapping[str, ModelShape]
    lengths: Lengths

    @property
    def most_tokens(self) -> int:
        """The context of the model; of one that names none, what its rows need is not known: a usual size."""
        context = self.whole.context_tokens
        return 4 * SHORTEST_CONTEXT if context >= UNLIMITED_TOKENS else context

    @property
    def element(self) -> int:
        """Bytes of a weight of the teacher."""
        return dtype_bytes(self.recipe.teacher.dtype, self.whole)

    def engine_element(self, settings: Engine) -> int:
        """Bytes of a weight, a key or a value in an engine; the more of two where its data type is not known yet."""
        wanted = self.recipe.teacher.dtype
        dtype = expected_precision(settings.dtype, self.config, wanted, kv_cache_bytes=0, gpus=settings.gpus).dtype
        return 4 if dtype == AUTO and not settings.gpus else dtype_bytes(dtype, self.whole)

    def token_kv_bytes(self, settings: Engine) -> int:
        """Bytes of keys and values of one token in an engine over the teacher."""
        return self.whole.kv_bytes(self.engine_element(settings))

    def with_recipe(self, recipe: Recipe) -> Situation:
        return replace(self, recipe=recipe)

    def with_row_tokens(self, row_tokens: int) -> Situation:
        train = self.recipe.train.model_copy(update={"max_seq_len": row_tokens, "tokens_per_step": None})
        return self.with_recipe(self.recipe.model_copy(update={"train": train}))

    def with_lora(self, lora: Lora) -> Situation:
        train = self.recipe.train.model_copy(update={"lora": lora, "train_last_n_layers": None})
        return self.with_recipe(self.recipe.model_copy(update={"train": train}))

    def need(self, step: Step, resources: Resources) -> Need:
        """Of one step, at its peak."""
        part, on_gpu = self.recipe.for_pruning(step.subject), bool(resources.measure.gpus)
        match step.stage:
            case "measure":
                return measure_need(
                    self.whole,
                    self.element,
                    batch_tokens=resources.measure.batch_tokens,
                    max_tokens=self.recipe.calibration.max_tokens,
                    losses="drops" in step.slice,
                    channels=bool(step.slice.get("channels")),
                    num_tasks=resources.measure.num_tasks,
                    on_gpu=on_gpu,
                )
            case "patch":
                removed = self.whole.num_blocks - self.pruned_by(step.subject).num_blocks
                batch_tokens = resources.measure.batch_tokens
                return patch_need(self.whole, self.element, num_gaps=removed, batch_tokens=batch_tokens, on_gpu=on_gpu)
            case "prune" | "merge":
                return checkpoint_need(self.pruned_by(step.subject), self.element)
            case "gap" | "forget" | "likeness":
                longest = min(self.recipe.train.max_seq_len, self.whole.context_tokens)
                if self.lengths.prompt_tokens is not None:
                    longest = min(longest, self.lengths.prompt_tokens)
                settings = resources.gap
                return gap_need(
                    self.whole,
                    self.element,
                    batch_tokens=settings.batch_tokens,
                    longest_tokens=longest,
                    compared=step.stage == "forget" and "model" in step.inputs,
                    on_gpu=bool(settings.gpus),
                )
            case "speed" | "rate":
                asked = part.speed
                return speed_need(
                    (self.whole, self.pruned_by(step.subject)),
                    self.element,
                    batch_rows=asked.largest_batch,
                    prompt_tokens=asked.prompt_tokens,
                    new_tokens=asked.new_tokens,
                    on_gpu=bool(resources.speed.gpus),
                )
            case "train" | "correct":
                return self.train_need(step, resources.train)
            case "generate":
                return self.engine_need(resources.generate, "generate")
            case "evaluate" | "why":
                return self.engine_need(resources.evaluate, step.stage)
            case _:
                return Need({"process": TEXT_PROCESS})

    def train_need(self, step: Step, settings: Train) -> Need:
        work = training_of(self, step)
        return worker_need(work, settings, num_workers=settings.min_workers, micro_batch_rows=settings.micro_batch_rows)

    def engine_need(self, settings: Generate | Evaluate, stage: str) -> Need:
        """Of all engines that run side by side; with them the harness, where one asks."""
        if settings.sampler in ("server", "scripted"):
            return Need({"process": TEXT_PROCESS})
        context = min(settings.context_tokens or self.whole.context_tokens, self.whole.context_tokens)
        if isinstance(settings, Generate):
            count, asked = settings.max_actors, self.recipe.generate
            prompt = self.lengths.prompt_tokens or max(1, context - asked.max_tokens)
            rows = self.lengths.num_rows
            sequences = settings.max_sequences if rows is None else min(settings.max_sequences, rows)
            all_tokens = None if rows is None else rows * (prompt + asked.max_tokens)
            work = Work(sequences, prompt, asked.max_tokens, 0, all_tokens, samples=asked.temperature > 0)
        else:
            count = settings.num_actors
            item = min(context, LONGEST_ITEM_TOKENS)
            work = Work(settings.max_sequences, item // 2, 0, item)
        on_gpu, element = bool(settings.gpus), self.engine_element(settings)
        if settings.sampler == "transformers":
            need = transformers_need(self.whole, element, work, on_gpu=on_gpu)
        else:
            need = vllm_need(
                self.whole,
                element,
                work,
                kv_cache_bytes=settings.kv_bytes,
                context_tokens=context,
                on_gpu=on_gpu,
            )
        terms = dict(need.terms)
        if stage == "evaluate" and not on_gpu:
            terms["harness"] = HARNESS_PROCESS // count
        return Need(terms, need.place, count)

    def pruned_by(self, subject: str) -> ModelShape:
        """The model after a pruning: after the last one for names that are none; the teacher's shape where unknown."""
        return self.pruned.get(subject, self.pruned.get("", self.whole))


def training_of(situation: Situation, step: Step) -> Training:
    """What a step of `train` or `correct` trains, with the recipe's settings as the situation has them."""
    recipe, whole = situation.recipe, situation.whole
    asked, trial = train_view(step), trial_view(step)
    row_tokens = min(asked.max_seq_len, recipe.train.max_seq_len)
    is_correction = step.stage == "correct"
    document = situation.lengths.document_tokens or row_tokens
    return Training(
        student=whole if is_correction else situation.pruned_by(step.subject),
        objective=trial.objective,
        row_tokens=row_tokens,
        document_tokens=min(document, row_tokens),
        rows_per_step=asked.step_rows,
        dtype_bytes=situation.element,
        lora=asked.lora or recipe.train.lora,
        tail_blocks=None if recipe.train.lora else asked.train_last_n_layers,
        optimizer=asked.optimizer,
        has_average=asked.ema_decay is not None,
        teacher=whole if trial.objective.needs_teacher else None,
    )
