"""The first minutes on a GPU: what works there, what it takes, and whether the formulas are right.

    python benchmarks/gpu.py --out runs/gpu                               # all parts, full size
    python benchmarks/gpu.py --out runs/gpu --parts versions head steps   # these parts
    python benchmarks/gpu.py --out runs/cpu --device cpu --scale tiny     # a try without a GPU

Needs no network and no downloaded model: weights are random, the text is made of random words, and
a tokenizer is trained on it. Each part runs in a process of its own with a time limit. After each
part `results.json` in `--out` has what it returned, or how it failed, and `gpu.md` shows it.
Resumable: parts that have succeeded are not run again; `--parts` runs them anew. Full size takes 40
GB of disk and 20 minutes; `--minutes` ends it before (parts that are left run the next time).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.trainer import Trainer

from regrow import (
    CacheConfig,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    GenerateConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    QuantizeConfig,
    cache,
    distill,
    evaluate,
    generate,
    load,
    profile,
    prune,
    quantize,
)
from regrow.cost.memory import training_memory
from regrow.cost.model import ModelSize
from regrow.stages.distill.preflight import setup_of
from regrow.training.head import Head, head_loss
from regrow.training.loss_weights import LossWeights

Result = dict[str, Any]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "torchao", "liger-kernel", "flash-attn")


def shape(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, tied: bool) -> Result:
    """The config of a Qwen3 with heads of 128 channels."""
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }


SHAPES = {
    "0.6B": shape(1024, 3072, 28, 16, 8, True),
    "1.7B": shape(2048, 6144, 28, 16, 8, True),
    "6B": shape(4096, 12288, 24, 32, 8, False),
    "8B": shape(4096, 12288, 36, 32, 8, False),
    "tiny": {
        **shape(64, 160, 4, 4, 2, True),
        "head_dim": 16,
        "vocab_size": 1024,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,  # so that a removed layer matters
    },
}


@dataclass(frozen=True)
class Bench:
    """The arguments of a part: where it works, on which device, at which size."""

    work: Path
    device: str
    tiny: bool

    def model(self, name: str) -> str:
        """A folder with random weights of this shape; made on the first use."""
        name = "tiny" if self.tiny else name
        folder = self.work.parent / "models" / name
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            torch.manual_seed(0)
            with torch.device(self.device):
                config = AutoConfig.for_model(**SHAPES[name])
                drawn = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            drawn.save_pretrained(folder, max_shard_size="4GB")
            tokenizer(self.text()).save_pretrained(folder)
            (folder / "complete").touch()
        return str(folder)

    def text(self) -> Path:
        """A file of random words, about 10 MB (1 MB if tiny)."""
        path = self.work.parent / ("tiny.jsonl" if self.tiny else "text.jsonl")
        if not path.exists():
            draw = random.Random(0)
            words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(2000)]
            rows = (
                json.dumps({"text": " ".join(draw.choices(words, k=800))})
                for _ in range(200 if self.tiny else 2000)
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(rows) + "\n")
        return path

    def data(self, length: int = 512) -> DataConfig:
        """The text in sequences of `length` tokens (128 if tiny)."""
        length = 128 if self.tiny else length
        fields = {"sources": [str(self.text())], "sequence_length": length}
        return DataConfig.model_validate(fields)

    def options(self, **fields: Any) -> Options:
        """The device, and other options."""
        return Options(device=self.device, **fields)

    def measured(self, run: Callable[[], Any]) -> Result:
        """Seconds of `run`, and the peak of the device's memory in GB (None without CUDA)."""
        cuda = self.device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None
        return {"seconds": round(time.perf_counter() - start, 2), "peak_gb": peak}


def versions(bench: Bench) -> Result:
    """Packages and the device."""
    found: Result = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if bench.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "cuda": torch.version.cuda,
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "devices": torch.cuda.device_count(),
        }
    return found


