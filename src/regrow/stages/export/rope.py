"""Rotary positions as keys and tensors of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError

if TYPE_CHECKING:
    import numpy as np

KNOWN = {
    "llama": ("default", "linear", "llama3", "yarn"),
    "phi3": ("default", "longrope"),
    "gemma3": ("default", "linear"),
}
"""Kinds of scaling by architecture; others have default, linear and yarn."""


BETAS = {"beta_fast": 32, "beta_slow": 1}
"""Where YaRN's ramp ends and begins, in turns over the original context."""


def parameters(config: Any) -> dict[str, Any]:
    """The rotation's parameters of a transformers config; of its full-attention layers, if two."""
    found: dict[str, Any] = config.rope_parameters
    return found.get("full_attention", found)


def check(config: Any, architecture: str) -> None:
    """Raise UserError for a kind of scaling that llama.cpp's architecture does not compute."""
    kind = parameters(config).get("rope_type", "default")
    allowed = KNOWN.get(architecture, ("default", "linear", "yarn"))
    if kind not in allowed:
        raise UserError(
            f"rope_type {kind!r}: llama.cpp's {architecture} knows {', '.join(allowed)}; set "
            "rope_parameters in config.json to one of them to export without it"
        )
    share = parameters(config).get("partial_rotary_factor") or 1.0
    if share != 1.0 and architecture != "phi3":
        raise UserError(
            f"partial_rotary_factor {share}: llama.cpp's {architecture} rotates whole heads only"
        )
    betas = [parameters(config).get(key) or usual for key, usual in BETAS.items()]
    if kind == "yarn" and betas != [*BETAS.values()]:
        raise UserError(
            f"beta_fast and beta_slow {betas} of YaRN: llama.cpp computes {[*BETAS.values()]} only"
        )
    local = config.rope_parameters.get("sliding_attention")
    if local and local.get("rope_type", "default") != "default":
        raise UserError(
            f"rope_type {local['rope_type']!r} in the sliding layers: llama.cpp's {architecture} "
            "knows default"
        )


def rotated(config: Any, head_dim: int) -> int:
    """Rows of a head that are rotated."""
    return int(head_dim * (parameters(config).get("partial_rotary_factor") or 1.0))


def _write_yarn(writer: Any, given: dict[str, Any]) -> None:
    """What YaRN multiplies queries and keys by, where it is not 1 + 0.1 ln(factor)."""
    usual = 1 + 0.1 * math.log(given["factor"])
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    wanted = given.get("attention_factor")
    if wanted is None and mscale and all_dim:
        log = 0.1 * math.log(given["factor"])
        wanted = (mscale * log + 1) / (all_dim * log + 1)
    if wanted is not None:
        writer.add_rope_scaling_attn_factors(wanted / usual)


def tensors(config: Any, head_dim: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values [head_dim / 2] in float32 of what the frequencies are divided by."""
    import numpy as np

    given = parameters(config)
    kind = given.get("rope_type", "default")
    if kind == "llama3":
        yield "rope_freqs.weight", llama3_divisors(given, head_dim)
    if kind == "longrope":
        for name in ("long", "short"):
            factors = np.array(given[f"{name}_factor"], dtype=np.float32)
            yield f"rope_factors_{name}.weight", factors


def llama3_divisors(given: dict[str, Any], head_dim: int) -> np.ndarray:
    """Llama 3.1's divisors [head_dim / 2] of the frequencies, in float32.

    1 for waves much shorter than the original context, `factor` for much longer ones; between
    high_freq_factor and low_freq_factor waves per context the frequency f becomes
    s·f + (1 − s)·f/factor, s growing from 0 to 1.
    """
    import numpy as np

    places = np.arange(0, head_dim, 2, dtype=np.float64)
    frequencies = given["rope_theta"] ** (-places / head_dim)
    waves = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    share = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / given["factor"])).astype(np.float32)


def _original(config: Any) -> int:
    given = parameters(config)
    found = given.get("original_max_position_embeddings") or config.max_position_embeddings
    return int(found)


def _long_attention(config: Any) -> float:
    """What long RoPE multiplies queries and keys by: √(1 + ln(factor)/ln(original))."""
    given, original = parameters(config), _original(config)
    if given.get("attention_factor"):
        return float(given["attention_factor"])
    factor = given.get("factor") or config.max_position_embeddings / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def write_rope(writer: Any, config: Any, head_dim: int) -> None:
    """Add the keys of the rotation to a GGUFWriter."""
    from gguf import RopeScalingType

    given = parameters(config)
    writer.add_rope_dimension_count(rotated(config, head_dim))
    writer.add_rope_freq_base(given["rope_theta"])
    if local := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = given.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(given["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(_original(config))
        _write_yarn(writer, given)
    if kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(_original(config))
        writer.add_rope_scaling_attn_factors(_long_attention(config))
