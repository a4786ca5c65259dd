"""Losses of a micro-batch against the logits and hidden states of transformers, summed token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, attention_inputs, pack
from sdft_ray.recipe.arms import Objective
from sdft_ray.training.losses import Teacher, response_loss
from sdft_ray.training.objective import block_outputs, mapped_blocks, match_loss
from tests.support.tiny import build_model


@pytest.fixture
def rows() -> PackedRows:
    lengths = [11, 7, 6, 5, 3]
    return pack([Document([(7 * n + i) % 128 for i in range(n)], [i >= n // 2 for i in range(n)]) for n in lengths], 16)


def naive_loss(model: Any, rows: PackedRows) -> torch.Tensor:
    """Each document alone, each marked token's -ln p from the full logits."""
    total = torch.zeros(())
    for document in rows.documents():
        log_probs_TV = model(input_ids=torch.tensor([document.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(document.ids)):
            if document.loss_mask[t]:
                total = total - log_probs_TV[t - 1, document.ids[t]]
    return total


def packed_loss(model: Any, rows: PackedRows, **kwargs: Any) -> torch.Tensor:
    inputs = attention_inputs(rows, range(rows.num_rows))
    return response_loss(model, inputs, torch.from_numpy(rows.loss_mask_NT), **kwargs)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gemma2", True)])
@pytest.mark.parametrize("max_logits", [2**25, 3 * 128])  # all at once; three tokens at a time
def test_loss_and_gradient_equal_the_naive_sum(family: str, tied: bool, max_logits: int, rows: PackedRows):
    softcap: dict[str, Any] = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    model: Any = build_model(family, num_blocks=2, tied=tied, **softcap)
    expected, found = naive_loss(model, rows), packed_loss(model, rows, max_logits=max_logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted, got = gradients(model, expected), gradients(model, found)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_only_marked_tokens_count(rows: PackedRows):
    model: Any = build_model("llama", num_blocks=2)
    inputs = attention_inputs(rows, range(rows.num_rows))
    nothing = torch.zeros(rows.loss_mask_NT.shape, dtype=torch.bool)
    assert response_loss(model, inputs, nothing).item() == 0.0
    row, token = (int(x) for x in torch.from_numpy(rows.loss_mask_NT).nonzero()[0])
    one = nothing.clone()
    one[row, token] = True
    log_probs_NTV = model(**inputs).logits.log_softmax(-1)
    expected = -log_probs_NTV[row, token - 1, int(rows.input_ids_NT[row, token])]
    torch.testing.assert_close(response_loss(model, inputs, one), expected)


def documents_of(rows: PackedRows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each document's ids (1, T), and the positions whose next token counts."""
    return [
        (torch.tensor([d.ids]), torch.tensor([t - 1 for t in range(1, len(d.ids)) if d.loss_mask[t]], dtype=torch.long))
        for d in rows.documents()
    ]


@pytest.mark.parametrize("max_logits", [2**25, 3 * 128])
def test_divergences_from_a_teacher_beside_it(max_logits: int, rows: PackedRows):
    student: Any = build_model("llama", num_blocks=2, seed=1)
    teacher: Any = build_model("gemma2", num_blocks=3, seed=2, final_logit_softcapping=3.0, vocab_size=160)
    objective = Objective(cross_entropy=0.5, forward_kl=1.0, reverse_kl=2.0, jensen_shannon=3.0, temperature=2.0)
    expected = {"forward_kl": 0.0, "reverse_kl": 0.0, "jensen_shannon": 0.0}
    for ids_1T, index in documents_of(rows):
        p, q = ((m(input_ids=ids_1T).logits[0, index, :128].double() / 2).softmax(-1) for m in (teacher, student))
        mixture = (p + q) / 2
        expected["forward_kl"] += 4 * (p * (p / q).log()).sum().item()
        expected["reverse_kl"] += 4 * (q * (q / p).log()).sum().item()
        expected["jensen_shannon"] += 2 * ((p * (p / mixture).log()).sum() + (q * (q / mixture).log()).sum()).item()
    sums: dict[str, torch.Tensor] = {}
    loss = packed_loss(student, rows, objective=objective, teacher=Teacher(teacher), sums=sums, max_logits=max_logits)
    assert list(sums) == list(objective.terms)
    expected["cross_entropy"] = naive_loss(student, rows).item()
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value, rel=1e-4), name
    assert loss.item() == pytest.approx(sum(getattr(objective, n) * v for n, v in expected.items()), rel=1e-4)
    wanted = gradients(student, packed_loss(student, rows, objective=objective, teacher=Teacher(teacher)))
    for name, gradient in gradients(student, loss).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def test_hidden_states_of_mapped_blocks(rows: PackedRows):
    student: Any = build_model("llama", num_blocks=3, seed=1)
    teacher: Any = build_model("llama", num_blocks=6, seed=2)
    block_map = mapped_blocks([0, 1, 4], 6)
    expected = {"hidden_cosine": 0.0, "hidden_mse": 0.0}
    for ids_1T, index in documents_of(rows):
        ours, theirs = (m.model(input_ids=ids_1T, output_hidden_states=True).hidden_states for m in (student, teacher))
        for block, other in list(enumerate(block_map))[:-1]:  # transformers shows the last one after the final norm
            a, b = ours[block + 1][0, index].double(), theirs[other + 1][0, index].double()
            cosines = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
            expected["hidden_cosine"] += (1 - cosines).sum().item() / 2
            expected["hidden_mse"] += (a - b).square().mean(-1).sum().item() / 2
    inputs = attention_inputs(rows, range(rows.num_rows))
    row_N, token_N = torch.from_numpy(rows.loss_mask_NT)[:, 1:].nonzero().T
    sides = []
    for model, blocks in ((student, [0, 1]), (teacher, block_map[:2])):
        with torch.no_grad(), block_outputs(model, blocks) as outputs:
            model.model(**inputs)
        sides.append([output_BTD[row_N, token_N] for output_BTD in outputs])
    sums: dict[str, torch.Tensor] = {}
    match_loss(Objective(hidden_cosine=1.0, hidden_mse=1.0), sides[0], sides[1], sums)
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value, rel=1e-4), name


def test_hidden_states_that_are_close():
    """1 - cosine is 5e-9 a token here: less than the rounding of a float32 that is about 1."""
    teacher_ND = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    student_ND = teacher_ND * (1 + 1e-4 * torch.randn(1000, 64, generator=torch.Generator().manual_seed(1)))
    sums: dict[str, torch.Tensor] = {}
    loss = match_loss(Objective(hidden_cosine=1.0), [student_ND.requires_grad_()], [teacher_ND], sums)
    a, b = student_ND.detach().double(), teacher_ND.double()
    expected = (1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert sums["hidden_cosine"].item() == pytest.approx(expected, rel=1e-6)


def test_a_student_that_is_its_teacher_loses_nothing(rows: PackedRows):
    model: Any = build_model("llama", num_blocks=2)
    names = ("forward_kl", "reverse_kl", "jensen_shannon", "hidden_cosine", "hidden_mse")
    objective = Objective(cross_entropy=0.0, **dict.fromkeys(names, 1.0))
    teacher = Teacher(build_model("llama", num_blocks=2), mapped_blocks([0, 1], 2))
    sums: dict[str, torch.Tensor] = {}
    packed_loss(model, rows, objective=objective, teacher=teacher, sums=sums)
    assert set(sums) == set(names)
    for name, value in sums.items():
        assert abs(value.item()) < 1e-3, name
