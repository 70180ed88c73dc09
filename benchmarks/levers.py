"""Levers: ways to bring back the quality of protocol P1's student, at the processor time they take.

    python benchmarks/levers.py --texts ../shared/data --out runs/levers [--only NAME ...]

The students are cuts of SmolLM2-135M-Instruct: `width`, that of protocol P1, has MLPs of 1,024
instead of 1,536 channels and is repaired layer after layer; `depth` has 23 of its 30 layers and is
repaired likewise; `minitron` is the width cut by Minitron's scores and without repair, and
`minitron depth` is the depth cut without repair. `third` has MLPs of 608 channels, 64 % of the
parameters; `half` has 21 layers with MLPs of 576 channels, half of the parameters; and `29 layers`
has one layer less. `--model` names another model, whose students keep the same shares of its
channels and layers. A lever is a student and a list of stages that follow; levers with the same
first stages share them. A stage `cut` profiles the model as it then is, and cuts and repairs it
again. Test: perplexity and KL to the dense model on the first `--text-tokens` tokens of WikiText-2,
LAMBADA and C4, on which nothing is calibrated or trained. Processor time is that of the stages
after the first cut and its repair. Resumable: run it again and it goes on. Writes `levers.md` into
`--out`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import DENSE, TESTS, blend, measure

from regrow import (
    DistillConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    ReconstructConfig,
    distill,
    profile,
    prune,
    reconstruct,
)
from regrow.checkpoint import load
from regrow.checkpoint.resolve import resolve_model
from regrow.training.rates import usual_rate

Step = tuple[str, dict[str, Any]]
Row = dict[str, float]
KL = {"tokens": 100_000, "eval_tokens": 25_000}
SHORT = {"tokens": 50_000}


def kl(**fields: Any) -> Step:
    return ("distill", {**KL, **fields})


def local(**fields: Any) -> Step:
    return ("reconstruct", fields)


def cut(**fields: Any) -> Step:
    return ("cut", fields)


LOCAL = local(tokens=36_864)
AFTER = kl(**SHORT, learning_rate=5e-5)
STUDENTS: dict[str, dict[str, Any]] = {
    "width": {"intermediate_size": 1024 / 1536},
    "depth": {"num_layers": 23 / 30, "layer_criterion": "block_influence"},
    "minitron": {"intermediate_size": 1024 / 1536, "criterion": "minitron", "repair": False},
    "minitron depth": {
        "num_layers": 23 / 30,
        "layer_criterion": "block_influence",
        "repair": False,
    },
    "third": {"intermediate_size": 608 / 1536},
    "half": {
        "intermediate_size": 576 / 1536,
        "num_layers": 21 / 30,
        "layer_criterion": "block_influence",
    },
    "29 layers": {"num_layers": 29 / 30, "layer_criterion": "block_influence", "repair": False},
}
"""Each size is a share of the dense model's. A `rate` of a step is one of its usual rate."""
BRIEF = kl(tokens=7_168, feature_losses={"hidden": 0.1}, balance_feature_losses=True)
ONE_BY_ONE = [
    step
    for layers in range(28, 22, -1)
    for step in (cut(**STUDENTS["29 layers"] | {"num_layers": layers / 30}), BRIEF)
]
WIDTH: dict[str, list[Step]] = {
    "repaired": [],
    "KL 50 k": [kl(**SHORT)],
    "KL 50 k, MLP 3e-4, rest a tenth": [
        kl(**SHORT, learning_rate=3e-4, attention_rate=0.1, embedding_rate=0.1)
    ],
    "KL 50 k, β2 0.999": [kl(**SHORT, beta2=0.999)],
    "local, 37 k tokens twice": [LOCAL],
    "local, 37 k tokens twice, then KL 50 k at 5e-5": [LOCAL, AFTER],
    "local, 37 k tokens twice, then KL 100 k at 5e-5": [LOCAL, kl(learning_rate=5e-5)],
    "KL 100 k": [kl()],
    "local, 98 k tokens twice": [local()],
    "local, 98 k tokens twice, then KL 100 k at 5e-5": [local(), kl(learning_rate=5e-5)],
    "local, 37 k tokens twice, then KL 100 k": [LOCAL, kl()],
    "local, 37 k tokens twice, then KL 50 k at half the default rate": [
        LOCAL,
        kl(**SHORT, rate=0.5),
    ],
    "KL 150 k": [kl(tokens=150_000)],
    "local, 98 k tokens twice, then KL 250 k": [local(), kl(tokens=250_000)],
    "local, 98 k tokens twice, then KL 250 k, 0.3 cross-entropy": [
        local(),
        kl(tokens=250_000, losses={"forward_kl": 0.7, "cross_entropy": 0.3}),
    ],
    "local, 98 k tokens twice, then KL 1 M": [local(), kl(tokens=1_000_000)],
    "local, 37 k tokens twice, then KL 25 k": [LOCAL, kl(tokens=25_000)],
}
OTHERS: dict[str, tuple[str, list[Step]]] = {
    "depth: repaired": ("depth", []),
    "depth: local, 37 k tokens twice": ("depth", [LOCAL]),
    "depth: local, then KL 50 k at 5e-5, 11 layers frozen": (
        "depth",
        [LOCAL, kl(**SHORT, learning_rate=5e-5, freeze_layers=11)],
    ),
    "depth: local, then KL 50 k at 5e-5": ("depth", [LOCAL, AFTER]),
    "depth: KL 100 k": ("depth", [kl()]),
    "depth: KL 50 k": ("depth", [kl(**SHORT)]),
    "−36 %: repaired": ("third", []),
    "−36 %: KL 100 k": ("third", [kl()]),
    "−36 %: local, 37 k tokens twice": ("third", [LOCAL]),
    "−36 %: local, 37 k tokens twice, then KL 50 k at 5e-5": ("third", [LOCAL, AFTER]),
    "−50 %: repaired": ("half", []),
    "−50 %: KL 100 k": ("half", [kl()]),
    "−50 %: local, 37 k tokens twice, then KL 50 k": ("half", [LOCAL, kl(**SHORT)]),
    "−50 % in two rounds: KL 50 k, cut, KL 50 k": (
        "width",
        [kl(**SHORT), cut(**STUDENTS["half"]), kl(**SHORT)],
    ),
    "−36 % in two rounds: KL 50 k, cut, KL 50 k": (
        "width",
        [kl(**SHORT), cut(**STUDENTS["third"]), kl(**SHORT)],
    ),
    "−36 % in two rounds, the second from the first": (
        "width",
        [kl(**SHORT), cut(**STUDENTS["third"]), kl(**SHORT, learn_from="before_prune")],
    ),
    "Minitron's scores, no repair": ("minitron", []),
    "Minitron's scores, no repair: KL 100 k": ("minitron", [kl()]),
    "Minitron's scores, no repair: KL 150 k": ("minitron", [kl(tokens=150_000)]),
    "depth, no repair": ("minitron depth", []),
    "depth, no repair: KL 50 k": ("minitron depth", [kl(**SHORT)]),
    "depth, no repair: KL 100 k": ("minitron depth", [kl()]),
    "depth, layer by layer: KL + hidden, 7 times 7 k": ("29 layers", [BRIEF, *ONE_BY_ONE]),
}
LEVERS = {name: ("width", steps) for name, steps in WIDTH.items()} | OTHERS


