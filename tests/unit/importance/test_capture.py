from typing import cast

import pytest
import torch
from torch import nn

from sdft_ray.errors import ModelError
from sdft_ray.importance.capture import backbone_and_blocks, residual_stream
from tests.support.tiny import FAMILIES, build_model

IDS = torch.arange(3, 21).view(2, 9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_stream_is_raw_at_every_boundary(family: str):
    model = build_model(family, num_blocks=3)
    backbone, blocks = backbone_and_blocks(model)
    with residual_stream(blocks) as stream:
        states = backbone(IDS, output_hidden_states=True, use_cache=False).hidden_states
        assert len(stream) == len(states) == 4
        for ours, theirs in zip(stream[:3], states[:3], strict=True):
            assert torch.equal(ours, theirs)
        # their last entry is after the final norm, ours before it
        assert not torch.allclose(stream[3], states[3], atol=1e-2)
        assert torch.equal(cast(nn.Module, backbone.norm)(stream[3]), states[3])


@torch.inference_mode()
def test_hooks_leave_with_the_context():
    model = build_model()
    backbone, blocks = backbone_and_blocks(model)
    with pytest.raises(RuntimeError, match="stop"), residual_stream(blocks) as stream:
        raise RuntimeError("stop")
    backbone(IDS)
    assert stream == []


def test_backbone_is_its_own_backbone():
    model = build_model(num_blocks=2)
    backbone, blocks = backbone_and_blocks(model)
    assert backbone is model.model
    assert backbone_and_blocks(backbone) == (backbone, blocks)
    assert len(blocks) == 2


def test_other_modules_are_refused():
    with pytest.raises(ModelError, match="Linear has no list of decoder blocks"):
        backbone_and_blocks(nn.Linear(2, 2))
