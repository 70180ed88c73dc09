"""Cost from a config alone: published sizes, operations by hand, hours, money, and disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from regrow import cost
from regrow.cost import jobs
from regrow.cost.devices import TABLE, Device, devices, find
from regrow.cost.model import (
    ModelSize,
    hidden_cache_bytes,
    logits_cache_bytes,
    top_k_cache_bytes,
)
from regrow.errors import UserError

QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_8B = {**LLAMA_70B, "num_hidden_layers": 32, "hidden_size": 4096}
LLAMA_8B |= {"intermediate_size": 14336, "num_attention_heads": 32}


def test_published_sizes_from_configs_alone() -> None:
    """Qwen3-8B has 8.2 B parameters (6.95 B without embeddings); both cuts have about 6 B."""
    dense = ModelSize(QWEN3_8B)
    assert dense.parameters == 8_190_735_360
    assert dense.parameters - 2 * dense.table == pytest.approx(6.95e9, rel=2e-3)
    assert dense.resized(mlp=9216, hidden=3584).parameters == pytest.approx(6e9, rel=0.03)
    assert dense.resized(layers=24).parameters == pytest.approx(6e9, rel=0.03)
    assert ModelSize(LLAMA_70B).parameters == pytest.approx(70.6e9, rel=1e-3)


def test_bytes_at_each_precision() -> None:
    dense = ModelSize(QWEN3_8B)
    assert dense.bytes("bf16") == 2 * dense.parameters
    eight, four = dense.bytes("int8"), dense.bytes("int4")
    matrices = dense.parameters - 2 * dense.table
    assert eight == pytest.approx(matrices + 4 * dense.table, rel=2e-3)
    assert four == pytest.approx(matrices * (0.5 + 2 / 64) + 4 * dense.table, rel=2e-3)
    assert dense.cache_per_token == 2 * 36 * 8 * 128 * 2 == 147_456


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_of_the_matrix_products(tied: bool) -> None:
    """Against torch's own count of a forward pass, with the scores of causal attention."""
    fields = {**LLAMA_8B, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96}
    fields |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 80}
    fields |= {"tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None}
    config = CONFIG_MAPPING["llama"].from_dict(fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    counter, length = FlopCounterMode(display=False), 16
    with counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    size = ModelSize(fields)
    full = size.sizes
    scores = 4 * full["layers"] * full["heads"] * full["head_dim"]
    hidden = scores * length * (length - (length + 1) / 2)  # eager attention computes these too
    norms = 2 * length * 7 * 64  # no matrix products, but weights that each token uses
    assert length * size.forward(length) + hidden - norms == counter.get_total_flops()


def test_a_distillation_takes_two_and_six_operations() -> None:
    teacher = ModelSize(QWEN3_8B)
    student = teacher.resized(layers=24)
    read, own = teacher.forward(4096), student.forward(4096)
    assert jobs.distillation_operations(student, teacher, 4096) == read + 3 * own
    assert jobs.distillation_operations(student, None, 4096) == 3 * own
    assert jobs.distillation_operations(student, None, 4096, "lora") == 2 * own
    assert jobs.distillation_operations(student, None, 4096, checkpointing=True) == 4 * own
    plain = cost.training_operations(student.multiplied, teacher.multiplied)
    assert read + 3 * own == pytest.approx(plain, rel=0.12)  # plus attention


def test_disk_of_caches() -> None:
    """100 k tokens of vocabulary, 10 M tokens, float32: 4 TB; the top 100 are gigabytes."""
    assert logits_cache_bytes(100_000, 10e6) == 4e12
    assert top_k_cache_bytes(100, 10e6) == 8e9
    assert hidden_cache_bytes(4096, 10e6) == 2 * 4096 * 10e6


def test_the_efficiency_is_that_of_its_published_run() -> None:
    """Qwen3-8B, 36 to 24 layers, 90 B tokens of 4,096: about 6,000 H100 hours."""
    teacher = ModelSize(QWEN3_8B)
    work = jobs.distil(teacher.resized(layers=24), teacher, 90e9, find("h100"))
    assert work.device_hours == pytest.approx(6000, rel=0.01)
    assert work.money == pytest.approx((work.device_hours * 2.5, work.device_hours * 3.5))


def test_seventy_billion_to_seven() -> None:
    """10 M pairs: answers by both, distillation and preference training have a price."""
    device, teacher = find("h100"), ModelSize(LLAMA_70B)
    student = ModelSize(LLAMA_8B)
    work = [
        jobs.generate(teacher, 10e6, 256, 512, device, "fp8"),
        jobs.generate(student, 10e6, 256, 512, device),
        jobs.distil(student, teacher, 10e6 * 768, device, 768),
        jobs.prefer(student, 10e6, 256, 512, device),
    ]
    whole = jobs.total("all", work)
    assert whole.money is not None
    assert 5_000 < whole.money[0] < whole.money[1] < 50_000
    assert whole.device_hours == sum(each.device_hours for each in work)
    unknown = jobs.total("all", [*work, work[0]._replace(money=None)])
    assert unknown.money is None


def test_decoding_is_limited_by_bandwidth() -> None:
    dense, device = ModelSize(QWEN3_8B), find("h100")
    moved = dense.bytes() + 512 * dense.cache_per_token
    assert jobs.decode_seconds(dense, device) == pytest.approx(moved / (3350e9 * 0.6))
    assert jobs.decode_seconds(dense, device, "int4") < jobs.decode_seconds(dense, device) / 2
    many = jobs.decode_seconds(dense, device, past=0, batch=4096)
    assert many == pytest.approx(4096 * 2 * dense.multiplied / jobs.rate(device))
    assert jobs.decode_seconds(ModelSize(LLAMA_70B), device, "int4") > 0.010


def test_devices_for_a_model() -> None:
    large = ModelSize(LLAMA_70B)
    assert jobs.devices_for(large, find("h100")) == 4
    assert jobs.devices_for(large, find("h100"), "int4") == 1
    assert jobs.devices_for(ModelSize(QWEN3_8B), find("rtx4090")) == 1


def test_more_devices_are_never_faster_than_their_number() -> None:
    teacher, device = ModelSize(QWEN3_8B), find("h100")
    student = teacher.resized(layers=24)
    work = jobs.distil(student, teacher, 90e9, device)
    before = work.device_hours
    for count in (2, 8, 64, 512):
        cluster = jobs.Cluster(device, count, batch_tokens=512 * 2048, micro_tokens=2048)
        hours = cluster.hours(work, student, teacher, 4096)
        assert work.device_hours / count <= hours <= before
        before = hours
    starved = jobs.Cluster(device, 512, batch_tokens=512 * 2048, micro_tokens=2048)
    inside = jobs.Cluster(device, 512, 512 * 2048, 2048, "hsdp")
    assert starved.efficiency(student, teacher, 4096) < 0.5  # 64 GB at 50 GB/s for 2,048 tokens
    assert inside.efficiency(student, teacher, 4096) == 1
    seconds = (8 * student.parameters + 2 * teacher.parameters) / 50e9
    assert starved.communication(student, teacher) == pytest.approx(seconds)


def test_the_table_of_devices() -> None:
    for name, device in devices().items():
        assert device.sources["figures"], name
        assert device.price_usd_hour is None or "price" in device.sources
    with pytest.raises(UserError, match=r"no device named 'h10'.*did you mean 'h100'"):
        find("h10")
    with pytest.raises(UserError, match="has no bf16_tflops in the table of devices"):
        jobs.rate(find("phone"))
    assert find("phone").money(1.0) is None


def test_a_broken_table_is_refused(tmp_path: Any) -> None:
    for text, said in {
        "x: {title: y}": "memory_gb: Field required",
        "- x": "write a name and its figures",
        "a: [": "is no table of devices",
    }.items():
        table = tmp_path / f"{len(said)}.yaml"
        table.write_text(text)
        with pytest.raises(UserError, match=said):
            find("x", table)
    assert isinstance(find("h100", TABLE), Device)
