"""Cutting from disk to disk: time against copying the files, anonymous memory against the shards.

    python benchmarks/cut.py --work /tmp/cut --out benchmarks/results

Makes a random Llama of many shards and a profile of random scores and Gram matrices for it, copies
the folder, and prunes it with the command line, repair included, in a process of its own whose
anonymous memory is watched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from process_memory import watch
from safetensors.torch import save_file

from regrow import Plan, families
from regrow.checkpoint import Checkpoint
from regrow.checkpoint.checkpoint import write
from regrow.profile_folder import INFO, SCORES
from regrow.stage_dir import write_json

SHARD = 256_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


TARGET = ["--intermediate-size", "2112", "--num-layers", "21"]


def main() -> None:
    arguments = _arguments()
    model = arguments.work / "model"
    if not (model / "config.json").exists():
        _make(model)
    checkpoint = Checkpoint(model)
    profile = arguments.work / "profile"
    if not (profile / "profile.json").exists():
        _make_profile(profile, checkpoint)
    seconds, peak = _cut(model, arguments.work)
    idle = _watch([sys.executable, "-c", "import regrow.search; import time; time.sleep(1)"])[1]
    plan = Plan.read(arguments.work / "cut" / "plan.json")
    copies, cuts = [], []
    for _ in range(arguments.repeats):  # in turn: both wait for the same disk
        copies.append(_copy(model, arguments.work / "copy"))
        cuts.append(_cut_only(checkpoint, plan, arguments.work / "inside"))
    size = sum(map(checkpoint.bytes, checkpoint.names()))
    copy, cut, above = median(copies), median(cuts), peak - idle
    text = (
        f"| checkpoint | {size / 1e9:.2f} GB in shards of {SHARD / 1e6:.0f} MB |\n|---|---|\n"
        f"| copy the files | {copy:.1f} s |\n"
        f"| cut + save, as a function | {cut:.1f} s = {cut / copy:.2f} × copy |\n"
        f"| `regrow prune --profile`, repair on Gram matrices, whole process | {seconds:.1f} s |\n"
        f"| peak anonymous memory above an idle import | {above / 1e6:.0f} MB "
        f"= {above / SHARD:.2f} shards |\n"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cut.md").write_text(text)
    print(text)


def _make(folder: Path) -> None:
    family = families.get("llama")
    shapes = family.expected(CONFIG)
    layout = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()}
    tensors = ((n, torch.randn(s, dtype=torch.bfloat16) * 0.02) for n, s in shapes.items())
    write(folder, dict(CONFIG), layout, tensors, max_shard_bytes=SHARD)


def _make_profile(folder: Path, checkpoint: Checkpoint) -> None:
    """What `regrow profile` would write, from random activations."""
    (folder / "grams").mkdir(parents=True, exist_ok=True)
    layers, width = CONFIG["num_hidden_layers"], CONFIG["intermediate_size"]
    assert isinstance(layers, int)
    assert isinstance(width, int)
    scores = {f"activation_l2/mlp/{layer}": torch.rand(width) for layer in range(layers)}
    save_file({**scores, "block_influence/layers/all": torch.rand(layers)}, folder / SCORES)
    for layer in range(layers):
        rows = torch.randn(2, width, width)
        fit, validate = rows.transpose(1, 2) @ rows
        save_file({"fit": fit, "validate": validate}, folder / "grams" / f"mlp-{layer}.safetensors")
    info = {"fingerprint": checkpoint.fingerprint, "grams": ["mlp"], "samples": 0, "tokens": 0}
    write_json(folder / INFO, info)


def _copy(model: Path, target: Path) -> float:
    _clear(target)
    start = time.perf_counter()
    shutil.copytree(model, target)
    return time.perf_counter() - start


def _clear(target: Path) -> None:
    """Remove what was there, and let the disk finish what it was given before."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()


def _cut_only(checkpoint: Checkpoint, plan: Plan, target: Path) -> float:
    from regrow.pruning.cut import cut_folder

    _clear(target)
    start = time.perf_counter()
    cut_folder(checkpoint, plan, target)
    return time.perf_counter() - start


def _cut(model: Path, work: Path) -> tuple[float, int]:
    out = work / "cut"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "regrow", "prune", str(model), "--out", str(out)]
    command += ["--repair-method", "gram", "--profile", str(work / "profile")]
    return _watch([*command, *TARGET])


def _watch(command: list[str]) -> tuple[float, int]:
    """Seconds a process took and its peak anonymous memory in bytes."""
    code, seconds, peak = watch(command, stderr=subprocess.DEVNULL)
    assert code == 0, command
    return seconds, peak


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, about 8 GB")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
