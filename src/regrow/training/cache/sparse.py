"""A teacher's distribution with the probabilities of only some ids, and the loss against it.

Shapes: N scored tokens, K known ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1
"""The id that fills rows with fewer known ids than others, after these, where there is a tail."""


@dataclass(frozen=True)
class Sparse:
    """Known ids with their probabilities; all other ids are one bucket, or have probability 0."""

    vocab_size: int
    """V: number of ids in the distribution."""
    ids_NK: Tensor
    probability_NK: Tensor
    tail_N: Tensor | None = None
    """Probability of all other ids; None: the known ids are an unbiased sample and sum to 1."""
    entropy_N: Tensor | None = None
    """For samples: the entropy of the sampled distribution, in nats."""

    def __getitem__(self, part: slice | Tensor) -> Sparse:
        return self._each(lambda tensor: tensor[part])

    def to(self, device: torch.device) -> Sparse:
        """Copy to a device."""
        return self._each(lambda tensor: tensor.to(device))

    @staticmethod
    def nothing(vocab_size: int, device: torch.device) -> Sparse:
        """A distribution for no token."""
        none = torch.zeros(0, 1, device=device)
        return Sparse(vocab_size, none.long(), none)

    @staticmethod
    def join(parts: list[Sparse]) -> Sparse:
        """Concatenate; rows with fewer ids are padded with zeros."""
        wide = max(part.ids_NK.shape[1] for part in parts)
        fields: dict[str, Tensor | None] = {}
        for name in ("ids_NK", "probability_NK", "tail_N", "entropy_N"):
            tensors = [tensor for part in parts if (tensor := vars(part)[name]) is not None]
            if name.endswith("NK"):
                pad = torch.nn.functional.pad
                tensors = [pad(tensor, (0, wide - tensor.shape[1])) for tensor in tensors]
            fields[name] = torch.cat(tensors) if tensors else None
        return Sparse(parts[0].vocab_size, **fields)  # type: ignore[arg-type]

    def loss(self, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The KL of each token [N] in nats, and its gradient [N, V] with respect to the logits.

        Overwrites the logits. With a tail, the KL over k + 1 buckets: Σ_b p_b (log p_b − log q_b),
        a lower bound of the full KL. With samples, an unbiased estimate: −Σ p̂ log q − entropy. Both
        are from arXiv:2503.16870.
        """
        padded_NK = self.ids_NK == PADDING
        ids_NK = torch.where(padded_NK, self.ids_NK[:, :1], self.ids_NK)
        known_NK = student_NV.gather(-1, ids_NK).masked_fill(padded_NK, -torch.inf)
        p_NK = self.probability_NK.to(student_NV.dtype)
        if self.tail_N is None:
            log_q_NV = student_NV.log_softmax(-1)
            value_N = -(p_NK * log_q_NV.gather(-1, ids_NK)).sum(-1)
            if self.entropy_N is not None:
                value_N = value_N - self.entropy_N
            return value_N, log_q_NV.exp_().scatter_add_(-1, ids_NK, -p_NK)
        # The softmax over the tail alone: q of a tail id is its share of the tail times q of the
        # tail.
        student_NV.scatter_(-1, ids_NK, -torch.inf)
        log_tail_N = student_NV.logsumexp(-1)
        log_z_N = torch.logaddexp(log_tail_N, known_NK.logsumexp(-1))
        log_q_NK, log_q_tail_N = known_NK - log_z_N[:, None], log_tail_N - log_z_N
        tail_N = self.tail_N.to(student_NV.dtype)
        difference_NK = torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK
        value_N = difference_NK.masked_fill(padded_NK, 0).sum(-1)
        value_N = value_N + torch.xlogy(tail_N, tail_N) - tail_N * log_q_tail_N
        gradient_NV = student_NV.sub_(log_tail_N[:, None]).exp_()
        gradient_NV.mul_((log_q_tail_N.exp() - tail_N)[:, None])
        # The gradient of the known ids is 0 so far, and padding adds 0 to it.
        return value_N, gradient_NV.scatter_add_(-1, ids_NK, log_q_NK.exp() - p_NK)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Sparse:
        tail_N, entropy_N = self.tail_N, self.entropy_N
        return Sparse(
            self.vocab_size,
            change(self.ids_NK),
            change(self.probability_NK),
            None if tail_N is None else change(tail_N),
            None if entropy_N is None else change(entropy_N),
        )
