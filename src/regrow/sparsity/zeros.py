"""The zeros of a sparse model: to find them, and to hold them at zero in training.

A weight is a matrix of a decoder layer, or a stack of such matrices (experts).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from regrow import stage_dir
from regrow.errors import UserError
from regrow.runtime.progress import say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regrow.checkpoint import Checkpoint

LEAST = 0.3
"""A weight with this share of exact zeros counts as sparse. Dense weights have nearly none."""
NOTE = stage_dir.SPARSITY
"""The entry of a manifest that names the sparsity of a model's weights. In a recipe's plan, what
is known of zeros that a stage would fill: "the weights are sparse after stages.0.sparsify"."""


def share(weight: Tensor) -> float:
    """The share of exact zeros."""
    return float((weight == 0).sum()) / weight.numel()


def is_sparse(weight: Tensor, least: float = LEAST) -> bool:
    """Whether a weight has at least the share `least` of zeros, but not only zeros.

    A weight of zeros alone is one that training shall fill, as in a layer that was added.
    """
    return least <= share(weight) < 1


def held(weight: Tensor, least: float = LEAST) -> Tensor | None:
    """True at the zeros of a sparse weight; None for a weight that is not sparse."""
    return weight == 0 if is_sparse(weight, least) else None


def least_share(checkpoint: Checkpoint) -> float:
    """The least share of zeros of a sparse weight: 0 for a model that was made sparse."""
    return LEAST if recorded(checkpoint) is None else 0.0


def recorded(checkpoint: Checkpoint) -> str | None:
    """The sparsity that the checkpoint's manifest names."""
    found = (stage_dir.read(checkpoint.folder) or {}).get(NOTE)
    return None if found is None else str(found)


def sparsity_of(checkpoint: Checkpoint) -> str | None:
    """The sparsity of a checkpoint: by its manifest, or by its middle layer; None if it is dense.

    Only the weights of that layer are read.
    """
    noted = recorded(checkpoint)
    if noted is not None:
        return noted
    middle = f".layers.{int(checkpoint.config.get('num_hidden_layers', 0)) // 2}."
    shares = [share(weight) for name, weight in weights(checkpoint, middle)]
    sparse = [each for each in shares if LEAST <= each < 1]
    return f"{sum(sparse) / len(sparse):.2g}" if sparse else None


def weights(checkpoint: Checkpoint, inside: str = ".layers.") -> Iterator[tuple[str, Tensor]]:
    """Name and value of each matrix with `inside` in its name, one after the other."""
    for name, shape in checkpoint.shapes.items():
        if inside in name and len(shape) == 2:
            yield name, checkpoint.tensor(name)


def hold(layer: nn.Module, least: float = LEAST) -> tuple[int, int]:
    """Hold the zeros of a layer's sparse weights at zero; returns their number, and of how many.

    Their gradients become zero before the gradient norm is taken. Adam and its weight decay then
    leave them at zero, because their step is 0 where all gradients were 0 and the weight is 0.
    """
    zero = total = 0
    for parameter in layer.parameters():
        if parameter.ndim < 2 or not parameter.requires_grad or not is_sparse(parameter, least):
            continue
        mask = parameter.detach() == 0
        if not mask.any():
            continue
        parameter.register_hook(_Masked(mask))
        zero, total = zero + int(mask.sum()), total + mask.numel()
    return zero, total


def keep(stage: str, layers: Iterable[nn.Module], student: Checkpoint) -> None:
    """Hold the zeros in the layers of a sparse student, and say how many they are."""
    sparsity = sparsity_of(student)
    if sparsity is None:
        return
    least = least_share(student)
    counts = [hold(layer, least) for layer in layers]
    held, total = (sum(column) for column in zip(*counts, strict=True))
    say(f"{stage}: the student is sparse ({sparsity}): {held:,} of {total:,} weights stay zero")


class _Masked:
    """Sets a gradient to 0 where the mask is True."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, gradient: Tensor) -> Any:
        if self.mask.device != gradient.device:
            self.mask = self.mask.to(gradient.device)
        return gradient.masked_fill(self.mask, 0)


def note_of(checkpoint: Checkpoint) -> str | None:
    """The note on a recipe's own model in its plan; None if it is dense, or quantized."""
    found = None if checkpoint.quantized else sparsity_of(checkpoint)
    return None if found is None else _is_sparse_there(checkpoint, found)


def refuse_filling(checkpoint: Checkpoint, filler: str, advice: str) -> None:
    """Raise UserError if the model is sparse: `filler` computes new weights and fills zeros."""
    found = sparsity_of(checkpoint)
    if found is not None:
        raise would_fill(_is_sparse_there(checkpoint, found), filler, advice)


def _is_sparse_there(checkpoint: Checkpoint, found: str) -> str:
    return f"{checkpoint.folder} has sparse weights ({found})"


def would_fill(sparse: str, filler: str, advice: str) -> UserError:
    """The error for something that would fill the zeros of sparse weights."""
    return UserError(f"{sparse}, and {filler} would fill their zeros: {advice}")
