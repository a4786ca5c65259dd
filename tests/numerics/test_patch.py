"""The patch at the cut against least squares written out on activations that transformers returns, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sdft_ray.errors import DataError, ModelError, PlanError
from sdft_ray.importance.patch import (
    BlockGap,
    FittedPatch,
    PatchMoments,
    check_patchable,
    measure,
    patch_gaps,
    patched_tensors,
)
from sdft_ray.models.channels import WHOLE, Channels
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.families import FAMILIES
from sdft_ray.models.loading import load_model
from sdft_ray.models.replace import write_with
from sdft_ray.models.surgery import prune_checkpoint
from tests.support import tiny

pytestmark = pytest.mark.slow

LENGTHS = (13, 5, 21, 1, 20, 17, 30)
HIDDEN = tuple(channel for channel in range(32) if channel % 8 != 3)
NARROW = Channels(
    hidden=HIDDEN,
    mlp=(tuple(range(0, 64, 2)), tuple(range(32)), tuple(range(20, 52))),
    kv_groups=((0,), (1,), (1,)),
)


class Cut(NamedTuple):
    """Two models and what lies between them."""

    source: Any
    pruned: Any
    keep_blocks: tuple[int, ...]
    hidden: tuple[int, ...] | None
    directory: Path

    def measure(self, batches: list[tuple[torch.Tensor, torch.Tensor]], **options: Any) -> PatchMoments:
        return measure(self.source, self.pruned, batches, self.keep_blocks, self.hidden, **options)


def make_cut(
    folder: Path, keep_blocks: tuple[int, ...], channels: Channels = WHOLE, family: str = "llama", **overrides: Any
) -> Cut:
    source = tiny.make_model(folder / "source", family, **{"num_blocks": 6, "tied": False, **overrides})
    prune_checkpoint(source, folder / "pruned", keep_blocks, channels, max_shard_bytes=60_000)
    models = load_model(source, "float32"), load_model(folder / "pruned", "float32")
    return Cut(*models, keep_blocks, channels.hidden, folder / "pruned")


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (length,), generator=generator) for length in LENGTHS]


def batch_of(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = torch.zeros(len(documents), max(map(len, documents)), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, document in enumerate(documents):
        ids_BT[row, : len(document)] = document
        mask_BT[row, : len(document)] = 1
    return ids_BT, mask_BT


BATCHES = [batch_of(rows()[:3]), batch_of(rows()[3:])]


@torch.no_grad()
def seen_in(model: Any, modules: list[tuple[Any, bool]]) -> list[np.ndarray]:
    """All tokens of all rows, run one by one without padding: (N, D) float64 going into (False) or out of modules."""
    seen: list[list[torch.Tensor]] = [[] for _ in modules]

    def keep(place: int, value: Any) -> None:
        seen[place].append((value[0] if isinstance(value, tuple) else value)[0].double())

    handles = [
        module.register_forward_hook(
            lambda _, args, out, place=place, wanted=wanted: keep(place, out if wanted else args)
        )
        for place, (module, wanted) in enumerate(modules)
    ]
    for document in rows():
        model(input_ids=document[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts).numpy() for parts in seen]


@contextmanager
def behind_perfect_maps(cut: Cut, gaps: list[tuple[int, int]]) -> Iterator[None]:
    """After each block of the pruned model in `gaps` its stream is the source's at the boundary beside it."""
    streams: dict[int, torch.Tensor] = {}

    def ask_source(_module: Any, _arguments: Any, inputs: dict[str, Any]) -> None:
        cut.source(**inputs)

    def keep(boundary: int) -> Any:
        return lambda _module, _arguments, stream_BTD: streams.__setitem__(boundary, stream_BTD)

    def put_in(boundary: int) -> Any:
        stay = slice(None) if cut.hidden is None else list(cut.hidden)
        return lambda _module, arguments: (streams[boundary][..., stay], *arguments[1:])

    handles = [cut.pruned.register_forward_pre_hook(ask_source, with_kwargs=True)]
    for block, boundary in gaps:
        handles.append(cut.source.model.layers[boundary - 1].register_forward_hook(keep(boundary)))
        handles.append(cut.pruned.model.layers[block + 1].register_forward_pre_hook(put_in(boundary)))
    yield
    for handle in handles:
        handle.remove()


