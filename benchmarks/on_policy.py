"""On-policy distillation against off-policy KL at equal time.

    python benchmarks/on_policy.py --texts ../shared/data --out runs/on_policy --seconds 480

Student: SmolLM2-135M-Instruct with its MLPs cut to 1,024 channels (80.3 % of the parameters),
repaired; text and test of protocol P1. Each way of WAYS is distilled for about `--seconds`: a pilot
of 8 steps gives its tokens per second. Then two things are measured. On text (the first 4,096
tokens of WikiText-2 raw test and of C4): perplexity × dense and KL to the dense model. On
what the student writes itself after the beginnings of `--prompts` passages of C4 that nobody
trained on: KL(student ‖ dense) per written token, and the dense model's perplexity of the written
text. Resumable: run it again and it goes on. Writes `on_policy.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from protocol import DENSE, TESTS, blend, figures, measure, table, width_student

from regrow import DistillConfig, Options, distill
from regrow.checkpoint import load
from regrow.data import DataConfig
from regrow.data.sequences import build_sequences
from regrow.runtime.batch_generator import BatchGenerator, Sampling
from regrow.runtime.precision import half

CPU = torch.device("cpu")
NEW = 96
WAYS: dict[str, dict[str, Any]] = {
    "KL on text": {},
    "half on-policy, reverse KL": {"on_policy_share": 0.5, "on_policy_new_tokens": NEW},
    "half on-policy, JSD": {
        "on_policy_share": 0.5,
        "on_policy_new_tokens": NEW,
        "on_policy_losses": {"jsd": 4.0},
    },
    "all on-policy, reverse KL": {"on_policy_share": 1.0, "on_policy_new_tokens": NEW},
}
BATCH = 1024
OPTIONS = Options(batch_size=2)
SHOWN, TOKENS = ("wikitext2", "c4"), 4096
"""The texts that are measured on, and their first tokens."""


def main() -> None:
    arguments = _arguments()
    out, data = arguments.out, blend(arguments.texts)
    student = width_student(out, data)
    measure({"dense": DENSE}, out / "dense", arguments.texts, SHOWN, TOKENS)
    rows = {"untrained": _row(student, "untrained", 0, 0.0, arguments)}
    for way in arguments.ways:
        model, tokens, seconds = _taught(way, student, data, arguments)
        rows[way] = _row(model, way, tokens, seconds, arguments)
        text = _table(rows)
        (out / "on_policy.md").write_text(text)
    print(text)


def _taught(
    way: str, student: Path, data: DataConfig, arguments: argparse.Namespace
) -> tuple[Path, int, float]:
    """Distil for about the given seconds: the model, its tokens and its seconds of training."""
    place = arguments.out / way.replace(" ", "-").replace(",", "").lower()
    fields = {**WAYS[way], "batch_tokens": BATCH, "heldout_sequences": 8}
    pilot = DistillConfig(tokens=8 * BATCH, **{**fields, "heldout_sequences": 1})
    distill(student, DENSE, data, place / "pilot", pilot, OPTIONS)
    rate = 8 * BATCH / _seconds(place / "pilot")
    kept = place / "tokens.json"
    if not kept.exists():
        tokens = round(arguments.seconds * rate / BATCH) * BATCH
        kept.write_text(json.dumps(tokens))
    tokens = json.loads(kept.read_text())
    config = DistillConfig(tokens=tokens, eval_tokens=max(BATCH, tokens // 3), **fields)
    model = distill(student, DENSE, data, place / "model", config, OPTIONS)
    return model, tokens, _seconds(model)


def _seconds(folder: Path) -> float:
    """Seconds of training of a run that was not interrupted."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row["seconds"] for row in rows if "loss" in row]
    return float(trained[-1])


@torch.no_grad()
def _own_text(model: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """KL(student ‖ dense) per written token, and the dense model's perplexity of the text."""
    text = DataConfig.model_validate(
        {"sources": [str(arguments.texts / TESTS["c4"])], "sequence_length": 64}
    )
    tokenizer = load(DENSE).tokenizer()
    prompts = build_sequences(text, tokenizer, "train", arguments.prompts).input_ids[:, :32]
    student, dense = (load(path).model(half(CPU)) for path in (model, DENSE))
    generator = BatchGenerator(student, tokenizer, Sampling(NEW, seed=1))
    kl = nll = count = 0.0
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32].tolist()
        keys = [str(start + n) for n in range(len(part))]
        for prompt, answer in zip(part, generator.answer(part, keys), strict=True):
            ids = torch.tensor([prompt + answer.ids + ([answer.end] if answer.finished else [])])
            log_q, log_p = (
                each(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                for each in (student, dense)
            )
            written = ids[0, len(prompt) :, None]
            kl += float((log_q.exp() * (log_q - log_p)).sum())
            nll -= float(log_p.gather(-1, written).sum())
            count += len(written)
    return {"own KL": kl / count, "own perplexity": math.exp(nll / count)}


def _row(
    model: Path, name: str, tokens: int, seconds: float, arguments: argparse.Namespace
) -> list[str]:
    place = arguments.out / "measured" / name.replace(" ", "-").replace(",", "").lower()
    measure({"student": model}, place, arguments.texts, SHOWN, TOKENS)
    kept = place / "own_text.json"
    if not kept.exists():
        kept.write_text(json.dumps(_own_text(model, arguments)))
    own, here = json.loads(kept.read_text()), figures(place)["student"]
    dense = figures(arguments.out / "dense")["dense"]
    cells = [f"{tokens:,}", f"{seconds:.0f}"]
    for test in SHOWN:
        cells.append(f"{here[f'perplexity/{test}'] / dense[f'perplexity/{test}']:.3f}")
        cells.append(f"{here[f'kl/{test}']:.3f}")
    return [*cells, f"{own['own KL']:.3f}", f"{own['own perplexity']:.2f}"]


def _table(rows: dict[str, list[str]]) -> str:
    titles = ["way", "tokens", "seconds"]
    for test in SHOWN:
        titles += [f"{test} × dense", f"{test} KL"]
    titles += ["KL on its own text", "dense perplexity of its own text"]
    return table(titles, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--seconds", type=int, default=480, help="seconds of training for each way")
    parser.add_argument("--prompts", type=int, default=64, help="beginnings that are continued")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
