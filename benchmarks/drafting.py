"""The metric `acceptance` against real speculative decoding by transformers.

    python benchmarks/drafting.py STUDENT --texts ../shared/data --out runs/drafting

SmolLM2-135M-Instruct samples with STUDENT as its assistant: four drafted tokens per pass,
temperature 1, no other filter. Prompts are the first 64 tokens of LAMBADA rows. Measured: new
tokens per pass of the teacher. Predicted: the metric's formula on the acceptance of the very text
that was generated. It takes two minutes. Writes `drafting.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from protocol import DENSE, TESTS

from regrow.checkpoint import load
from regrow.data.files import open_text
from regrow.stages.evaluate.metrics.acceptance import DRAFTED, accepted_length, per_token

PROMPT = 64


@torch.no_grad()
def main() -> None:
    arguments = _arguments()
    teacher = load(DENSE).model(torch.float32)
    student = load(arguments.student).model(torch.float32)
    for model in (teacher, student):
        model.config.use_cache = True
    student.generation_config.update(
        num_assistant_tokens=DRAFTED,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    teacher.register_forward_hook(count)
    new, accepted = 0, 0.0
    for row, prompt in enumerate(_prompts(arguments.texts, arguments.rows)):
        torch.manual_seed(row)
        text = teacher.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=student,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=arguments.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        used = passes
        logits = [model(text).logits[0, PROMPT - 1 : -1] for model in (student, teacher)]
        passes = used  # the pass that measures does not count
        new += text.shape[1] - PROMPT
        accepted += float(per_token(*logits, text[0, PROMPT:]).sum())
    rate = accepted / new
    lines = [
        "| generated tokens | passes of the teacher | tokens per pass | acceptance | predicted |",
        "|---:|---:|---:|---:|---:|",
        f"| {new:,} | {passes:,} | {new / passes:.3f} | {rate:.3f} "
        f"| {accepted_length(rate, DRAFTED):.3f} |",
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "drafting.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _prompts(texts: Path, rows: int) -> list[torch.Tensor]:
    tokenizer = load(DENSE).tokenizer()
    with open_text(texts / TESTS["lambada"]) as lines:
        contexts = (json.loads(line)["context"] for line in lines)
        ids = (tokenizer(context)["input_ids"] for context in contexts)
        long = (each[:PROMPT] for each in ids if len(each) >= PROMPT)
        return [torch.tensor([each]) for each in islice(long, rows)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
