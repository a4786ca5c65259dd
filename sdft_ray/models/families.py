"""Model families as data: the tensors of each architecture, and the channel spaces along each of their axes.

A *space* is one set of channels shared by many tensors:

    vocab      rows of the embedding table
    hidden     the residual stream
    mlp        channels between the MLP's projections
    heads      query heads, `head_dim` channels each
    kv_groups  key-value heads, `head_dim` channels each; `heads / kv_groups` query heads read one group
    head_dim   channels inside a head, shared by all heads of all blocks (query and key norms)

Every axis of every tensor is tagged with its spaces, so that one table gives names and shapes (checkpoint checks),
counts (sizes) and what to slice when a space is pruned. An axis with several spaces is a fused projection: the parts
are concatenated in that order. `docs/contributing/add_a_family.md` describes how to add a family.

Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sdft_ray.errors import ModelError

Config = Mapping[str, Any]
"""The content of a Hugging Face config.json."""

Role = Literal["embedding", "head", "matmul", "bias", "norm"]

SIZE_FIELDS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "head_dim": "head_dim",
}
"""The config field with the number of members of each space."""

HEAD_SPACES = frozenset({"heads", "kv_groups"})
"""Spaces whose members are `head_dim` channels wide; a member of any other space is one channel."""

_BLOCK_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)", re.DOTALL)


@dataclass(frozen=True)
class TensorTemplate:
    """One tensor of a family. A `{block}` in `name` makes it one tensor per block.

    `axes` are the spaces along each axis. The tensor exists if the config field `when` is true and the field `unless`
    is false (None: no condition).
    """

    name: str
    axes: tuple[tuple[str, ...], ...]
    role: Role
    when: str | None = None
    unless: str | None = None

    @property
    def per_block(self) -> bool:
        return "{block}" in self.name

    @property
    def module(self) -> str:
        """Name of the module that has the tensor, inside its block: `q_proj`, `input_layernorm`."""
        return self.name.rsplit(".", 2)[-2]


@dataclass(frozen=True)
class Family:
    """One architecture. `defaults` are the values that Hugging Face gives to fields absent from config.json.

    `sliding`: which blocks use sliding-window attention if the config has no `layer_types`: "none"; "from_block",
    those from `max_window_layers` on if `use_sliding_window`; or "periodic", all but every `sliding_period`-th.
    `head_dim_from_hidden`: an engine derives the head size from the hidden size and ignores config.json (vLLM 0.32).
    `heads_divide_hidden`: transformers accepts only hidden sizes that are a multiple of the number of heads.
    `rope_factors_from_hidden`: transformers computes the length of longrope's lists of factors from the hidden size and
    the number of heads, whatever `head_dim` is.
    `norm_adds_one`: a norm multiplies by 1 + weight. `embedding_scaled`: embeddings are multiplied by the square root
    of the hidden size.
    """

    model_type: str
    architecture: str
    tensors: tuple[TensorTemplate, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sliding: Literal["none", "from_block", "periodic"] = "none"
    sliding_period: int = 0
    head_dim_from_hidden: bool = False
    heads_divide_hidden: bool = False
    rope_factors_from_hidden: bool = False
    norm_adds_one: bool = False
    embedding_scaled: bool = False

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Module suffixes of every linear map inside a block, for `target_modules` of peft."""
        return tuple(tensor.module for tensor in self.tensors if tensor.per_block and tensor.role == "matmul")

    def setting(self, config: Config, name: str) -> Any:
        """A config field, or the default of the family if config.json does not have it."""
        return config.get(name, self.defaults.get(name))

    def space_sizes(self, config: Config) -> dict[str, int]:
        """Number of members of every space. Raises `ModelError` for a field without a positive integer."""
        sizes = {space: self.setting(config, name) for space, name in SIZE_FIELDS.items()}
        if sizes["kv_groups"] is None:
            sizes["kv_groups"] = sizes["heads"]
        if sizes["head_dim"] is None and _is_count(sizes["hidden"]) and _is_count(sizes["heads"]):
            sizes["head_dim"] = sizes["hidden"] // sizes["heads"]
        for space, size in sizes.items():
            if not _is_count(size):
                raise _bad_field(SIZE_FIELDS[space], size)
        return sizes

    def templates(self, config: Config) -> Iterator[TensorTemplate]:
        """The templates that exist under this config (biases, untied heads)."""
        for tensor in self.tensors:
            enabled = tensor.when is None or bool(self.setting(config, tensor.when))
            disabled = tensor.unless is not None and bool(self.setting(config, tensor.unless))
            if enabled and not disabled:
                yield tensor

    def tensor_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint with this config, tensors outside the blocks first."""
        sizes = self.space_sizes(config)
        templates = list(self.templates(config))
        shapes = {t.name: shape_of(t, sizes) for t in templates if not t.per_block}
        for block in range(num_blocks_of(config)):
            shapes |= {t.name.format(block=block): shape_of(t, sizes) for t in templates if t.per_block}
        return shapes


def shape_of(tensor: TensorTemplate, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a tensor for the given space sizes."""
    width = {space: size * (sizes["head_dim"] if space in HEAD_SPACES else 1) for space, size in sizes.items()}
    return tuple(sum(width[space] for space in axis) for axis in tensor.axes)