def seen_at(cut: Cut, block: int, boundary: int, *, in_source: bool = False) -> tuple[np.ndarray, ...]:
    """M, Y and S of one gap: what the MLP gives, what that is added to, and the source's stream at `boundary`.

    M and Y are those of the pruned model, or of the same block in the source.
    """
    model, place = (cut.source, cut.keep_blocks[block]) if in_source else (cut.pruned, block)
    layer = model.model.layers[place]
    mlp_ND, before_ND = seen_in(model, [(layer.mlp, True), (layer.post_attention_layernorm, False)])
    reader = [*(layer.input_layernorm for layer in cut.source.model.layers), cut.source.model.norm][boundary]
    (target_ND,) = seen_in(cut.source, [(reader, False)])
    return mlp_ND, before_ND, target_ND if cut.hidden is None else target_ND[:, list(cut.hidden)]


def least_squares(mlp_ND: np.ndarray, wanted_ND: np.ndarray, ridge: float) -> np.ndarray:
    """The T of min |M T - wanted|^2 + lambda |T - I|^2, as one overdetermined system."""
    root = (ridge * (mlp_ND**2).sum(0).mean()) ** 0.5
    eye_DD = np.eye(mlp_ND.shape[1])
    left, right = np.concatenate([mlp_ND, root * eye_DD]), np.concatenate([wanted_ND, root * eye_DD])
    return np.linalg.lstsq(left, right, rcond=None)[0]


@pytest.mark.parametrize(
    ("keep_blocks", "gaps", "channels"),
    [
        pytest.param((0, 1, 4, 5), [(1, 4)], WHOLE, id="inside"),
        pytest.param((0, 1, 2, 3), [(3, 6)], WHOLE, id="end"),
        pytest.param((1, 3, 5), [(0, 3), (1, 5)], WHOLE, id="two, and the first block"),
        pytest.param((0, 2, 4), [(0, 2), (1, 4), (2, 6)], NARROW, id="three, narrower"),
    ],
)
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_against_least_squares(
    tmp_path: Path, keep_blocks: tuple[int, ...], gaps: list[tuple[int, int]], channels: Channels, ridge: float
) -> None:
    cut = make_cut(tmp_path, keep_blocks, channels)
    moments = cut.measure(BATCHES)
    assert moments.num_tokens == sum(LENGTHS)
    patches = moments.fit(ridge)
    assert [patch.block for patch in patches] == [block for block, _ in gaps]
    for place, (patch, (block, boundary)) in enumerate(zip(patches, gaps, strict=True)):
        with behind_perfect_maps(cut, gaps[:place]):
            mlp_ND, before_ND, target_ND = seen_at(cut, block, boundary)
        expected_DD = least_squares(mlp_ND, target_ND - before_ND, ridge)
        np.testing.assert_allclose(patch.map_DD, expected_DD, atol=1e-4)

        def residual(map_DD: Any, seen: Any = (mlp_ND, before_ND, target_ND)) -> float:
            return float(((seen[0] @ map_DD - (seen[2] - seen[1])) ** 2).sum() / (seen[2] ** 2).sum())

        assert patch.residual_before == pytest.approx(residual(np.eye(len(expected_DD))), rel=1e-5)
        assert patch.residual_after == pytest.approx(residual(np.asarray(patch.map_DD)), rel=1e-4)
        assert patch.residual_after < patch.residual_before


