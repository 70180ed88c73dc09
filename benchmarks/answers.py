"""Teaching with answers: hard answers, log-probabilities, a selection, and text of one's own.

    python benchmarks/answers.py --texts ../shared/data --out runs/answers

Student: SmolLM2-135M-Instruct with its MLPs cut to 1,024 channels (80.3 % of the parameters),
repaired; protocol P1. The teacher, the uncut model, answers the first `--prompts` prompts of
`instructions` greedily, with its 20 most likely tokens at each place. Each way of WAYS is taught on
the same number of tokens, repeating its text where that is shorter. Test: perplexity × dense and
KL to the dense model on the first `--text-tokens` tokens of WikiText-2 raw test, of C4, and of the
answers in the last rows of `instructions`, whose prompts nobody was taught on. Resumable: run it
again and it goes on; `--ways` runs some. Writes `answers.md` into `--out`.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from protocol import DENSE, TESTS, blend, figures, table, width_student

from regrow import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    GenerateConfig,
    Options,
    distill,
    evaluate,
    generate,
)

HARD = {"losses": {"cross_entropy": 1.0}, "chosen_by": "last"}
STORED = {"answer_targets": "top_logprobs"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "KL on real text": ("", {}),
    "hard answers": ("theirs", HARD),
    "answers + their 20 log-probabilities": ("theirs", STORED),
    "answers that the teacher reads": ("theirs", {}),
    "a fifth of them, selected": ("selected", {}),
    "text that the teacher wrote by itself": ("own", {}),
}
"""The folder of answers, and the fields of the distillation."""
ANSWER = GenerateConfig(split="all", greedy=True, keep_unfinished=True, top_logprobs=20)
TEST_ROWS = 300
MEASURED = ("wikitext2", "c4", "answers")


def main() -> None:
    arguments = _arguments()
    out, data = arguments.out, blend(arguments.texts)
    out.mkdir(parents=True, exist_ok=True)
    _write_prompts(arguments)
    student = width_student(out, data)
    rows = {"untrained": _measured(student, "untrained", arguments)}
    for way in arguments.ways:
        model = _taught(way, student, data, arguments)
        rows[way] = _measured(model, way, arguments)
        (out / "answers.md").write_text(_table(rows))
    print(_table(rows))


def _write_prompts(arguments: argparse.Namespace) -> None:
    """The first prompts, to be answered, and the last rows, whose answers are a test text."""
    with gzip.open(arguments.texts / "train" / "instructions.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    prompts = [{"prompt": row["prompt"]} for row in rows[: arguments.prompts]]
    tests = [
        {"context": row["prompt"] + "\n", "continuation": row["completion"]}
        for row in rows[-TEST_ROWS:]
    ]
    for name, written in (("prompts", prompts), ("test", tests)):
        text = "".join(json.dumps(row) + "\n" for row in written)
        (arguments.out / f"{name}.jsonl").write_text(text)


def _answers(name: str, arguments: argparse.Namespace) -> Path:
    """The folder of answers with this name."""
    options, new = Options(batch_size=16), arguments.new_tokens
    if name == "own":
        config = GenerateConfig(
            self_prompts=arguments.prompts, max_new_tokens=new, keep_unfinished=True
        )
        return generate(DENSE, None, arguments.out / name, config, options)
    selected = arguments.prompts // 5 if name == "selected" else None
    config = ANSWER.model_copy(update={"max_new_tokens": new, "select": selected})
    prompts = DataConfig.model_validate({"sources": [str(arguments.out / "prompts.jsonl")]})
    return generate(DENSE, prompts, arguments.out / name, config, options)


def _taught(way: str, student: Path, data: DataConfig, arguments: argparse.Namespace) -> Path:
    folder, fields = WAYS[way]
    config = DistillConfig(
        tokens=arguments.tokens,
        batch_tokens=1024,
        eval_tokens=max(1024, arguments.tokens // 3),
        heldout_sequences=8,
        answers=str(_answers(folder, arguments)) if folder else None,
        **fields,
    )
    return distill(student, DENSE, data, arguments.out / _folder(way), config, Options())


def _measured(model: Path, name: str, arguments: argparse.Namespace) -> list[str]:
    place = arguments.out / "measured" / _folder(name)
    texts = {test: str(arguments.texts / TESTS[test]) for test in MEASURED[:2]}
    config = EvaluateConfig(
        metrics=("size", "perplexity", "kl"),
        texts={**texts, "answers": str(arguments.out / "test.jsonl")},
        text_tokens=arguments.text_tokens,
    )
    evaluate({"student": model}, place, None, DENSE, config, Options(batch_size=2))
    found = figures(place)
    cells = []
    for test in MEASURED:
        ratio = found["student"][f"perplexity/{test}"] / found["teacher"][f"perplexity/{test}"]
        cells += [f"{ratio:.3f}", f"{found['student'][f'kl/{test}']:.3f}"]
    return cells


def _folder(way: str) -> str:
    return way.replace(" ", "-").replace(",", "").replace("+", "and").lower()


def _table(rows: dict[str, list[str]]) -> str:
    columns = (title for test in MEASURED for title in (f"{test} × dense", f"{test} KL"))
    return table(["way", *columns], rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--prompts", type=int, default=500, help="prompts that are answered")
    parser.add_argument("--new-tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--tokens", type=int, default=50_176, help="training tokens of each way")
    parser.add_argument("--text-tokens", type=int, default=4096, help="of each test text")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    return parser.parse_args()


if __name__ == "__main__":
    main()
