"""Every importance criterion, without and with repair, at three sizes of SmolLM2-135M-Instruct.

    python benchmarks/criteria.py --texts ../shared/data --out runs/criteria

Resumable: run it again and it goes on. Calibration text, blend and test of protocol P1 (p1.py):
perplexity in bf16 on the first 16,384 tokens of WikiText-2 raw test in windows of 512, and KL to
the dense model there. Only the MLPs are cut, to 90, 80 and 70 % of all parameters; repair is that
on Gram matrices (repair.py compares it with others). Writes `criteria.md` into `--out`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from protocol import DENSE, blend, figures, measure

from regrow import ProfileConfig, PruneConfig, profile, prune
from regrow.profile_folder import Profile

CRITERIA = (
    *("activation_l2", "minitron", "wanda", "fluctuation", "gradient", "taylor", "fisher", "obs"),
    *("magnitude", "magnitude_l1", "random"),
)
WIDTHS = (1280, 1024, 768)
PPL = "perplexity/wikitext2"


def main() -> None:
    arguments = _arguments()
    out, texts = arguments.out, arguments.texts
    config = ProfileConfig(criteria=CRITERIA, samples=arguments.samples, grams=("mlp",))
    measured = profile(DENSE, blend(texts), out / "profile", config)
    dense = measure({"dense": DENSE}, out / "dense", texts)["dense"]
    lines = [
        "| criterion | kept | ppl × dense | repaired | KL | repaired |",
        "|---|---|" + "---:|" * 4,
    ]
    for width in arguments.widths:
        for criterion in arguments.criteria:
            lines.append(_row(criterion, width, measured, out, texts, dense))
            (out / "criteria.md").write_text("\n".join(lines) + "\n")
    print((out / "criteria.md").read_text())


def _row(
    criterion: str, width: int, measured: Profile, out: Path, texts: Path, dense: dict[str, float]
) -> str:
    """Prune with and without repair, measure, and drop the models again."""
    place = out / f"{criterion}-{width}"
    models = {name: place / name for name in ("plain", "repaired")}
    if not (place / "evaluation" / "evaluation.json").exists():
        for name, folder in models.items():
            config = PruneConfig(
                intermediate_size=width,
                criterion=criterion,
                repair=name == "repaired",
                repair_method="gram",
            )
            prune(DENSE, folder, config, measured)
        measure(models, place / "evaluation", texts)
        for folder in models.values():
            shutil.rmtree(folder)
    results = figures(place / "evaluation")
    cells = [criterion, f"{results['plain']['parameters'] / dense['parameters']:.1%}"]
    cells += [f"{results[name][PPL] / dense[PPL]:.3f}" for name in models]
    cells += [f"{results[name]['kl/wikitext2']:.3f}" for name in models]
    return "| " + " | ".join(cells) + " |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="MLP channels kept")
    parser.add_argument("--criteria", nargs="*", default=CRITERIA, help="rows of each size")
    parser.add_argument("--samples", type=int, default=96, help="calibration blocks of 512")
    return parser.parse_args()


if __name__ == "__main__":
    main()
