"""Targets in bytes and memory: the size of each format, and shapes that meet a limit."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from test_choose import SMOLLM2

from regrow import cost, families
from regrow.cost.units import size_text
from regrow.errors import UserError
from regrow.pruning.config import PruneConfig, bytes_of
from regrow.quantization import formats
from regrow.search.shapes import candidates, grid
from regrow.search.targets import SLACK, smallest, target_of

LLAMA = families.get("llama")


def test_sizes_are_read_with_their_units() -> None:
    sizes = ["90MB", "90 mb", "1.5GiB", "90000000", "2k", ".5M"]
    assert [bytes_of(text) for text in sizes] == [
        90_000_000, 90_000_000, 1_610_612_736, 90_000_000, 2000, 500_000,
    ]  # fmt: skip
    assert PruneConfig.model_validate({"max_bytes": 90000000}).max_bytes == "90000000"
    for wrong in ("90XB", "MB", "-5MB", "0MB", ""):
        with pytest.raises(ValidationError, match="give a size such as 90MB"):
            PruneConfig(max_bytes=wrong)


def test_the_estimated_size_equals_a_real_file() -> None:
    """The tensors of SmolLM2-135M-Instruct.Q4_1.gguf take 96,576,768 bytes."""
    assert cost.file_bytes(LLAMA, SMOLLM2, "q4_1") == 96_576_768
    assert cost.file_bytes(LLAMA, SMOLLM2, "bf16") == 2 * 134_515_008


def test_the_size_of_a_mix_equals_a_hand_computed_value() -> None:
    """q4_k_m of a model whose rows fit: half of v_proj and down_proj in q6_k, the head too."""
    config = {**SMOLLM2, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    config |= {"head_dim": 64, "num_hidden_layers": 8, "vocab_size": 1000}
    hidden, mlp, kv = 512, 1536, 256
    more = [i for i in range(8) if i < 1 or i >= 7 or (i - 1) % 3 == 2]
    by_type = formats.find("q4_k_m").layers_by_type("v_proj", LLAMA.sizes(config))
    assert by_type == {"Q6_K": len(more), "Q4_K": 4}
    four = 2 * hidden * hidden + kv * hidden + 2 * hidden * mlp  # q, o, k, gate, up
    mixed = kv * hidden + hidden * mlp  # v, down
    sequences = 8 * four * 144 + (4 * 144 + 4 * 210) * mixed + 1000 * hidden * 210
    norms = 4 * (2 * 8 + 1) * hidden
    assert cost.file_bytes(LLAMA, config, "q4_k_m") == sequences // 256 + norms
    assert cost.fallbacks(LLAMA, config, "q4_k_m") == []


def test_rows_that_do_not_fit_are_reported_with_their_cost() -> None:
    lines = cost.fallbacks(LLAMA, SMOLLM2, "q4_0", {"mlp": 1500})
    (down,) = lines
    mixed = cost.fallbacks(LLAMA, SMOLLM2, "q4_k_m")
    embedding = next(line for line in mixed if "embed" in line)
    # 16 bits instead of 4.5 for 30 layers of 576 × 1500
    extra = 30 * 576 * 1500 * (16 - 4.5) / 8
    assert (
        "30 tensors (down_proj) with rows of 1500, not a multiple of 32: F16 instead of Q4_0"
        in down
    )
    assert f"{extra / 1e6:.2f} MB more" in down
    # The embedding, which is the head too, and v_proj in the 14 layers that get more bits.
    assert embedding.startswith("q4_k_m: 15 tensors (embed_tokens, v_proj) with rows of 576, not a")
    assert "multiple of 256: Q8_0 instead of Q6_K" in embedding
    extra = (49152 + 14 * 192) * 576 * (8.5 - 6.5625) / 8
    assert f"{extra / 1e6:.2f} MB more" in embedding
    assert cost.fallbacks(LLAMA, SMOLLM2, "q4_0") == []


def test_memory_equals_a_hand_computed_value() -> None:
    cache = 2 * 30 * 3 * 64 * 2048 * 2
    wide = 512 * (3 * 576 + (9 + 6) * 64 + 2 * 1536 + 2048) + 49152
    expected = 2 * 134_515_008 + cache + 4 * wide
    assert cost.ram_bytes(LLAMA, SMOLLM2, "bf16", 2048) == expected
    fewer = cost.ram_bytes(LLAMA, SMOLLM2, "bf16", 2048, {"kv_heads": 1, "heads": 3})
    assert fewer < expected - 2 * cache // 3


LIMITS: list[dict[str, Any]] = [
    {"max_bytes": "80MB", "format": "q4_0"},
    {"max_bytes": "80MB", "format": "q4_k_m"},
    {"max_bytes": "120MB", "format": "q8_0"},
    {"max_ram": "250MB"},
    {"max_bytes": "230MB", "max_ram": "250MB"},
]


@pytest.mark.parametrize("fields", LIMITS, ids=str)
def test_shapes_keep_every_limit_and_waste_nothing(fields: dict[str, Any]) -> None:
    target = target_of(LLAMA, SMOLLM2, PruneConfig(**fields))
    shapes = candidates(LLAMA, SMOLLM2, target, 32)
    assert len(shapes) >= 4
    for shape in shapes:
        families.check_sizes(LLAMA, SMOLLM2, shape.sizes, 32)
        for limit in target.limits:
            assert limit.value(shape.sizes) <= limit.most
        mlp = shape.sizes.get("mlp", 1536)
        wider = [{**shape.sizes, "mlp": n} for n in range(mlp + 32, 1537, 32)]
        assert not any(target.within(sizes) for sizes in wider)
        nearest = max(limit.value(shape.sizes) / limit.most for limit in target.limits)
        assert nearest > 1 - SLACK or mlp < 1536
    all_shapes = grid(LLAMA, SMOLLM2, target, 32, 40)
    assert 20 <= len(all_shapes) <= 40
    assert all(target.within(shape.sizes) for shape in all_shapes)


def test_a_share_and_a_limit_are_both_met() -> None:
    config = PruneConfig(keep_params=0.8, max_bytes="75MB", format="q4_0")
    target = target_of(LLAMA, SMOLLM2, config)
    for shape in candidates(LLAMA, SMOLLM2, target, 32):
        assert abs(shape.parameters / 134_515_008 - 0.8) <= 0.01
        assert target.within(shape.sizes)
    tight = config.model_copy(update={"max_bytes": "60MB"})
    with pytest.raises(UserError, match=r"keep_params 0\.8, max_bytes 60 MB: no shape"):
        candidates(LLAMA, SMOLLM2, target_of(LLAMA, SMOLLM2, tight), 32)


def test_small_limits_are_kept_by_cutting_all_axes() -> None:
    target = target_of(LLAMA, SMOLLM2, PruneConfig(max_bytes="10MB", format="q4_0"))
    (shape,) = candidates(LLAMA, SMOLLM2, target, 32)
    assert target.within(shape.sizes)
    assert {"layers", "hidden", "kv_heads", "heads"} <= set(shape.sizes)


def test_a_limit_below_the_minimum_is_refused_with_the_minimum() -> None:
    smallest_shape = smallest(LLAMA, SMOLLM2, 32)
    families.check_sizes(LLAMA, SMOLLM2, smallest_shape, 32)
    takes = size_text(cost.file_bytes(LLAMA, SMOLLM2, "bf16", smallest_shape), up=True)
    target = target_of(LLAMA, SMOLLM2, PruneConfig(max_bytes="1MB"))
    with pytest.raises(UserError, match=rf"max_bytes 1 MB: the smallest .* takes {takes} in bf16"):
        candidates(LLAMA, SMOLLM2, target, 32)
    told = PruneConfig(max_bytes=takes)
    assert candidates(LLAMA, SMOLLM2, target_of(LLAMA, SMOLLM2, told), 32)
    reachable = PruneConfig(max_bytes=str(cost.file_bytes(LLAMA, SMOLLM2, "bf16", smallest_shape)))
    assert candidates(LLAMA, SMOLLM2, target_of(LLAMA, SMOLLM2, reachable), 32)
    target = target_of(LLAMA, SMOLLM2, PruneConfig(max_bytes="900MB"))
    with pytest.raises(UserError, match=r"the whole model takes 269 MB in bf16: nothing to cut"):
        candidates(LLAMA, SMOLLM2, target, 32)
    with pytest.raises(UserError, match=r"no format named 'q4_k' — did you mean"):
        target_of(LLAMA, SMOLLM2, PruneConfig(max_bytes="80MB", format="q4_k"))


def test_sizes_have_three_digits_by_hand() -> None:
    shown = {7: "7 bytes", 999: "999 bytes", 1000: "1 kB", 12_340: "12.3 kB", 40_500: "40.5 kB"}
    shown |= {999_600: "1 MB", 16_381_470_720: "16.4 GB", 1_234_567_890_123: "1,230 GB"}
    assert {size: size_text(size) for size in shown} == shown
    up = {12_301: "12.4 kB", 12_300: "12.3 kB", 999_001: "1 MB", 7.2: "8 bytes"}
    assert {size: size_text(size, up=True) for size in up} == up
    assert all(bytes_of(text.removesuffix("ytes")) >= size for size, text in up.items())
