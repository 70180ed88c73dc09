"""Output head and forward KL alone, forward and backward: peak memory, time, exactness.

    python benchmarks/head.py

8,192 tokens, hidden 1,024, vocabulary 151,936 (a Qwen3 head), everything in bf16; a student and a
teacher about 0.5 nats apart, each with a head of its own:

    plain           full logits of both, torch's kl_div over them in float32
    liger           LigerFusedLinearJSDLoss(beta=0) as it comes: chunks of 1,024 tokens, compiled
    liger, eager    the same with compiled=False
    ours            head_loss, chunks of 16.8 M logits, gradients summed in float32

Peak: of a process per kind and size, above weights and inputs, gradients included; a kind that does
not fit into the memory that is free is said so. Time: kinds in turn in one process, medians of the
ratios within a turn, on the largest size that all fit in. Error: of the gradients by hidden states
and by weights on 512 tokens, Frobenius, relative, against float64 over the same bf16 inputs.
Liger is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from process_memory import peak_above
from torch import Tensor
from torch.nn import functional

from regrow.training.head import Head, head_loss
from regrow.training.loss_weights import LossWeights

H, V = 1024, 151_936
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Student's hidden states [N, H] and head [V, H], both leaves; then the teacher's."""


def plain(student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor) -> Tensor:
    return functional.kl_div(
        (student_NH @ student_VH.T).float().log_softmax(-1),
        (teacher_NH @ teacher_VH.T).float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


def liger(
    student_NH: Tensor,
    student_VH: Tensor,
    teacher_NH: Tensor,
    teacher_VH: Tensor,
    compiled: bool = True,
) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    targets_N = torch.zeros(len(student_NH), dtype=torch.int64)
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=compiled)
    value: Tensor = loss(student_NH, student_VH, teacher_NH, teacher_VH, targets_N)
    return value


def liger_eager(*tensors: Tensor) -> Tensor:
    return liger(*tensors, compiled=False)


def ours(student_NH: Tensor, student_VH: Tensor, teacher_NH: Tensor, teacher_VH: Tensor) -> Tensor:
    targets_N = torch.zeros(len(student_NH), dtype=torch.int64)
    mix = LossWeights({"forward_kl": 1.0})
    total, _ = head_loss(student_NH, Head(student_VH), targets_N, mix, teacher_NH, Head(teacher_VH))
    return total / len(student_NH)


KINDS: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "plain": (plain, None),
    "liger": (liger, "liger_kernel"),
    "liger, eager": (liger_eager, "liger_kernel"),
    "ours": (ours, None),
}


def main() -> None:
    arguments = _arguments()
    if arguments.only:
        _child(arguments.only, arguments.tokens)
        return
    kinds = [k for k, (_, package) in KINDS.items() if package is None or find_spec(package)]
    sizes = (arguments.tokens // 4, arguments.tokens // 2, arguments.tokens)
    errors = {kind: _ask(kind, "error", 512) for kind in kinds}
    peaks = {(kind, n): _ask(kind, "peak", n) for kind in kinds for n in sizes}
    timed = max(n for n in sizes if all(peaks[kind, n] for kind in kinds))
    ratios = _ask("all", "time", timed, arguments.turns) or {}
    print(f"| |{''.join(f' peak at {n:,} tokens, GB |' for n in sizes)}", end="")
    print(f" time at {timed:,}, ours ÷ it | error by hidden states | by weights |")
    print("|---|" + "---:|" * (len(sizes) + 3))
    for kind in kinds:
        cells = [kind]
        for n in sizes:
            peak = peaks[kind, n]
            cells.append(f"{peak['gigabytes']:.2f}" if peak else "does not fit")
        cells.append(f"{ratios[kind]:.2f}")
        error = errors[kind] or {}
        cells += [f"{error[name]:.1e}" for name in ("hidden", "weight")]
        print("| " + " | ".join(cells) + " |", flush=True)


def _ask(kind: str, quantity: str, tokens: int, turns: int = 1) -> dict[str, float] | None:
    """What a process of its own finds; None where it gets no memory."""
    flags = ["--tokens", str(tokens), "--turns", str(turns)]
    command = [sys.executable, __file__, "--only", f"{quantity}:{kind}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        assert "allocate memory" in done.stderr or "MemoryError" in done.stderr, done.stderr
        return None
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(quantity, kind, tokens, answer, file=sys.stderr, flush=True)
    return answer


def _child(only: str, tokens: int) -> None:
    quantity, kind = only.split(":")
    limit = _free() - 10**9  # an error, not the kernel's killing of some process
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    answer = {"peak": _peak, "error": _error, "time": _times}[quantity](kind, tokens)
    print(json.dumps(answer))


def _free() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def _tensors(tokens: int) -> Tensors:
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(tokens, H), torch.randn(V, H).mul_(2 / H**0.5)
    other_VH = torch.randn(V, H).mul_(H**-0.5).add_(weight_VH).bfloat16()
    leaves = (hidden_NH.bfloat16().requires_grad_(), weight_VH.bfloat16().requires_grad_())
    return (*leaves, hidden_NH.bfloat16(), other_VH)


def _step(kind: str, tensors: Tensors) -> None:
    for leaf in tensors[:2]:
        leaf.grad = None
    KINDS[kind][0](*tensors).backward()  # type: ignore[no-untyped-call]


def _peak(kind: str, tokens: int) -> dict[str, float]:
    _step(kind, _tensors(64))  # loads and compiles what is needed
    tensors = _tensors(tokens)
    return {"gigabytes": peak_above(lambda: _step(kind, tensors)) / 1e9}


def _error(kind: str, tokens: int) -> dict[str, float]:
    tensors = _tensors(tokens)
    student_NH, student_VH, teacher_NH, teacher_VH = tensors
    _step(kind, tensors)
    with torch.no_grad():
        slope_NV = (student_NH.double() @ student_VH.double().T).softmax(-1)
        slope_NV -= (teacher_NH.double() @ teacher_VH.double().T).softmax(-1)
        slope_NV /= tokens
        pairs = {
            "hidden": (student_NH.grad, slope_NV @ student_VH.double()),
            "weight": (student_VH.grad, slope_NV.T @ student_NH.double()),
        }
        return {
            name: float((true - actual).norm() / true.norm())  # type: ignore[operator]
            for name, (actual, true) in pairs.items()
        }


def _times(_: str, tokens: int) -> dict[str, float]:
    """By kind, ours ÷ it."""
    kinds = [k for k, (_, package) in KINDS.items() if package is None or find_spec(package)]
    tensors, times = _tensors(tokens), {kind: list[float]() for kind in kinds}
    for turn in range(1 + _arguments().turns):
        for kind in kinds:
            start = time.perf_counter()
            _step(kind, tensors)
            if turn:  # the first warms up
                times[kind].append(time.perf_counter() - start)
    pairs = {kind: zip(times["ours"], seconds, strict=True) for kind, seconds in times.items()}
    return {
        kind: median(ours_s / other_s for ours_s, other_s in turns_of_kind)
        for kind, turns_of_kind in pairs.items()
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="the largest of three sizes")
    parser.add_argument("--turns", type=int, default=3, help="turns that are timed")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