def num_blocks_of(config: Config) -> int:
    """Number of decoder blocks. Raises `ModelError` if config.json does not give it."""
    value = config.get("num_hidden_layers")
    if not _is_count(value):
        raise _bad_field("num_hidden_layers", value)
    assert isinstance(value, int)
    return value


def split_block(name: str) -> tuple[int, str] | None:
    """`model.layers.3.mlp.x` as (3, "mlp.x"); None for a tensor outside the blocks."""
    match = _BLOCK_NAME.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def join_block(block: int, rest: str) -> str:
    """The inverse of `split_block`."""
    return f"model.layers.{block}.{rest}"


def family_of(config: Config) -> Family:
    """The family of a config. Raises `ModelError` unless it is a supported, unquantized causal language model."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    supported = f"supported: {', '.join(FAMILIES)}"
    if model_type == "gemma3":
        raise ModelError(
            "this Gemma 3 checkpoint has a vision tower (model_type gemma3)",
            "use a text-only one (model_type gemma3_text, Gemma3ForCausalLM)",
        )
    if model_type is None:
        raise ModelError("config.json has no model_type", f"give a Hugging Face model; {supported}")
    architectures = config.get("architectures") or [family.architecture if family else model_type]
    is_known = family is not None and family.architecture in architectures
    if config.get("auto_map") and not is_known:
        raise ModelError(
            f"{architectures[0]} has code of its own (auto_map in config.json), and custom code is not run",
            f"give a model whose code is part of transformers; {supported}",
        )
    if family is None:
        raise ModelError(f"unsupported architecture {model_type!r}", supported)
    if not is_known:
        raise ModelError(
            f"{architectures[0]} is not a causal language model",
            f"give a checkpoint of {family.architecture}, the model that generates text",
        )
    if config.get("quantization_config"):
        raise ModelError("the checkpoint is quantized", "give the weights in bfloat16, float16 or float32")
    return family


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _bad_field(name: str, value: object) -> ModelError:
    problem = "is missing" if value is None else f"is {value!r}, not a positive integer"
    return ModelError(f"config.json: {name} {problem}", "restore the model's config.json")


def _tensor(name: str, axes: str, role: Role, when: str | None = None, unless: str | None = None) -> TensorTemplate:
    """`axes` in short: "heads+kv_groups hidden" is a fused first axis and a plain second one."""
    return TensorTemplate(name, tuple(tuple(axis.split("+")) for axis in axes.split()), role, when, unless)


def _block(name: str, axes: str, role: Role, when: str | None = None) -> TensorTemplate:
    return _tensor("model.layers.{block}." + name, axes, role, when)


_OUTER = (
    _tensor("model.embed_tokens.weight", "vocab hidden", "embedding"),
    _tensor("model.norm.weight", "hidden", "norm"),
    _tensor("lm_head.weight", "vocab hidden", "head", unless="tie_word_embeddings"),
)
_ATTENTION = (
    _block("self_attn.q_proj.weight", "heads hidden", "matmul"),
    _block("self_attn.k_proj.weight", "kv_groups hidden", "matmul"),
    _block("self_attn.v_proj.weight", "kv_groups hidden", "matmul"),
    _block("self_attn.o_proj.weight", "hidden heads", "matmul"),
)
_ATTENTION_BIAS = (
    _block("self_attn.q_proj.bias", "heads", "bias", "attention_bias"),
    _block("self_attn.k_proj.bias", "kv_groups", "bias", "attention_bias"),
    _block("self_attn.v_proj.bias", "kv_groups", "bias", "attention_bias"),
    _block("self_attn.o_proj.bias", "hidden", "bias", "attention_bias"),
)
_QKV_BIAS = (
    _block("self_attn.q_proj.bias", "heads", "bias"),
    _block("self_attn.k_proj.bias", "kv_groups", "bias"),
    _block("self_attn.v_proj.bias", "kv_groups", "bias"),
)
_QK_NORM = (
    _block("self_attn.q_norm.weight", "head_dim", "norm"),
    _block("self_attn.k_norm.weight", "head_dim", "norm"),
)
_MLP = (
    _block("mlp.gate_proj.weight", "mlp hidden", "matmul"),
    _block("mlp.up_proj.weight", "mlp hidden", "matmul"),
    _block("mlp.down_proj.weight", "hidden mlp", "matmul"),
)
_MLP_BIAS = (
    _block("mlp.gate_proj.bias", "mlp", "bias", "mlp_bias"),
    _block("mlp.up_proj.bias", "mlp", "bias", "mlp_bias"),
    _block("mlp.down_proj.bias", "hidden", "bias", "mlp_bias"),
)
_FUSED = (
    _block("self_attn.qkv_proj.weight", "heads+kv_groups+kv_groups hidden", "matmul"),
    _block("self_attn.o_proj.weight", "hidden heads", "matmul"),
    _block("mlp.gate_up_proj.weight", "mlp+mlp hidden", "matmul"),
    _block("mlp.down_proj.weight", "hidden mlp", "matmul"),
)
_NORMS = (
    _block("input_layernorm.weight", "hidden", "norm"),
    _block("post_attention_layernorm.weight", "hidden", "norm"),
)
_SANDWICH_NORMS = (
    *_NORMS,
    _block("pre_feedforward_layernorm.weight", "hidden", "norm"),
    _block("post_feedforward_layernorm.weight", "hidden", "norm"),
)
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            (*_OUTER, *_ATTENTION, *_ATTENTION_BIAS, *_MLP, *_MLP_BIAS, *_NORMS),
            heads_divide_hidden=True,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            (*_OUTER, *_ATTENTION, *_MLP, *_NORMS),
            {"num_key_value_heads": 8},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            (*_OUTER, *_ATTENTION, *_QKV_BIAS, *_MLP, *_NORMS),
            _QWEN_DEFAULTS,
            sliding="from_block",
            head_dim_from_hidden=True,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            (*_OUTER, *_ATTENTION, *_ATTENTION_BIAS, *_QK_NORM, *_MLP, *_NORMS),
            {**_QWEN_DEFAULTS, "head_dim": 128},
            sliding="from_block",
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            (*_OUTER, *_ATTENTION, *_ATTENTION_BIAS, *_MLP, *_SANDWICH_NORMS),
            _GEMMA_DEFAULTS,
            sliding="periodic",
            sliding_period=2,
            heads_divide_hidden=True,
            norm_adds_one=True,
            embedding_scaled=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            (*_OUTER, *_ATTENTION, *_ATTENTION_BIAS, *_QK_NORM, *_MLP, *_SANDWICH_NORMS),
            _GEMMA_DEFAULTS,
            sliding="periodic",
            sliding_period=6,
            heads_divide_hidden=True,
            norm_adds_one=True,
            embedding_scaled=True,
        ),
        Family("phi3", "Phi3ForCausalLM", (*_OUTER, *_FUSED, *_NORMS), rope_factors_from_hidden=True),
    )
}
"""Every supported family by Hugging Face `model_type`."""


def check_patchable(family: Family) -> None:
    """Raise `ModelError` unless a block of this family adds the output of its MLP to the residual stream unchanged."""
    if any(template.module == "post_feedforward_layernorm" for template in family.tensors):
        raise ModelError(
            f"a block of {family.model_type} has a norm after its MLP, into which no linear map can be merged",
            "remove the patch from the recipe for this model",
        )
