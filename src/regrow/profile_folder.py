"""A profile on disk: statistics and scores per dimension and layer, and Gram matrices.

Keys are `name/dim/layer`. `layer` is a number, or `all` for a dimension of the whole model
(`hidden`, `layers`). A statistic has shape [units, width]; width is head_dim for heads, else 1.
Statistics and scores of `expert_mlp` have shape [experts, units].
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from regrow.checkpoint import Checkpoint

STATISTICS = "statistics.safetensors"
SCORES = "scores.safetensors"
SEQUENCES = "sequences.safetensors"
INFO = "profile.json"


@dataclass(frozen=True)
class Gram:
    """Σ_t w_t x_t x_tᵀ over the inputs x_t [d] of a projection, on two disjoint sets of sequences.

    `fit` and `validate` are float32 [d, d]; profile.json records the token weights w_t.
    """

    fit: Tensor
    validate: Tensor


def scores_for(scores: Tensor, gone: int) -> Tensor:
    """Scores [n] for dropping `gone` units; for a matrix [n, n], its row for that number."""
    return scores if scores.dim() == 1 else scores[max(gone, 1) - 1]


def gram_path(folder: Path, dim: str, layer: int) -> Path:
    """The file with the Gram matrices of the projection that reads `dim` in `layer`."""
    return folder / "grams" / f"{dim}-{layer}.safetensors"


class Profile:
    """A profile folder, read on demand; raises UserError when the folder has no profile."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INFO
        if not path.exists():
            raise UserError(f"no profile in {self.folder}: run regrow profile first")
        self.info: dict[str, Any] = json.loads(path.read_text())

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint that was profiled."""
        return str(self.info["fingerprint"])

    def check_fingerprint(self, checkpoint: Checkpoint) -> None:
        """Raise UserError when another checkpoint was profiled."""
        if self.fingerprint != checkpoint.fingerprint:
            raise UserError(
                f"{self.folder} is the profile of another model ({self.fingerprint[:12]}, this one "
                f"is {checkpoint.fingerprint[:12]}): profile {checkpoint.folder} first"
            )

    def scores(self, criterion: str, dim: str) -> dict[str, Tensor]:
        """Scores [n] of the units by layer (`all` for hidden and layers); the highest are kept.

        For layers the scores may be [n, n], a row for each number of dropped layers: see
        `scores_for`. Raises UserError when the profile has no such scores.
        """
        from safetensors.torch import load_file

        scores = load_file(self.folder / SCORES)
        start = f"{criterion}/{dim}/"
        chosen = {k.removeprefix(start): v for k, v in scores.items() if k.startswith(start)}
        if not chosen:
            known = sorted({key.split("/")[0] for key in scores if f"/{dim}/" in key})
            hint = nearest(criterion, known)
            raise UserError(
                f"{self.folder} has no {criterion!r} scores for {dim}{hint}; it has: "
                f"{', '.join(known) or 'none'}; profile again with --criteria {criterion}"
            )
        return chosen

    def criteria(self, dims: Iterable[str]) -> list[str]:
        """Names of the criteria with scores for all of `dims`."""
        from safetensors import safe_open

        with safe_open(self.folder / SCORES, framework="pt") as file:
            keys = [key.split("/") for key in file.keys()]  # noqa: SIM118
        scored = [{key[0] for key in keys if key[1] == dim} for dim in dims]
        return sorted(set.intersection(*scored))

    def sequences_path(self) -> Path:
        """The file with the profiled sequences; raises UserError when there is none."""
        path = self.folder / SEQUENCES
        if not path.exists():
            raise UserError(f"{self.folder} lacks {SEQUENCES}, its text: profile the model again")
        return path

    def has_gram(self, dim: str) -> bool:
        """Whether the profile has Gram matrices for `dim`."""
        return dim in self.info["grams"]

    def gram(self, dim: str, layer: int) -> Gram:
        """The Gram matrices of the projection that reads `dim` in `layer`, memory-mapped."""
        from safetensors.torch import load_file

        return Gram(**load_file(gram_path(self.folder, dim, layer)))