def main() -> None:
    arguments = _arguments()
    # The folder, because a GGUF file would be measured by llama.cpp.
    out, dense, data = arguments.out, str(resolve_model(arguments.model)), blend(arguments.texts)
    criteria = ("activation_l2", "minitron", "block_influence")
    config = ProfileConfig(criteria=criteria, samples=96)
    measured = profile(dense, data, out / "profile", config, Options(batch_size=2))
    options = Options(torch_compile=arguments.torch_compile)
    trained: dict[str, tuple[float, Path]] = {}
    for name in arguments.only or LEVERS:
        kind, steps = LEVERS[name]
        student = out / kind.replace(" ", "-")
        prune(dense, student, PruneConfig(**_sized(STUDENTS[kind], dense)), measured, data)
        steps = [(stage, _sized(fields, dense)) for stage, fields in steps]
        trained[name] = _run(student, steps, dense, data, out, options)
    # All at once, because the dense model then reads the texts only once.
    models: dict[str, Path | str] = {model.name: model for _, model in trained.values()}
    found = measure(
        {"dense": dense, **models},
        out / "figures",
        arguments.texts,
        TESTS,
        arguments.text_tokens,
        dense,
    )
    table = _table({name: (s, found[m.name]) for name, (s, m) in trained.items()}, found["dense"])
    (out / "levers.md").write_text(table)
    print(table, flush=True)