def test_a_model_cut_in_depth_shows_what_the_source_does(tmp_path: Path) -> None:
    """As in ReplaceMe, where every M and Y is read off the source."""
    cut = make_cut(tmp_path, (0, 2, 5))
    for patch, boundary in zip(cut.measure(BATCHES).fit(0.1), (2, 5), strict=True):
        mlp_ND, before_ND, target_ND = seen_at(cut, patch.block, boundary, in_source=True)
        expected_DD = least_squares(mlp_ND, target_ND - before_ND, 0.1)
        np.testing.assert_allclose(patch.map_DD, expected_DD, atol=1e-4)


def test_the_channels_that_stay_hold_the_same_values_in_both_streams(tmp_path: Path) -> None:
    """Nothing is cut but hidden channels that are silent, and one block that does nothing: there is nothing to mend."""
    source: Any = tiny.build_model("llama", num_blocks=3, tied=False, rms_norm_eps=1e-12)
    gone = [channel for channel in range(32) if channel not in HIDDEN]
    with torch.no_grad():
        source.get_input_embeddings().weight[:, gone] = 0
        for name, weight in source.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[gone if "layers.1." not in name else slice(None)] = 0
    source.save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", (0, 2), Channels(hidden=HIDDEN))
    moments = measure(source, load_model(tmp_path / "pruned", "float32"), BATCHES, (0, 2), HIDDEN)
    (patch,) = moments.fit(0.01)
    assert patch.residual_before < 1e-10
    torch.testing.assert_close(patch.map_DD, torch.eye(len(HIDDEN), dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parts_merge_to_the_whole_and_survive_storage(tmp_path: Path, family: str) -> None:
    cut = make_cut(tmp_path, (0, 2, 5), family=family)
    whole = cut.measure(BATCHES)
    parts = [cut.measure([batch]) for batch in BATCHES]
    for merged in (
        parts[0] + parts[1],
        cut.measure(BATCHES[1:], moments=parts[0]),
        cut.measure(BATCHES, stream_bytes=1),
    ):
        assert merged.num_tokens == whole.num_tokens == sum(LENGTHS)
        for name in ("blocks_G", "gram_GDD", "cross_GDD", "residual_G", "target_G"):
            np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    again = PatchMoments.from_bytes(whole.to_bytes())
    assert again.num_tokens == whole.num_tokens
    for name in ("blocks_G", "gram_GDD", "cross_GDD", "residual_G", "target_G"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    assert [patch.block for patch in again.fit(0.1)] == [0, 1]
    assert not any(module._forward_hooks for model in (cut.source, cut.pruned) for module in model.modules())


@torch.no_grad()
def with_maps(cut: Cut, patches: tuple[FittedPatch, ...], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of the pruned model with the maps between MLP and residual stream."""

    def through(map_DD: torch.Tensor) -> Any:
        return lambda _module, _args, out: out @ map_DD.float()

    blocks = cut.pruned.model.layers
    handles = [blocks[patch.block].mlp.register_forward_hook(through(patch.map_DD)) for patch in patches]
    logits_BTV = cut.pruned(input_ids=ids_BT).logits
    for handle in handles:
        handle.remove()
    return logits_BTV


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *(pytest.param(family, {}, id=family) for family in ("llama", "mistral", "qwen2", "qwen3", "phi3")),
        pytest.param("llama", {"mlp_bias": True, "attention_bias": True}, id="llama-biases"),
        pytest.param("llama", {"tied": True}, id="llama-tied"),
    ],
)
def test_merged_maps_compute_what_maps_beside_the_model_do(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    cut = make_cut(tmp_path, (0, 1, 4), family=family, **overrides)
    patches = cut.measure(BATCHES).fit(0.1)
    tensors = patched_tensors(Checkpoint.open(cut.directory), patches)
    biased = bool(overrides.get("mlp_bias"))
    names = {f"model.layers.{b}.mlp.down_proj.{p}" for b in (1, 2) for p in ("weight", *(["bias"] if biased else []))}
    assert tensors.keys() == names
    write_with(cut.directory, tmp_path / "patched", tensors, max_shard_bytes=50_000)
    Checkpoint.open(tmp_path / "patched").check_expected()
    ids_BT = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        found = load_model(tmp_path / "patched", "float32")(input_ids=ids_BT).logits
        plain = cut.pruned(input_ids=ids_BT).logits
    torch.testing.assert_close(found, with_maps(cut, patches, ids_BT), atol=1e-5, rtol=0)
    assert float((found - plain).abs().max()) > 0.01


def test_the_patched_model_has_the_residual_that_the_sums_tell(tmp_path: Path) -> None:
    cut = make_cut(tmp_path, (0, 1, 4, 5), Channels(hidden=HIDDEN))
    (patch,) = cut.measure(BATCHES).fit(0.01)
    write_with(cut.directory, tmp_path / "patched", patched_tensors(Checkpoint.open(cut.directory), [patch]))
    (again,) = cut._replace(pruned=load_model(tmp_path / "patched", "float32")).measure(BATCHES).fit(0.01)
    assert again.residual_before == pytest.approx(patch.residual_after, rel=1e-4)


def test_an_infinite_ridge_is_the_plain_cut(tmp_path: Path) -> None:
    cut = make_cut(tmp_path, (0, 2, 4))
    moments = cut.measure(BATCHES)
    for patch in moments.fit(1e15):
        torch.testing.assert_close(patch.map_DD, torch.eye(32, dtype=torch.float64), atol=1e-12, rtol=0)
    tensors = patched_tensors(Checkpoint.open(cut.directory), moments.fit(1e15))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, Checkpoint.open(cut.directory).read(name))
    ladder = [moments.fit(ridge) for ridge in (1e-6, 1e-2, 1.0, 100.0, 1e15)]
    for patches in zip(*ladder, strict=True):
        after = [patch.residual_after for patch in patches]
        assert after == sorted(after)
        assert after[-1] <= patches[-1].residual_before


def test_blocks_that_add_nothing_need_no_patch() -> None:
    source: Any = tiny.build_model("mistral", num_blocks=4)
    with torch.no_grad():
        for block in (1, 2):
            source.model.layers[block].self_attn.o_proj.weight.zero_()
            source.model.layers[block].mlp.down_proj.weight.zero_()
    pruned: Any = tiny.build_model("mistral", num_blocks=4)
    pruned.model.layers = torch.nn.ModuleList([deepcopy(source.model.layers[block]) for block in (0, 3)])
    pruned.config.num_hidden_layers = 2
    (patch,) = measure(source, pruned, BATCHES, (0, 3)).fit(0.01)
    assert (patch.residual_before, patch.residual_after) == (0, 0)
    assert torch.equal(patch.map_DD, torch.eye(32, dtype=torch.float64))


def test_a_block_that_a_linear_map_imitates_is_imitated_exactly(tmp_path: Path) -> None:
    """The source's block 1 writes A' W where the pruned one writes W, and the block removed after it does nothing."""
    source: Any = tiny.build_model("llama", num_blocks=4, tied=False)
    with torch.no_grad():
        source.model.layers[2].self_attn.o_proj.weight.zero_()
        source.model.layers[2].mlp.down_proj.weight.zero_()
    source.save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", (0, 1, 3))
    map_DD = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        down = source.model.layers[1].mlp.down_proj.weight
        down.copy_(map_DD.T @ down)
    (patch,) = measure(source, load_model(tmp_path / "pruned", "float32"), BATCHES, (0, 1, 3)).fit(1e-9)
    torch.testing.assert_close(patch.map_DD.float(), map_DD, atol=1e-4, rtol=0)
    assert patch.residual_after < 1e-10 < patch.residual_before
    tensors = patched_tensors(Checkpoint.open(tmp_path / "pruned"), [patch])
    write_with(tmp_path / "pruned", tmp_path / "patched", tensors)
    with torch.no_grad():
        expected = source(input_ids=BATCHES[0][0]).logits
        found = load_model(tmp_path / "patched", "float32")(input_ids=BATCHES[0][0]).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_mlp_that_writes_nothing_keeps_the_identity() -> None:
    source: Any = tiny.build_model("llama", num_blocks=2)
    with torch.no_grad():
        source.model.layers[0].mlp.down_proj.weight.zero_()
    pruned: Any = tiny.build_model("llama", num_blocks=2)
    pruned.model.layers = deepcopy(source.model.layers[:1])
    pruned.config.num_hidden_layers = 1
    (patch,) = measure(source, pruned, BATCHES, (0,)).fit(0.01)
    assert torch.equal(patch.map_DD, torch.eye(32, dtype=torch.float64))
    assert patch.residual_after == patch.residual_before > 0


def test_gaps() -> None:
    assert patch_gaps((0, 1, 4, 6), 9) == (BlockGap(1, 2, 4), BlockGap(2, 5, 6), BlockGap(3, 7, 9))
    assert patch_gaps((2, 4), 5) == (BlockGap(0, 3, 4),)
    with pytest.raises(
        PlanError, match=r"only blocks before the first kept block, 2, .* there is no MLP to patch → remove the patch"
    ):
        patch_gaps((2, 3, 4), 5)
    with pytest.raises(PlanError, match="no block is removed"):
        patch_gaps((0, 1), 2)
    with pytest.raises(PlanError, match="there is no block 5"):
        patch_gaps((0, 5), 5)


def test_families_with_a_norm_behind_the_mlp_are_refused(tmp_path: Path) -> None:
    for name in ("llama", "mistral", "qwen2", "qwen3", "phi3"):
        check_patchable(FAMILIES[name])
    for name in ("gemma2", "gemma3_text"):
        with pytest.raises(ModelError, match=f"a block of {name} has a norm after its MLP"):
            check_patchable(FAMILIES[name])
    model = tiny.build_model("gemma2")
    with pytest.raises(ModelError, match=r"a block of gemma2 .* → remove the patch"):
        measure(model, model, BATCHES, (0, 2, 3))
    patch = FittedPatch(0, torch.eye(32, dtype=torch.float64), 0.0, 0.0)
    with pytest.raises(ModelError, match="a block of gemma3_text"):
        patched_tensors(Checkpoint.open(tiny.make_model(tmp_path, "gemma3_text")), [patch])


def test_what_cannot_be_measured_or_fitted_is_said(tmp_path: Path) -> None:
    cut = make_cut(tmp_path, (0, 2), num_blocks=3)
    with pytest.raises(DataError, match="nothing was measured"):
        cut.measure([]).fit(0.01)
    ids_BT, mask_BT = BATCHES[0]
    with pytest.raises(DataError, match="padded on the left"):
        cut.measure([(ids_BT, mask_BT.flip(1))])
    with pytest.raises(DataError, match=r"4 tokens and a ridge of 1e-30 do not determine .* → give a larger ridge"):
        cut.measure([(ids_BT[:1, :4], mask_BT[:1, :4])]).fit(1e-30)
    with pytest.raises(ModelError, match="different cuts"):
        _ = cut.measure(BATCHES) + replace(cut.measure(BATCHES), blocks_G=np.array([1]))
    with torch.no_grad():
        cut.pruned.model.layers[0].mlp.down_proj.weight[3] = torch.inf
    with pytest.raises(ModelError, match="not finite around the cut after block 0 of the pruned model"):
        cut.measure(BATCHES)
    silent = tiny.build_model("llama")
    with torch.no_grad():
        for weight in silent.parameters():
            weight.zero_()
    with pytest.raises(ModelError, match="all zero around the cut after block 1"):
        measure(silent, deepcopy(silent), BATCHES, (0, 1, 3))


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.make_model(tmp_path, dtype="float16"))
    patch = FittedPatch(1, 1e7 * torch.eye(32, dtype=torch.float64), 1.0, 0.0)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight is not finite in float16 → give a larger"):
        patched_tensors(checkpoint, [patch])
