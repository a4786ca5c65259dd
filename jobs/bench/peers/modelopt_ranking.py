"""How active NVIDIA ModelOpt finds the channels of a Llama, by the hooks of `modelopt.torch.prune.importance_hooks`.

    python jobs/bench/peers/modelopt_ranking.py JOB.json

Stands alone: it runs in an environment of peers, without `sdft_ray`. The job holds a model directory (`model`) and
token ids (`rows`). Rows pass through the model one at a time, in float32, so nothing is padded. The last line is one
JSON object with scores by criterion and space: a list for each block, or one list for the hidden channels.

- `l2_norm`: Minitron's. ModelOpt's own form of it hooks Megatron modules; here its `L2NormHook` watches what the
  projections of a transformers model read, and what ModelOpt does with the sums there is done here: those of hidden
  channels are added up over norms (all of them; ModelOpt leaves the last one out), a head has the length of its
  channels' sums.
- `contribution`: Puzzle's. MLP channels by activity times the length of their column in `down_proj`, key-value heads
  by the length of what they add to the residual stream, hidden channels by the output of norms.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(measure(job)))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import modelopt  # pyright: ignore[reportMissingImports]
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    readers = {"l2_norm": watch_l2_norm(model), "contribution": watch_contribution(model)}
    with torch.inference_mode():
        for ids in job["rows"]:
            model(input_ids=torch.tensor([ids]), use_cache=False)
        scores = {name: read() for name, read in readers.items()}
    return {"scores": scores, "version": modelopt.__version__}


def watch_l2_norm(model: Any) -> Callable[[], dict[str, Any]]:
    import torch
    from modelopt.torch.prune.importance_hooks import L2NormHook  # pyright: ignore[reportMissingImports]

    def watched(module: Any) -> Any:
        hook = L2NormHook()

        def sequence_first(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            hook(module, (inputs[0].transpose(0, 1),), output)

        module.register_forward_hook(sequence_first)
        return hook

    blocks = model.model.layers
    mlp = [watched(block.mlp.down_proj) for block in blocks]
    heads = [watched(block.self_attn.o_proj) for block in blocks]
    normed = [module for block in blocks for module in (block.self_attn.q_proj, block.mlp.gate_proj)]
    hidden = [watched(module) for module in (*normed, model.lm_head)]

    def read() -> dict[str, Any]:
        by_head = [hook.accumulate().view(-1, model.config.head_dim).norm(dim=1) for hook in heads]
        return {
            "mlp": lists([hook.accumulate() for hook in mlp]),
            "heads": lists(by_head),
            "hidden": torch.stack([hook.accumulate() for hook in hidden]).sum(0).tolist(),
        }

    return read


def watch_contribution(model: Any) -> Callable[[], dict[str, Any]]:
    import torch
    from modelopt.torch.prune.importance_hooks import (  # pyright: ignore[reportMissingImports]
        IndependentChannelContributionHook,
        IndependentKvHeadContributionHook,
        LayerNormContributionHook,
    )

    blocks = model.model.layers
    attention = SimpleNamespace(num_key_value_heads=model.config.num_key_value_heads)
    context = {"model": model, "block_config": SimpleNamespace(attention=attention)}
    norms = [norm for block in blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
    mlp = [registered(block.mlp.down_proj, IndependentChannelContributionHook) for block in blocks]
    heads = [registered(block.self_attn.o_proj, IndependentKvHeadContributionHook, context) for block in blocks]
    hidden = [registered(norm, LayerNormContributionHook, {}) for norm in (*norms, model.model.norm)]

    def read() -> dict[str, Any]:
        return {
            "mlp": lists([hook.accumulate() for hook in mlp]),
            "heads": lists([hook.accumulate() for hook in heads]),
            "hidden": torch.stack([hook.accumulate() for hook in hidden]).mean(0).tolist(),
        }

    return read


def registered(module: Any, hook_class: Any, *arguments: Any) -> Any:
    hook = hook_class(module, *arguments)
    module.register_forward_hook(hook)
    return hook


def lists(scores: Sequence[Any]) -> list[list[float]]:
    return [score.tolist() for score in scores]


if __name__ == "__main__":
    main()
