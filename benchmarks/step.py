"""One distillation step against the same step by other packages: tokens/s and peak memory.

    python benchmarks/step.py --texts ../shared/data --out runs/step

Every kind has the same teacher (SmolLM2-135M, bf16), student (the same model with noise, float32
master weights under bf16 autocast, fused AdamW), batch and loss (forward KL of every token, but for
sft):

    plain              full logits of both, torch's kl_div over them
    trl gkd            the loss of trl's GKDTrainer on full logits
    trl chunked        the loss of trl's DistillationTrainer, head and loss in tiles
    modelopt           NVIDIA Model-Optimizer's DistillationModel and LogitsDistillationLoss
    sft                no teacher: transformers' own cross-entropy
    ours               lm_head and loss in chunks, the gradient in the forward pass
    ours cached        the same, taught from a top-k cache: no teacher runs, prompts are not scored
    ours checkpointed  ours with --gradient-checkpointing
    ours frozen        ours with --freeze-layers 15, half of the layers, which are the teacher's
    ours lora          ours with --adapter lora: adapters of rank 16 beside frozen bf16 weights
    ours int8 teacher  ours with --teacher-dtype int8
    ours compiled      ours with every block of both models through torch.compile
    ours offloaded     ours with --offload-teacher: a block of the teacher at a time, from its file

Peers that are not installed are left out. Speed: steps taken in turn in one process, medians of the
ratios within a turn. Memory: one process each, peak above what weights, gradients, optimizer state
and teacher take. The floor is 2 N_teacher + 6 N_student operations a token (heads included) at the
rate of a bf16 product of this student's largest shape, measured in the same turns. Resumable: what
was measured is kept in `--out`, where `step.md` is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache as cache_calls
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from process_memory import peak_above
from protocol import DENSE, blend
from torch import Tensor, nn
from torch.nn import functional

from regrow import CacheConfig, cache, families, load
from regrow.data.sequences import build_sequences
from regrow.training import frozen_layers
from regrow.training.adapters import Adapter, targets_in
from regrow.training.cache.folder import Cache
from regrow.training.cache.teacher import CachedTeacher, head_from
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.teacher import Teacher, place_teacher

LENGTH = 512
READ = ("input_ids", "position_ids", "labels")
Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]
"""Packed sequences → their mean loss; all but the cached kind score every token as one document."""


def plain(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    def loss(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        with torch.no_grad():
            target = teacher(input_ids=ids).logits[:, :-1]
        logits = student(input_ids=ids).logits[:, :-1]
        return functional.kl_div(
            logits.float().log_softmax(-1).flatten(0, 1),
            target.float().log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )

    return loss


def trl_gkd(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    from trl.experimental.gkd import GKDTrainer

    def loss(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        logits = student(input_ids=ids).logits[:, :-1]
        with torch.no_grad():
            target = teacher(input_ids=ids).logits[:, :-1]
        found: Tensor = GKDTrainer.generalized_jsd_loss(logits, target, ids[:, 1:], beta=0.0)
        return found

    return loss


def trl_chunked(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        own = student.base_model(input_ids=ids).last_hidden_state[:, :-1]
        with torch.no_grad():
            given = teacher.base_model(input_ids=ids).last_hidden_state[:, :-1]
        heads = (student.get_output_embeddings().weight, teacher.get_output_embeddings().weight)
        found: Tensor = _chunked_divergence_loss(
            own, given, *heads, torch.ones_like(ids[:, 1:]), beta=0.0
        )[0]
        return found

    return loss


def modelopt(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    import modelopt.torch.distill as mtd

    class OnLogits(mtd.LogitsDistillationLoss):
        def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
            return super().forward(logits_s[:, :-1].float(), logits_t[:, :-1].float())

    heads = ("lm_head", "lm_head")
    config = {"teacher_model": teacher, "criterion": {heads: OnLogits(reduction="none")}}
    joined = mtd.convert(student, mode=[("kd_loss", config)])
    joined.train()

    def loss(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        joined(input_ids=ids)
        found: Tensor = joined.compute_kd_loss(loss_reduction_fn=torch.mean)
        return found

    return loss


def sft(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    def loss(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        found: Tensor = student(input_ids=ids, labels=ids).loss
        return found

    return loss


def ours(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    def read(batch: Batch) -> Batch:
        ids = batch["input_ids"]
        positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
        return {"input_ids": ids, "position_ids": positions, "labels": ids}

    return _bound(student, Teacher(teacher), read)


def ours_cached(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    from_disk = CachedTeacher(Cache(cached), head_from(load(DENSE), torch.device("cpu")))
    return _bound(student, from_disk, lambda batch: {name: batch[name] for name in READ})


def ours_checkpointed(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    plain_loss = ours(student, teacher, cached)

    def loss(batch: Batch) -> Tensor:
        student.gradient_checkpointing_enable({"use_reentrant": False})
        found = plain_loss(batch)
        student.gradient_checkpointing_disable()  # others share the student
        return found

    return loss


def ours_frozen(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    assert frozen_layers.same(student, teacher, FROZEN)
    frozen_layers.SharedPrefix(student, teacher, FROZEN, all_layers=False)
    return ours(student, teacher, cached)


def ours_int8_teacher(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    return ours(student, place_teacher(load(DENSE), "int8", torch.device("cpu")), cached)


def ours_offloaded(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    return ours(student, place_teacher(load(DENSE), "disk", torch.device("cpu")), cached)


def ours_compiled(student: nn.Module, teacher: nn.Module, cached: Path) -> Loss:
    for model in (student, teacher):
        for sequence in model.base_model.layers:  # type: ignore[union-attr]
            sequence.compile()
    return ours(student, teacher, cached)


def _bound(
    student: nn.Module, taught_by: Teacher | CachedTeacher, read: Callable[[Batch], Batch]
) -> Loss:
    def loss(batch: Batch) -> Tensor:
        undo = bind_loss(student, taught_by, LossWeights({"forward_kl": 1.0}))
        outputs = student(**read(batch))
        undo()  # others share the student
        found: Tensor = outputs["loss"] / outputs["tokens"]
        return found

    return loss


KINDS: dict[str, tuple[Callable[[nn.Module, nn.Module, Path], Loss], str | None]] = {
    "plain": (plain, None),
    "trl gkd": (trl_gkd, "trl"),
    "trl chunked": (trl_chunked, "trl"),
    "modelopt": (modelopt, "modelopt"),
    "sft": (sft, None),
    "ours": (ours, None),
    "ours cached": (ours_cached, None),
    "ours checkpointed": (ours_checkpointed, None),
    "ours frozen": (ours_frozen, None),
    "ours lora": (ours, None),
    "ours compiled": (ours_compiled, None),
    "ours int8 teacher": (ours_int8_teacher, None),
    "ours offloaded": (ours_offloaded, None),
}
CHANGED = ("modelopt", "ours compiled", "ours frozen", "ours lora")
"""Kinds that do something to the student, and have one of their own."""
FROZEN = 15
"""Blocks that `ours frozen` does not train."""


def main() -> None:
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    if arguments.memory:
        step = _step(arguments.memory, arguments)
        step()  # makes gradients and optimizer state
        print(json.dumps({"gigabytes": peak_above(step) / 1e9}))
        return
    asked = {kind: KINDS[kind][1] for kind in arguments.kinds}
    kinds = [k for k, package in asked.items() if package is None or find_spec(package)]
    config = CacheConfig(tokens=arguments.sequences * LENGTH, heldout_sequences=1, format="topk")
    cache(DENSE, blend(arguments.texts), arguments.out / "cache", config)
    rates, ratios, losses = _kept(arguments.out / "speed.json", lambda: _speed(kinds, arguments))
    memory = {
        kind: _kept(
            arguments.out / f"{kind.replace(' ', '-')}.json",
            lambda kind=kind: _memory_of(kind, arguments),  # type: ignore[misc]
        )
        for kind in kinds
    }
    lines = ["| step | tokens/s | ours ÷ it | peak (GB) | loss |", "|---|" + "---:|" * 4]
    for kind in kinds:
        lines.append(
            f"| {kind} | {rates[kind]:.0f} | {ratios[kind]:.2f} | {memory[kind]:.2f} "
            f"| {losses[kind]:.5f} |"
        )
    lines.append(f"| floor | {rates['floor']:.0f} | {ratios['floor']:.2f} | – | – |")
    (arguments.out / "step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _kept(path: Path, measure: Callable[[], Any]) -> Any:
    """What was measured before, else now."""
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def _step(kind: str, arguments: argparse.Namespace) -> Callable[[], float]:
    """A whole optimizer step of a kind; gives the loss."""
    student, teacher, optimizer = _models(kind if kind in CHANGED else "shared")
    count = arguments.sequences
    sequences = build_sequences(blend(arguments.texts), load(DENSE).tokenizer(), "train", count)
    batch = next(sequences.batches(count))
    loss_of = KINDS[kind][0](student, teacher, arguments.out / "cache")

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return float(loss.detach())

    return run


@cache_calls
def _models(whose: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Student, teacher and optimizer; those of a kind that changes the student are its own."""
    dense = load(DENSE)
    student, teacher = dense.model(torch.float32), dense.model(torch.bfloat16)
    if whose == "ours lora":
        student = Adapter(16, 32.0, targets_in(student)).model(dense, torch.device("cpu"), seed=0)
    if whose == "ours frozen":
        frozen_layers.freeze(student, FROZEN)
    trained = [each for each in student.parameters() if each.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a student that differs, so that there is a loss
        for parameter in trained if whose == "ours frozen" else student.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    optimizer = torch.optim.AdamW(trained, lr=1e-7, fused=True)
    return student.train(), teacher.requires_grad_(False), optimizer


def _speed(
    kinds: list[str], arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Tokens/s, the ratio of ours to each, and the first loss, by kind."""
    steps = {kind: _step(kind, arguments) for kind in kinds}
    tokens = arguments.sequences * LENGTH
    losses = {kind: step() for kind, step in steps.items()}  # warms up, too
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "floor")}
    for _ in range(arguments.steps):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            times[kind].append(time.perf_counter() - start)
        times["floor"].append(_floor_seconds() * tokens)
    rates = {kind: tokens / median(seconds) for kind, seconds in times.items()}
    ratios = {
        kind: median(other / own for other, own in zip(seconds, times["ours"], strict=True))
        for kind, seconds in times.items()
    }
    return rates, ratios, losses


def _floor_seconds() -> float:
    """Of one token: 2 N_t + 6 N_s operations at the rate of a large bf16 product."""
    dense = load(DENSE)
    count = families.of(dense).count(dense.config)
    x, w = torch.randn(2048, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    start = time.perf_counter()
    for _ in range(20):
        _ = x @ w.T
    rate = 20 * 2 * 2048 * 576 * 1536 / (time.perf_counter() - start)
    return 8 * count / rate


def _memory_of(kind: str, arguments: argparse.Namespace) -> float:
    same = {"texts": arguments.texts, "out": arguments.out, "sequences": arguments.sequences}
    flags = [str(part) for name, value in same.items() for part in (f"--{name}", value)]
    command = [sys.executable, __file__, "--memory", kind, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["gigabytes"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--steps", type=int, default=6, help="turns that are timed")
    parser.add_argument(
        "--sequences", type=int, default=4, help="sequences of 512 tokens in a step"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--memory", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
