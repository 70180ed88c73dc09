"""Writes a model's sizes, constants and rotary parameters as keys of a GGUF file.

A model that llama.cpp would compute differently from transformers is refused here, before any slow
work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family

if TYPE_CHECKING:
    import numpy as np

ACTIVATION = {"gemma3": "gelu_pytorch_tanh"}
"""Activation function of each architecture; all others compute silu."""
NO_BIAS = ("qwen3", "qwen3moe", "gemma3")
"""Architectures without a bias in the attention's output projection."""
ROPE_TYPES = {
    "llama": ("default", "linear", "llama3", "yarn"),
    "phi3": ("default", "longrope"),
    "gemma3": ("default", "linear"),
}
"""Types of rotary scaling for each architecture; all others support default, linear and yarn."""
BETAS = {"beta_fast": 32, "beta_slow": 1}
"""Rotations over the original context at which YaRN's ramp ends and begins."""
QUANTIZATION_VERSION = 2
"""Version of GGML's block formats."""
DEFAULT_PERIOD = 6
"""Period of full-attention layers that llama.cpp assumes for Gemma 3 when the file has no key."""


def check(checkpoint: Checkpoint, family: Family, config: Any) -> None:
    """Raise UserError, with the reason, when llama.cpp would compute another result."""
    if family.gguf is None:
        raise UserError(
            f"{family.model_type} models cannot be exported: regrow writes GGUF for the types "
            f"{', '.join(families.exported())}"
        )
    architecture, raw = family.gguf, checkpoint.config
    allowed = ACTIVATION.get(architecture, "silu")
    activation = raw.get("hidden_activation")
    if architecture != "gemma3":
        activation = activation or raw.get("hidden_act")
    if activation not in (None, allowed, {"silu": "swish"}.get(allowed)):
        raise UserError(
            f"activation {activation!r}: llama.cpp's {architecture} supports {allowed} only"
        )
    if architecture in NO_BIAS and raw.get("attention_bias"):
        raise UserError(
            f"attention_bias: llama.cpp's {architecture} has no bias in the attention's output"
        )
    _check_rope(config, architecture)
    checks = {"phi3": _check_phi3, "qwen3moe": _check_qwen3moe, "gemma3": _check_gemma3}
    if architecture in checks:
        checks[architecture](family, raw, config)


def _check_rope(config: Any, architecture: str) -> None:
    kind = rope_parameters(config).get("rope_type", "default")
    allowed = ROPE_TYPES.get(architecture, ("default", "linear", "yarn"))
    if kind not in allowed:
        raise UserError(
            f"rope_type {kind!r}: llama.cpp's {architecture} supports {', '.join(allowed)}; set "
            "rope_parameters in config.json to one of them to export without this scaling"
        )
    share = rope_parameters(config).get("partial_rotary_factor") or 1.0
    if share != 1.0 and architecture != "phi3":
        raise UserError(
            f"partial_rotary_factor {share}: llama.cpp's {architecture} rotates whole heads only"
        )
    betas = [rope_parameters(config).get(key) or default for key, default in BETAS.items()]
    if kind == "yarn" and betas != [*BETAS.values()]:
        raise UserError(
            f"beta_fast and beta_slow {betas} of YaRN: llama.cpp supports {[*BETAS.values()]} only"
        )
    local = config.rope_parameters.get("sliding_attention")
    if local and local.get("rope_type", "default") != "default":
        raise UserError(
            f"rope_type {local['rope_type']!r} in the sliding layers: llama.cpp's {architecture} "
            "supports default only"
        )


def _check_phi3(family: Family, raw: dict[str, Any], config: Any) -> None:
    sizes = family.sizes(raw)
    if sizes["heads"] * sizes["head_dim"] != sizes["hidden"]:
        raise UserError(
            f"{sizes['heads']} heads of {sizes['head_dim']} with hidden_size {sizes['hidden']}: "
            "llama.cpp's phi3 requires heads × head_dim = hidden_size; prune heads and hidden by "
            "the same share, or neither"
        )


def _check_qwen3moe(family: Family, raw: dict[str, Any], config: Any) -> None:
    dense = sorted(set(range(family.sizes(raw)["layers"])) - set(family.layers_of("experts", raw)))
    if dense:
        raise UserError(
            f"layer {dense[0]} has no experts: llama.cpp's qwen3moe has experts in every layer"
        )
    if not config.norm_topk_prob:
        raise UserError(
            "norm_topk_prob false: llama.cpp's qwen3moe always normalizes the weights of the "
            "chosen experts"
        )


def _check_gemma3(family: Family, raw: dict[str, Any], config: Any) -> None:
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if raw.get(key):
            raise UserError(f"{key} {raw[key]}: llama.cpp's gemma3 does not support it")
    sliding_period(config)


