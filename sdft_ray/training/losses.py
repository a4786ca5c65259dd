"""The loss of a micro-batch over its response tokens. The logits of a whole batch never exist at once.

Suffixes: B rows, T tokens of a row, D hidden channels, N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdft_ray.recipe.arms import Objective
from sdft_ray.training.head import head_loss
from sdft_ray.training.objective import (
    Sums,
    TeacherOutputs,
    block_outputs,
    chunk_loss,
    match_loss,
    softcap_of,
)

CROSS_ENTROPY = Objective()


class Teacher:
    """A frozen model beside the student, and which of its blocks stand for which of the student's.

    `block_map[i]` is the teacher block whose output student block i should reproduce (`objective.mapped_blocks`);
    only objectives that match hidden states need it.
    """

    def __init__(self, model: Any, block_map: Sequence[int] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self._block_map = block_map

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Any], index_N: torch.Tensor, *, with_blocks: bool) -> TeacherOutputs:
        """For the positions `index_N` of the flattened micro-batch."""
        with block_outputs(self.model, self._block_map if with_blocks else ()) as blocks:
            hidden_BTD = self.model.get_decoder()(**inputs).last_hidden_state
        return TeacherOutputs(
            _at(hidden_BTD, index_N),
            self.model.get_output_embeddings(),
            softcap_of(self.model),
            [_at(block_BTD, index_N) for block_BTD in blocks],
        )


def response_loss(
    model: Any,
    inputs: dict[str, Any],
    loss_mask_BT: torch.Tensor,
    *,
    objective: Objective = CROSS_ENTROPY,
    teacher: Teacher | None = None,
    cached: TeacherOutputs | None = None,
    sums: Sums | None = None,
    max_logits: int | None = None,
) -> torch.Tensor:
    """Sum of the objective over response tokens, in nats for all but hidden states: a float32 scalar.

    `inputs` comes from `sdft_ray.data.packing.attention_inputs`; `loss_mask_BT` marks the tokens to predict
    (never the first of a document). The head runs on those positions alone, in chunks of at most
    `max_logits` logits. Divide by the number of response tokens of the *whole* step to get a mean that does not
    depend on the split into micro-batches. Each term's own sum is added to `sums`. `cached` is what generation kept
    of the teacher for these tokens (`training.cached`), for objectives that read it.
    """
    sums = {} if sums is None else sums
    assert teacher is not None or not objective.needs_teacher, "this objective needs a teacher"
    assert cached is not None or not objective.cached, "this objective reads cached signals"
    index_N = _positions(loss_mask_BT)
    student_blocks = range(model.config.get_text_config().num_hidden_layers) if objective.matches else ()
    with block_outputs(model, student_blocks) as blocks:
        hidden_ND = _at(model.get_decoder()(**inputs).last_hidden_state, index_N)
    targets_N = inputs["input_ids"].reshape(-1).index_select(0, index_N + 1)
    outputs = cached
    if teacher is not None and objective.needs_teacher:
        outputs = teacher.outputs(inputs, index_N, with_blocks=bool(objective.matches))
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    if objective.cross_entropy or objective.divergences:
        loss_of = chunk_loss(objective, targets_N, outputs, sums, softcap_of(model))
        total = total + head_loss(hidden_ND, model.get_output_embeddings(), loss_of, max_logits=max_logits)
    if objective.matches and outputs is not None:
        total = total + match_loss(objective, [_at(block, index_N) for block in blocks], outputs.blocks, sums)
    return total


def _positions(loss_mask_BT: torch.Tensor) -> torch.Tensor:
    """Where in the flattened batch the tokens stand that predict a marked one."""
    before_BT = torch.zeros_like(loss_mask_BT)
    before_BT[:, :-1] = loss_mask_BT[:, 1:]
    return before_BT.reshape(-1).nonzero().squeeze(1)


def _at(values_BTD: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    return values_BTD.reshape(-1, values_BTD.shape[-1]).index_select(0, index_N)
