"""Tiny random models and plans, one per family, for tests that must not need the network.

Nothing in them is zero, one or square by chance: norms and biases are random, the MLP is odd,
head_dim often differs from hidden / heads, and a window is shorter than the test sequences.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from regrow import families, plugins
from regrow.checkpoint.checkpoint import experts_option
from regrow.plan import Plan

COMMON: dict[str, Any] = {
    "vocab_size": 384,  # what tests/tiny_tokenizer.py fills at most
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-14,  # so small that rounding, not eps, limits a comparison in float64
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 10, "tie_word_embeddings": True},
    "mistral": {"head_dim": 8, "sliding_window": 7},
    "qwen2": {
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 12},
    "gemma3_text": {
        "num_hidden_layers": 4,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "mixtral": {"head_dim": 8, "sliding_window": 7, "num_local_experts": 4},
    "qwen3_moe": {  # layers 1 and 3 have experts
        "num_hidden_layers": 4,
        "head_dim": 12,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
    },
    "phi3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
}


NAMES = plugins.names("regrow.families")
"""All families. One whose tiny model needs more fields than COMMON has them in SPECIAL."""
MIXTURES = [name for name in NAMES if "experts" in families.get(name).config_keys]


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The config of a tiny model: hidden 48, 6 heads in 2 KV groups, MLP 56, 3 or 4 layers."""
    special = SPECIAL.get(model_type, {})
    return AutoConfig.for_model(model_type, **{**COMMON, **special, **overrides})


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A tiny causal LM in eval mode, every parameter random; `overrides` are config fields."""
    config = tiny_config(model_type, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **experts_option(dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random(name, parameter.shape, generator, "gemma" in model_type))
    return model.eval()


def _random(
    name: str, shape: torch.Size, generator: torch.Generator, norms_add_one: bool
) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name.endswith("norm.weight"):
        return 0.3 * values + (0.0 if norms_add_one else 1.0)
    if name.endswith("bias"):
        return 0.3 * values
    return values if "embed_tokens" in name else values * shape[-1] ** -0.5


def float64_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Make the RMSNorms and routers of `model` compute in its own dtype, in place; returns `model`.

    transformers rounds to float32 inside every one; without this a comparison in float64 ends at
    1e-7.
    """
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = _PlainRouter(module)  # type: ignore[assignment,method-assign]
        if type(module).__name__.endswith("RMSNorm"):
            offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            module.forward = _PlainNorm(module, offset)  # type: ignore[assignment,method-assign]
    return model


class _PlainNorm:
    def __init__(self, module: torch.nn.Module, offset: float) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        self.weight, self.offset = weight, offset
        names = vars(module)  # transformers has two names for it
        self.eps: float = names["eps"] if "eps" in names else names["variance_epsilon"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale * (self.weight + self.offset)


class _PlainRouter:
    def __init__(self, module: torch.nn.Module) -> None:
        names = vars(module)
        self.module, self.top_k = module, int(names["top_k"])
        self.normed = bool(names.get("norm_topk_prob", True))  # Mixtral always does

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        logits = x.flatten(0, -2) @ weight.T
        chance, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, chance / chance.sum(-1, keepdim=True) if self.normed else chance, chosen


def tiny_ids(batch: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] of the tiny vocabulary, longer than the tiny windows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, COMMON["vocab_size"], (batch, length), generator=generator)


def logits(model: Any) -> torch.Tensor:
    """Logits [B, T, V] of a model on `tiny_ids`."""
    output: torch.Tensor = model(tiny_ids()).logits
    return output


def random_plan(
    config: dict[str, Any], fingerprint: str = "", seed: int = 0, **after: int | list[int]
) -> Plan:
    """A plan that keeps random units: `after` has a dimension's new size, or the kept layers."""
    family = families.get(config["model_type"])
    before = family.sizes(config)
    draw = random.Random(seed)

    def sample(dim: str, ids: range) -> list[int]:
        want = after[dim]
        return want if isinstance(want, list) else sorted(draw.sample(ids, want))

    fields: dict[str, Any] = {}
    for dim in ("layers", "hidden", "vocab"):
        if dim in after:
            fields[dim] = sample(dim, range(before[dim]))
    kept_layers = fields.get("layers", list(range(before["layers"])))
    for dim in ("mlp", "kv_heads", "experts"):
        if dim in after:
            having = [n for n in kept_layers if n in family.layers_of(dim, config)]
            fields[dim] = {layer: sample(dim, range(before[dim])) for layer in having}
    if "expert_mlp" in after:
        every = {n: range(before["experts"]) for n in family.layers_of("experts", config)}
        fields["expert_mlp"] = {
            layer: {expert: sample("expert_mlp", range(before["expert_mlp"])) for expert in experts}
            for layer, experts in fields.get("experts", every).items()
            if layer in kept_layers
        }
    sizes = {dim: want if isinstance(want, int) else len(want) for dim, want in after.items()}
    group = before["heads"] // before["kv_heads"]
    if "heads" in after:
        group_size = sizes["heads"] // sizes.get("kv_heads", before["kv_heads"])
        kv_of = fields.get("kv_heads", {})
        fields["heads"] = {
            layer: [
                kv * group + q
                for kv in kv_of.get(layer, range(before["kv_heads"]))
                for q in sorted(draw.sample(range(group), group_size))
            ]
            for layer in kept_layers
        }
    elif "kv_heads" in after:
        sizes["heads"] = sizes["kv_heads"] * group
    return Plan(
        model_type=family.model_type,
        fingerprint=fingerprint,
        before=before,
        after={**before, **sizes},
        **fields,
    )