def head(bench: Bench) -> Result:
    """Gradients of head and forward KL against float64, in relative Frobenius norm."""
    tokens, hidden, vocabulary = (64, 64, 1024) if bench.tiny else (512, 1024, 151_936)
    torch.manual_seed(0)
    student_NH, teacher_NH = (torch.randn(tokens, hidden) for _ in range(2))
    weight_VH = torch.randn(vocabulary, hidden) * hidden**-0.5
    parts = (student_NH, weight_VH, teacher_NH)
    inputs = [part.to(bench.device).bfloat16() for part in parts]
    exact = _head_gradients([part.double() for part in inputs])
    result: Result = {}
    for name, is_exact in (("plain", False), ("exact_head", True)):
        for what, found, wanted in zip(
            ("hidden", "weight"), _head_gradients(inputs, exact=is_exact), exact, strict=True
        ):
            error = (found.double() - wanted).norm() / wanted.norm()
            result[f"{name}, gradient by {what}"] = float(f"{float(error):.2g}")
    return result


def _head_gradients(
    inputs: list[Tensor], exact: bool = False, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    student_NH, weight_VH, teacher_NH = inputs
    student_NH, weight_VH = (each.clone().requires_grad_() for each in (student_NH, weight_VH))
    targets_N = torch.zeros(len(student_NH), dtype=torch.long, device=student_NH.device)
    weights = LossWeights({"forward_kl": 1.0}, exact=exact)
    teacher = Head(inputs[1].flip(0))
    total, _ = head_loss(
        student_NH, Head(weight_VH), targets_N, weights, teacher_NH, teacher, chunk_tokens=chunk
    )
    total.backward()
    assert student_NH.grad is not None and weight_VH.grad is not None
    return student_NH.grad, weight_VH.grad


def head_chunks(bench: Bench) -> Result:
    """Time and peak of head and loss by the number of tokens in a chunk, and by default."""
    tokens, hidden, vocabulary = (128, 64, 1024) if bench.tiny else (8192, 4096, 151_936)
    torch.manual_seed(0)
    with torch.device(bench.device):
        shapes = ((tokens, hidden), (vocabulary, hidden), (tokens, hidden))
        inputs = [(torch.randn(s) * hidden**-0.5).bfloat16() for s in shapes]
    result: Result = {}
    for chunk in (None, 64, 128, 256, 512, 1024, 2048, 4096):
        _head_gradients(inputs, chunk=chunk)
        result[str(chunk or "default")] = bench.measured(
            lambda chunk=chunk: _head_gradients(inputs, chunk=chunk)  # type: ignore[misc]
        )
    return result


def commands(bench: Bench) -> Result:
    """Every stage once on a tiny model, each on the result of the one before."""
    tiny = Bench(bench.work, bench.device, True)
    model, data, options, work = tiny.model("tiny"), tiny.data(), tiny.options(), tiny.work
    texts = {"words": str(tiny.text())}
    measured, cut, taught, small = (work / name for name in ("profile", "cut", "taught", "int4"))
    prompts = work / "prompts.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    prompts.write_text(json.dumps({"prompt": "abcde fghij"}) + "\n")
    asked = DataConfig.model_validate({"sources": [str(prompts)], "sequence_length": 128})
    steps: dict[str, Callable[[], Any]] = {
        "profile": lambda: profile(model, data, measured, ProfileConfig(samples=16), options),
        "prune with repair": lambda: prune(
            model,
            cut,
            PruneConfig(intermediate_size=96, num_layers=3, multiple_of=16),
            measured,
            data,
            options,
        ),
        "distill": lambda: distill(cut, model, data, taught, DistillConfig(tokens=4096), options),
        "quantize int4": lambda: quantize(
            taught, small, QuantizeConfig(scheme="int4-g32", method="gptq"), data, options
        ),
        "evaluate": lambda: evaluate(
            {"cut": cut, "taught": taught, "int4": small},
            work / "evaluation",
            data,
            model,
            EvaluateConfig(texts=texts, text_tokens=1024, window=128),
            options,
        ),
        "generate": lambda: generate(
            model,
            asked,
            work / "answers",
            GenerateConfig(max_new_tokens=16, keep_unfinished=True),
            options,
        ),
    }
    return {name: tiny.measured(step)["seconds"] for name, step in steps.items()}


SETTINGS: dict[str, tuple[Result, Result]] = {
    "plain": ({}, {}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "offloaded teacher": ({}, {"offload_teacher": True}),
    "compiled": ({}, {"torch_compile": True}),
    "int8 teacher": ({"teacher_dtype": "int8"}, {}),
    "lora": ({"adapter": "lora"}, {}),
    "adamw_8bit": ({"optimizer": "adamw_8bit"}, {}),
    "adamw_bf16": ({"optimizer": "adamw_bf16"}, {}),
    "feature losses": ({"feature_losses": {"hidden": 1.0, "embeddings": 1.0}}, {}),
    "exact head": ({"exact_head": True}, {}),
    "fake int4": ({"fake_quantize": "int4-g32"}, {}),
    "on-policy": ({"on_policy_share": 0.5, "on_policy_new_tokens": 16}, {}),
    "frozen layers": ({"freeze_layers": 1}, {}),
}
"""Fields of DistillConfig and of Options."""
SAME = ("checkpointing", "offloaded teacher", "compiled")
"""Settings that must end near the loss of the plain run."""


def settings(bench: Bench) -> Result:
    """A tiny distillation with each setting: the held-out KL at start and end, or the error."""
    tiny = Bench(bench.work, bench.device, True)
    model, options = tiny.model("tiny"), tiny.options()
    cut = tiny.work / "cut"
    measure = ProfileConfig(criteria=("block_influence",), samples=8)
    scores = profile(model, tiny.data(), tiny.work / "profile", measure, options)
    prune(model, cut, PruneConfig(num_layers=3, repair=False), scores, None, options)
    cached = cache(model, tiny.data(), tiny.work / "cache", CacheConfig(tokens=8192), options)
    result: Result = {}
    for name, (training, machine) in {
        **SETTINGS,
        "cache": ({"cache": str(cached)}, {}),
    }.items():
        out = tiny.work / f"taught-{name.replace(' ', '-')}"
        config = DistillConfig.model_validate({"tokens": 8192, "learning_rate": 1e-3, **training})
        try:
            distill(cut, model, tiny.data(), out, config, tiny.options(**machine))
        except Exception as error:
            result[name] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            result[name] = _heldout(out)
    plain = result["plain"]
    far = [name for name in SAME if not _near(result[name], plain)]
    return {**result, "far from plain": far}


def _near(found: Any, plain: Any) -> bool:
    """Whether both are pairs of KLs that differ by less than a twentieth of what was learned."""
    if isinstance(found, str) or isinstance(plain, str):
        return False
    (start, end), (_, other) = plain, found
    return bool(abs(end - other) < 0.05 * (start - end))


def _heldout(folder: Path) -> list[float]:
    """The first and the last held-out KL of a distillation, in nats."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    values = [row["heldout_kl"] for row in map(json.loads, lines) if "heldout_kl" in row]
    return [round(values[0], 4), round(values[-1], 4)]


def resume(bench: Bench) -> Result:
    """A distillation killed after its first checkpoint and continued, against one that is not."""
    tiny = Bench(bench.work, bench.device, True)
    model, folders = tiny.model("tiny"), [tiny.work / "whole", tiny.work / "killed"]
    command = [sys.executable, "-m", "regrow", "distill", model, "--teacher", model]
    command += ["--data", str(tiny.text()), "--sequence-length", "128", "--tokens", "16384"]
    command += ["--eval-tokens", "4096", "--device", tiny.device, "--learning-rate", "1e-3"]
    subprocess.run([*command, "--out", str(folders[0])], check=True)
    process = subprocess.Popen([*command, "--out", str(folders[1])])
    partial = folders[1].with_name(folders[1].name + ".partial")
    while process.poll() is None and not list(partial.glob("trainer/checkpoint-*")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    subprocess.run([*command, "--out", str(folders[1])], check=True)
    whole, killed = (load(folder).model(torch.float32).state_dict() for folder in folders)
    apart = max(float((whole[name] - killed[name]).abs().max()) for name in whole)
    return {"largest difference of a weight": apart}


def steps(bench: Bench) -> Result:
    """Tokens/s and peak of a 0.6B student under a 1.7B teacher, by length and setting."""
    result: Result = {}
    for length in (512,) if bench.tiny else (512, 4096):
        for name, machine in (
            ("plain", {}),
            ("checkpointing", {"gradient_checkpointing": True}),
            ("compiled", {"torch_compile": True}),
        ):
            batch = max(1, 16384 // length)
            fields = {"tokens": 12 * batch * length, "batch_tokens": batch * length}
            result[f"{length}, {name}"] = _distilled(
                bench, "0.6B", "1.7B", length, fields, {**machine, "batch_size": batch}
            )
    return result


def lora_8b(bench: Bench) -> Result:
    """LoRA on 8B under an 8B teacher in int8: measured and predicted peak."""
    fields = {"adapter": "lora", "teacher_dtype": "int8", "batch_tokens": 2048, "tokens": 8192}
    return _distilled(bench, "8B", "8B", 512, fields, {"batch_size": 4})


def all_weights_6b(bench: Bench) -> Result:
    """All weights of 6B under an 8B teacher, by optimizer: measured and predicted peak."""
    return {
        name: _distilled(
            bench,
            "6B",
            "8B",
            512,
            {"optimizer": name, "batch_tokens": 2048, "tokens": 8192},
            {"batch_size": 4},
        )
        for name in ("adamw_bf16", "adamw_8bit")
    }


def _distilled(
    bench: Bench, student: str, teacher: str, length: int, fields: Result, machine: Result
) -> Result:
    """A short distillation: tokens/s of its steps, its peak, and what the preflight predicts."""
    if bench.tiny:
        fields = {**fields, "tokens": 1024, "batch_tokens": 256}
        machine = {**machine, "batch_size": 2}
    config = DistillConfig.model_validate({"eval_tokens": 10**9, "heldout_sequences": 1, **fields})
    data, options = bench.data(length), bench.options(**machine)
    models = bench.model(student), bench.model(teacher)
    out = bench.work / "distilled"
    shutil.rmtree(out, ignore_errors=True)
    small, large = (ModelSize(load(model).config) for model in models)
    predicted = training_memory(small, large, setup_of(config, data, options))
    starts: list[float] = []
    taken = Trainer.training_step
    Trainer.training_step = _timed(taken, starts)  # type: ignore[method-assign]
    try:
        measured = bench.measured(lambda: distill(*models, data, out, config, options))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        Trainer.training_step = taken  # type: ignore[method-assign]
        shutil.rmtree(out, ignore_errors=True)
    pauses = [end - begin for begin, end in pairwise(starts)]
    tokens = options.batch_size * data.sequence_length
    return {
        **measured,
        "predicted_gb": round(predicted.total / 1e9, 3),
        "tokens_per_second": round(tokens / median(pauses[len(pauses) // 2 :])),
    }


def _timed(step: Any, starts: list[float]) -> Any:
    def timed(*arguments: Any, **named: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        starts.append(time.perf_counter())
        return step(*arguments, **named)

    return timed


def profile_8b(bench: Bench) -> Result:
    """A profile of 8B, whole on the device and layer by layer."""
    result: Result = {}
    config = ProfileConfig(samples=16 if bench.tiny else 64)
    for order in ("resident", "layer"):
        out = bench.work / order
        shutil.rmtree(out, ignore_errors=True)
        options = bench.options(order=order, batch_size=4)
        data = bench.data(4096)
        result[order] = bench.measured(
            lambda out=out, options=options, data=data: profile(  # type: ignore[misc]
                bench.model("8B"), data, out, config, options
            )
        )
    return result


def prune_8b(bench: Bench) -> Result:
    """A cut of 8B by a fifth with the sequential repair."""
    model, data = bench.model("8B"), bench.data(512)
    config = ProfileConfig(samples=16 if bench.tiny else 96)
    measured = profile(model, data, bench.work / "profile", config, bench.options())
    width = 96 if bench.tiny else 8192
    out = bench.work / "cut"
    shutil.rmtree(out, ignore_errors=True)
    fields = {"intermediate_size": width, "multiple_of": 16}
    cut = PruneConfig.model_validate(fields)
    return bench.measured(lambda: prune(model, out, cut, measured, data, bench.options()))


PARTS: dict[str, tuple[Callable[[Bench], Result], int]] = {
    "versions": (versions, 60),
    "head": (head, 60),
    "head_chunks": (head_chunks, 60),
    "commands": (commands, 120),
    "settings": (settings, 240),
    "resume": (resume, 120),
    "steps": (steps, 240),
    "profile_8b": (profile_8b, 240),
    "prune_8b": (prune_8b, 240),
    "lora_8b": (lora_8b, 180),
    "all_weights_6b": (all_weights_6b, 240),
}
"""Each part, and its time limit in seconds."""


def main() -> None:
    arguments = _arguments()
    out = arguments.out.resolve()
    if arguments.run:
        bench = Bench(out / arguments.run, arguments.device, arguments.scale == "tiny")
        print("\n" + json.dumps(PARTS[arguments.run][0](bench)))
        return
    out.mkdir(parents=True, exist_ok=True)
    kept, begin = out / "results.json", time.monotonic()
    results: Result = json.loads(kept.read_text()) if kept.exists() else {}
    for name in arguments.parts or PARTS:
        if not arguments.parts and "result" in results.get(name, {}):
            continue
        left = 60 * arguments.minutes - (time.monotonic() - begin)
        if left < 20:
            break
        limit = min(PARTS[name][1] * arguments.patience, left)
        results[name] = _run(name, limit, out, arguments)
        shutil.rmtree(out / name, ignore_errors=True)
        kept.write_text(json.dumps(results, indent=1) + "\n")
        (out / "gpu.md").write_text(_table(results))
        print(f"{name}: {json.dumps(results[name])}", flush=True)


def _run(name: str, limit: float, out: Path, arguments: argparse.Namespace) -> Result:
    """A part in a process of its own: its result, or the end of what it printed."""
    command = [sys.executable, __file__, "--run", name, "--out", str(out)]
    command += ["--device", arguments.device, "--scale", arguments.scale]
    start = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return {"timed_out": round(limit), "log": log.read_text()[-800:]}
    seconds = round(time.monotonic() - start, 1)
    if code:
        return {"failed": code, "seconds": seconds, "log": log.read_text()[-2000:]}
    return {"seconds": seconds, "result": json.loads(log.read_text().splitlines()[-1])}


def _table(results: Result) -> str:
    lines = ["| part | what | figure |", "|---|---|---|"]
    for part, outcome in results.items():
        if "result" not in outcome:
            why = "timed out" if "timed_out" in outcome else "failed"
            lines.append(f"| {part} | {why} | {outcome.get('seconds', '')} |")
        for what, figure in outcome.get("result", {}).items():
            if isinstance(figure, dict):
                figure = ", ".join(f"{key} {value}" for key, value in figure.items())
            lines.append(f"| {part} | {what} | {figure} |")
    return "\n".join(lines) + "\n"


def tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens, trained on the text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = text.read_text().splitlines()[:200]
    trained.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and models")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="run only these, anew")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--minutes", type=float, default=30, help="stop after so many")
    parser.add_argument("--patience", type=float, default=1, help="multiplies the time limits")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
