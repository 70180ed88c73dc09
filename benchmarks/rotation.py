"""A cut of the hidden size on the model's own channels, and on its principal directions.

    python benchmarks/rotation.py --texts ../shared/data --out runs/rotation

SmolLM2-135M-Instruct, protocol P1. Untrained KL to the dense model and perplexity × dense on the
first 16,384 tokens of WikiText-2 raw test, plain and repaired, at one hidden size and, since the
rotated model has an output head of its own, at the size that brings it to the same number of
parameters. Resumable. Writes `rotation.md` into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol import DENSE, blend, measure

from regrow import ProfileConfig, PruneConfig, RotateConfig, families, load, profile, prune, rotate

PPL, KL = "perplexity/wikitext2", "kl/wikitext2"


def main() -> None:
    arguments = _arguments()
    out, data = arguments.out, blend(arguments.texts)
    turned = rotate(DENSE, data, out / "turned", RotateConfig(samples=arguments.samples))
    size = arguments.hidden_size
    cuts = {
        f"own channels, hidden {size}": (DENSE, size),
        f"rotated, hidden {size}": (turned, size),
    }
    same = _same_parameters(turned, size)
    cuts[f"rotated, hidden {same}"] = (turned, same)
    config = ProfileConfig(criteria=("activation_l2",), samples=arguments.samples, gram_tokens=0)
    models = {"rotated, uncut": Path(turned)}
    for name, (model, hidden) in cuts.items():
        place = out / ("rotated" if model == turned else "own")
        measured = profile(model, data, place / "profile", config)
        for kind in ("plain", "repaired"):
            sizes = PruneConfig(
                hidden_size=hidden,
                multiple_of=1,
                repair=kind == "repaired",
                repair_tokens=arguments.repair_tokens,
            )
            models[f"{name}/{kind}"] = prune(model, place / f"{hidden}-{kind}", sizes, measured)
    results = measure({"dense": DENSE, **models}, out / "evaluation", arguments.texts)
    dense = results["dense"]
    lines = ["| model | kept | KL | repaired | ppl × dense | repaired |", "|---|" + "---:|" * 5]
    for name in ("rotated, uncut", *cuts):
        rows = [results[key] for key in results if key.split("/")[0] == name]
        cells = [name, f"{rows[0]['parameters'] / dense['parameters']:.1%}"]
        for value in (KL, PPL):
            numbers = [row[value] / (dense[PPL] if value == PPL else 1) for row in rows]
            cells += [f"{number:.3f}" for number in numbers] + ["–"] * (2 - len(numbers))
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (out / "rotation.md").write_text(text)
    print(text)


def _same_parameters(turned: Path, size: int) -> int:
    """The hidden size at which the rotated model is as large as the other at `size`."""
    counts = []
    for model in (DENSE, str(turned)):
        checkpoint = load(model)
        family, config = families.of(checkpoint), checkpoint.config
        step = family.step("hidden", config)
        sizes = range(step, size + 1, step)
        counts.append({n: family.count(config, {"hidden": n}) for n in sizes})
    rotated_count, other = counts
    return min(other, key=lambda n: abs(other[n] - rotated_count[size]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--samples", type=int, default=96, help="calibration blocks of 512")
    parser.add_argument("--repair-tokens", type=int, default=131072, help="at most so many")
    parser.add_argument("--hidden-size", type=int, default=459, help="channels that are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