def _sized(fields: dict[str, Any], dense: str) -> dict[str, Any]:
    """The fields with shares of the dense model's sizes and usual learning rate as numbers.

    Channels are multiples of 32.
    """
    config = json.loads((Path(dense) / "config.json").read_text())
    sizes = {"intermediate_size": (config["intermediate_size"], 32)}
    sizes["num_layers"] = (config["num_hidden_layers"], 1)
    whole: dict[str, Any] = {
        name: round(share * sizes[name][0] / sizes[name][1]) * sizes[name][1]
        for name, share in fields.items()
        if name in sizes
    }
    if "rate" in fields:
        whole["learning_rate"] = fields["rate"] * usual_rate(load(dense))
    return {name: value for name, value in (fields | whole).items() if name != "rate"}


def _run(
    student: Path, steps: list[Step], dense: str, data: Any, out: Path, options: Options
) -> tuple[float, Path]:
    """Run the steps that are not there yet; returns all their processor seconds and the model."""
    seconds, model, uncut = 0.0, student, str(student)
    for count, (stage, fields) in enumerate(steps, start=1):
        text = json.dumps([student.name, steps[:count]], sort_keys=True)
        folder = out / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        if stage == "cut":
            uncut = str(model)
        fields = dict(fields)
        teacher = uncut if fields.pop("learn_from", None) == "before_prune" else dense
        model, used = _step(model, teacher, folder, stage, fields, data, options)
        seconds += used
    return seconds, model


def _step(
    model: Path,
    teacher: str,
    folder: Path,
    stage: str,
    fields: dict[str, Any],
    data: Any,
    options: Options,
) -> tuple[Path, float]:
    calls: dict[str, Callable[..., Path]] = {"distill": distill, "reconstruct": reconstruct}
    configs: dict[str, Any] = {"distill": DistillConfig, "reconstruct": ReconstructConfig}
    times = folder.with_name(folder.name + ".json")
    used, finished = json.loads(times.read_text()) if times.exists() else 0.0, folder.exists()
    start = time.process_time()
    try:
        if stage == "cut":
            _cut(model, folder, fields, data)
        else:
            calls[stage](model, teacher, data, folder, configs[stage](**fields), options)
    finally:  # also when it is stopped, so that the times of all runs are summed up
        if not finished:
            used += time.process_time() - start
            times.write_text(json.dumps(used))
    return folder, used


def _cut(model: Path, out: Path, fields: dict[str, Any], data: Any) -> None:
    """Profile the model as it is, and cut it."""
    layers = (fields["layer_criterion"],) if "layer_criterion" in fields else ()
    widths = ("activation_l2",) if "intermediate_size" in fields else ()
    samples = 96 if widths else 24  # one number for each layer needs fewer
    config = ProfileConfig(criteria=(*widths, *layers), samples=samples)
    place = out.with_name(out.name + "-profile")
    measured = profile(model, data, place, config, Options(batch_size=2))
    prune(model, out, PruneConfig(**fields), measured, data)


def _table(rows: dict[str, tuple[float, Row]], dense: Row) -> str:
    head = " | ".join(f"{name} × dense | KL" for name in TESTS)
    lines = [f"| lever | processor minutes | {head} |", "|---|---:|" + "---:|---:|" * len(TESTS)]
    for name, (seconds, row) in rows.items():
        cells = [name, f"{seconds / 60:.1f}"]
        for text in TESTS:
            ratio = row[f"perplexity/{text}"] / dense[f"perplexity/{text}"]
            cells += [f"{ratio:.3f}", f"{row[f'kl/{text}']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--model", default=DENSE, help="the dense model")
    parser.add_argument("--text-tokens", type=int, default=8192, help="tokens of each test text")
    parser.add_argument("--torch-compile", action="store_true", help="compile the layers")
    parser.add_argument("--only", nargs="*", choices=LEVERS, help="names of levers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