def sliding_period(config: Any) -> int:
    """The period n of a Gemma 3: every nth layer has full attention, the others a sliding window.

    llama.cpp derives the attention of all layers from n. Raises UserError when no n describes these
    layers.
    """
    kinds = [kind == "full_attention" for kind in config.layer_types]
    for period in range(1, len(kinds) + 2):
        if kinds == [(layer + 1) % period == 0 for layer in range(len(kinds))]:
            return period
    full = [layer for layer, is_full in enumerate(kinds) if is_full]
    raise UserError(
        f"layers {full} of {len(kinds)} have full attention: llama.cpp supports only a regular "
        "period (every nth layer); choose the layers to prune so that a period remains"
    )


def context(config: Any, architecture: str) -> tuple[int, str]:
    """Number of positions for which llama.cpp and transformers agree, and the reason if not all.

    llama.cpp supports sliding windows for Gemma 3 only. Within one window they make no difference.
    """
    positions = int(config.max_position_embeddings)
    window = config.to_dict().get("sliding_window")
    kinds = config.to_dict().get("layer_types")
    slides = window and (kinds is None or "sliding_attention" in kinds)
    if architecture == "gemma3" or not slides or window >= positions:
        return positions, ""
    return int(window), (
        f"llama.cpp's {architecture} has no sliding window: context_length is set to the window, "
        f"{window} of {positions} positions, up to which both compute the same"
    )


def write(writer: Any, checkpoint: Checkpoint, family: Family, config: Any) -> None:
    """Add the architecture's keys to a GGUFWriter."""
    raw = checkpoint.config
    sizes = family.sizes(raw)
    assert family.gguf is not None
    writer.add_vocab_size(sizes["vocab"])
    writer.add_context_length(context(config, family.gguf)[0])
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["mlp"] if "mlp" in sizes else sizes["expert_mlp"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(family.value(raw, "rms_norm_eps"))
    _write_rope(writer, config, sizes["head_dim"])
    if "experts" in sizes:
        writer.add_expert_count(sizes["experts"])
        writer.add_expert_used_count(int(family.value(raw, "num_experts_per_tok")))
    if "experts" in sizes and "mlp" in sizes:
        writer.add_expert_feed_forward_length(sizes["expert_mlp"])
    if family.gguf == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        if (period := sliding_period(config)) != DEFAULT_PERIOD:
            writer.add_sliding_window_pattern(period)


def write_general(writer: Any, name: str, file_type: int, licence: str | None) -> None:
    """Add the keys that describe the file: its name, its type and, if known, its licence."""
    writer.add_type("model")
    writer.add_name(name)
    if licence is not None:
        writer.add_license(licence)
    writer.add_file_type(file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)


def rope_parameters(config: Any) -> dict[str, Any]:
    """Rotary parameters of a transformers config; if there are two sets, full attention's."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _write_rope(writer: Any, config: Any, head_dim: int) -> None:
    from gguf import RopeScalingType

    parameters = rope_parameters(config)
    rotated = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if local := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original_context(config))
        _write_yarn(writer, parameters)
    if kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(_original_context(config))
        writer.add_rope_scaling_attn_factors(_longrope_attention(config))


def _write_yarn(writer: Any, parameters: dict[str, Any]) -> None:
    """Write the factor of queries and keys if it differs from YaRN's default 1 + 0.1 ln(factor)."""
    default = 1 + 0.1 * math.log(parameters["factor"])
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    factor = parameters.get("attention_factor")
    if factor is None and mscale and all_dim:
        log = 0.1 * math.log(parameters["factor"])
        factor = (mscale * log + 1) / (all_dim * log + 1)
    if factor is not None:
        writer.add_rope_scaling_attn_factors(factor / default)


def _original_context(config: Any) -> int:
    original = rope_parameters(config).get("original_max_position_embeddings")
    return int(original or config.max_position_embeddings)


def _longrope_attention(config: Any) -> float:
    """The factor of queries and keys in LongRoPE: √(1 + ln(factor)/ln(original context))."""
    parameters, original = rope_parameters(config), _original_context(config)
    if parameters.get("attention_factor"):
        return float(parameters["attention_factor"])
    factor = parameters.get("factor") or config.max_position_embeddings / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_tensors(config: Any, head_dim: int) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of divisors of the rotary frequencies: name, and values [head_dim / 2] in float32."""
    import numpy as np

    parameters = rope_parameters(config)
    kind = parameters.get("rope_type", "default")
    if kind == "llama3":
        yield "rope_freqs.weight", llama3_divisors(parameters, head_dim)
    if kind == "longrope":
        for name in ("long", "short"):
            factors = np.array(parameters[f"{name}_factor"], dtype=np.float32)
            yield f"rope_factors_{name}.weight", factors


def llama3_divisors(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """Llama 3.1's divisors [head_dim / 2] of the rotary frequencies, in float32.

    The divisor is 1 for wavelengths much shorter than the original context and `factor` for much
    longer ones. Between low_freq_factor and high_freq_factor waves per context, the frequency f
    becomes s·f + (1 − s)·f/factor, where s grows from 0 to 1.
    """
    import numpy as np

    places = np.arange(0, head_dim, 2, dtype=np.float64)
    frequencies = parameters["rope_theta"] ** (-places / head_dim)
    waves = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    share = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / parameters["factor"])).astype(np.float32)
