"""Ways of repair compared, on one cut of SmolLM2-135M-Instruct.

    python benchmarks/repair.py --texts ../shared/data --out runs/repair

Resumable: run it again and it goes on. The MLPs are cut to 1,024 channels by plain L2 activation
(four fifths of the parameters); calibration text and blend of protocol P1 (p1.py), in 96 and in 256
blocks of 512. Rows: no repair; on Gram matrices, each token weighted alike or by 1/|residual|²;
layer after layer with none, half or all of the upstream error as target. Measured on what nothing
was calibrated on, 16,384 tokens each: perplexity × dense on WikiText-2 raw test, and KL to the
dense model there and on the C4 sample. Writes `repair.md` into `--out`.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import DENSE, blend, figures, measure

from regrow import Options, ProfileConfig, PruneConfig, profile
from regrow.profile_folder import Profile
from regrow.stages.prune.stage import prune

PPL = "perplexity/wikitext2"
KLS = ("kl/wikitext2", "kl/c4")


@dataclass(frozen=True)
class Way:
    """A row: what repairs, on how many blocks, and with which profile's token weights."""

    name: str
    samples: int
    config: dict[str, Any]
    weight: str = "inverse_residual"


def settings_of(few_samples: int, many_samples: int) -> list[Way]:
    """The rows, from none to the most."""
    settings = [Way("none", few_samples, {"repair": False})]
    for weight in ("uniform", "inverse_residual"):
        settings.append(Way(f"gram, {weight}", few_samples, {"repair_method": "gram"}, weight))
    settings.append(Way("gram, inverse_residual", many_samples, {"repair_method": "gram"}))
    for share in (0.0, 0.5, 1.0):
        settings.append(
            Way(f"sequential, {share:g} of the upstream error", few_samples, {"upstream": share})
        )
    settings.append(Way("sequential, 1 of the upstream error", many_samples, {"upstream": 1.0}))
    return settings


def main() -> None:
    arguments = _arguments()
    out, texts = arguments.out, arguments.texts
    tests = (texts, ("wikitext2", "c4"), arguments.text_tokens)
    dense = measure({"dense": DENSE}, out / "dense", *tests)["dense"]
    lines = [
        "| repair | calibration tokens | WikiText-2 ppl × dense | KL WikiText-2 | KL C4 |",
        "|---|" + "---:|" * 4,
    ]
    for setting in settings_of(*arguments.samples):
        place = out / f"{setting.name.replace(' ', '-')}-{setting.samples}"
        if not (place / "evaluation" / "evaluation.json").exists():
            _make(setting, place / "model", out, texts)
            measure({"model": place / "model"}, place / "evaluation", *tests)
            shutil.rmtree(place / "model")
        row = figures(place / "evaluation")["model"]
        cells = [setting.name, f"{setting.samples * 512:,}", f"{row[PPL] / dense[PPL]:.3f}"]
        lines.append("| " + " | ".join(cells + [f"{row[name]:.3f}" for name in KLS]) + " |")
        (out / "repair.md").write_text("\n".join(lines) + "\n")
    print((out / "repair.md").read_text())


def _make(setting: Way, folder: Path, out: Path, texts: Path) -> None:
    fields = dict(setting.config)
    config = PruneConfig(
        intermediate_size=1024,
        repair_tokens=setting.samples * 512,
        repair_upstream=fields.pop("upstream", 1.0),
        **fields,
    )
    prune(DENSE, folder, config, _profile(setting, out, texts), options=Options(batch_size=4))


def _profile(setting: Way, out: Path, texts: Path) -> Profile:
    config = ProfileConfig.model_validate(
        {
            "criteria": ("activation_l2",),
            "samples": setting.samples,
            "gram_tokens": setting.samples * 512,
            "grams": ("mlp",),
            "token_weight": setting.weight,
        }
    )
    return profile(DENSE, blend(texts), out / f"profile-{setting.weight}-{setting.samples}", config)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--samples", type=int, nargs=2, default=(96, 256), help="blocks of 512")
    parser.add_argument("--text-tokens", type=int, default=16384, help="test tokens of each text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
