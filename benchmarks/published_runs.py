"""The cost model against two published distillations: one is fitted, the other is predicted.

    python benchmarks/published_runs.py > benchmarks/results/published_runs.md

Both are examples of NVIDIA Model-Optimizer (repository NVIDIA/Model-Optimizer, read 2026-11-29):
`examples/nemo_run/prune_distill/README.md` (Qwen3-8B cut from 36 to 24 layers, 90·10⁹ tokens of
4,096, about 6,000 H100 hours) and `examples/pruning/minitron/NVIDIA-Nemotron-Nano-9B-v2/README.md`
(9 B to 7 B, 80·10⁹ tokens of 8,192 on 768 GPUs, about 9,000 H100 hours in all; the same page gives
600 hours for 1,000 of the 12,800 steps, which are 7,680). The second model is a hybrid of Mamba and
attention layers, for which regrow has no table: its operations are computed from the parameters
outside the embedding and from its four attention layers; those inside Mamba's scan are left out.
"""

from __future__ import annotations

from regrow.cost import jobs
from regrow.cost.devices import find
from regrow.cost.model import ModelSize

QWEN3_8B = {
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
NEMOTRON_TABLES = (131072 * 4480, 131072 * 4352)
"""Embeddings of teacher and student, which are looked up: vocabulary · hidden."""
NEMOTRON_ATTENTION = 4 * 4 * 40 * 128 * (8192 + 1) / 2
"""Operations of the scores per token: 4 · layers · heads · head_dim · (length + 1) / 2."""


def main() -> None:
    device = find("h100")
    teacher = ModelSize(QWEN3_8B)
    each = jobs.distillation_operations(teacher.resized(layers=24), teacher, 4096)
    rate = device.bf16_tflops * 1e12 if device.bf16_tflops else 0.0
    fitted = 90e9 * each / (6000 * 3600 * rate)
    read, trained = (
        2 * (parameters - table) + NEMOTRON_ATTENTION
        for parameters, table in zip((8.89e9, 7.0e9), NEMOTRON_TABLES, strict=True)
    )
    other = read + 3 * trained
    hours = 80e9 * other / (rate * fitted) / 3600
    print("| run | operations per token, 10⁹ | published, H100 hours | cost model | error |")
    print("|---|---:|---:|---:|---:|")
    print(f"| Qwen3-8B → 6B, 90·10⁹ tokens (fitted) | {each / 1e9:.1f} | 6,000 | 6,000 | – |")
    for published, name in ((9000, "total"), (7680, "by the hours of 1,000 steps")):
        print(
            f"| Nemotron-Nano-9B-v2 → 7B, 80·10⁹ tokens, {name} | {other / 1e9:.1f} "
            f"| {published:,} | {hours:,.0f} | {hours / published - 1:+.0%} |"
        )
    print(f"\nFitted efficiency: {fitted:.3f} of {rate / 1e12:.0f}·10¹² operations per second.")


if __name__ == "__main__":
    main()
