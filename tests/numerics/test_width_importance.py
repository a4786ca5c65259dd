"""Activity of channels against the formula written out with transformers' own modules, sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.errors import DataError, ModelError
from sdft_ray.importance.width import SPACES, WidthMoments, watched
from tests.support.tiny import FAMILIES, build_model

LENGTHS = (13, 5, 21, 1, 20)
GEMMA = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
NORMS = {"gemma2": GEMMA, "gemma3_text": GEMMA}


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (length,), generator=generator) for length in LENGTHS]


def moments_of(model: Any, rows: list[torch.Tensor]) -> WidthMoments:
    """All rows in one padded batch."""
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = ids
    with torch.no_grad(), watched(model) as watch:
        watch.start(torch.tensor([len(ids) for ids in rows]))
        model(input_ids=ids_BT, use_cache=False)
    return watch.moments


def seen_alone(model: Any, ids_T: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Space -> the activations of one sequence without padding, (T, channels) for each block or norm."""
    seen: dict[str, list[torch.Tensor]] = {"mlp": [], "attention": [], "hidden": []}
    handles = []

    def keep(name: str, module: Any, *, output: bool) -> None:
        if output:
            handles.append(module.register_forward_hook(lambda _, __, out: seen[name].append(out[0].double())))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, args: seen[name].append(args[0][0].double())))

    for layer in model.model.layers:
        keep("mlp", layer.mlp.down_proj, output=False)
        keep("attention", layer.self_attn.o_proj, output=False)
        for name in NORMS.get(model.config.model_type, ("input_layernorm", "post_attention_layernorm")):
            keep("hidden", getattr(layer, name), output=True)
    keep("hidden", model.model.norm, output=True)
    with torch.no_grad():
        model(input_ids=ids_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def of_tokens(values_TC: torch.Tensor, over_tokens: str) -> torch.Tensor:
    return values_TC.abs().mean(0) if over_tokens == "mean" else values_TC.square().mean(0).sqrt()


@pytest.mark.parametrize("over_sequences", ["mean", "l2"])
@pytest.mark.parametrize("over_tokens", ["mean", "l2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_formula(family: str, over_tokens: Any, over_sequences: Any) -> None:
    """score_c = (sum_b a_bc^2)^(1/2), a_bc = mean_s |A_sbc| (arXiv:2407.14679, section 2.2), and its variants."""
    model: Any = build_model(family)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    alone = [seen_alone(model, ids) for ids in sequences()]

    def expected(space: str, part: int) -> torch.Tensor:
        rows = []
        for seen in alone:
            if space in ("mlp", "hidden"):
                values_TC = seen[space][part]
            else:
                members = config.num_attention_heads if space == "heads" else config.num_key_value_heads
                assert seen["attention"][part].shape[1] == config.num_attention_heads * head_dim
                values_TC = seen["attention"][part].unflatten(1, (members, -1)).norm(dim=2)
            rows.append(of_tokens(values_TC, over_tokens))
        a_BC = torch.stack(rows)
        return a_BC.mean(0) if over_sequences == "mean" else a_BC.square().sum(0).sqrt()

    moments = moments_of(model, sequences())
    assert moments.num_sequences == len(LENGTHS)
    for space in SPACES:
        scores = moments.scores(space, over_tokens, over_sequences)
        if space == "hidden":
            naive = sum(expected(space, part) for part in range(len(alone[0]["hidden"])))
            assert scores.shape == (config.hidden_size,)
        else:
            naive = torch.stack([expected(space, part) for part in range(config.num_hidden_layers)])
        np.testing.assert_allclose(scores, np.asarray(naive), rtol=1e-4, atol=1e-6)


def test_parts_merge_to_the_whole() -> None:
    model: Any = build_model("qwen3")
    rows = sequences()
    whole = moments_of(model, rows)
    merged = moments_of(model, rows[:2]) + moments_of(model, rows[2:])
    assert merged.num_sequences == whole.num_sequences
    for space in SPACES:
        np.testing.assert_allclose(merged.scores(space), whole.scores(space), rtol=1e-5)
    with pytest.raises(ModelError, match="different shape"):
        _ = whole + moments_of(build_model("qwen3", num_blocks=2), rows)


def test_silent_channels_score_nothing_and_loud_ones_most() -> None:
    model: Any = build_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = 0
        model.model.layers[2].mlp.up_proj.weight[9] *= 50
        model.model.layers[0].self_attn.v_proj.weight[:8] = 0  # group 0, so heads 0 and 1
    moments = moments_of(model, sequences())
    assert moments.scores("mlp")[1, 7] == 0
    assert moments.scores("mlp")[2].argmax() == 9
    assert moments.scores("kv_groups")[0, 0] == 0
    assert moments.scores("heads")[0].tolist()[:2] == [0, 0]
    assert moments.scores("heads")[0, 2:].min() > 0


def test_what_cannot_be_scored_is_said() -> None:
    model: Any = build_model("llama")
    with watched(model) as watch:
        pass
    with pytest.raises(DataError, match="nothing was measured"):
        watch.moments.scores("mlp")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[:] = torch.inf
    with pytest.raises(ModelError, match="activations of mlp are not finite in place 2"):
        moments_of(model, sequences())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
