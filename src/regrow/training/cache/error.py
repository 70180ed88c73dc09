"""How far what is stored lies from the teacher's distribution, in nats.

Shapes: N scored tokens, K known ids, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.training.cache.formats import Format, log_probabilities
from regrow.training.cache.sparse import Sparse
from regrow.training.head import Head

CONVENTIONS = {
    "hidden": "KL(teacher || stored), held-out",
    "topk": "KL(teacher || stored) over k + 1 buckets, held-out",
    "samples": "KL(stored || teacher), held-out: noise of zero mean",
}


def errors(
    form: Format, hidden_NH: Tensor, head: Head, key: bytes, vocab_size: int
) -> dict[str, Tensor]:
    """Per token [N] of a block, by name: `error`, by CONVENTIONS, in nats.

    For k + 1 buckets also `tail`, the mass of the last, and `tail evenly`: the KL over the whole
    vocabulary when the tail is spread evenly over its ids.
    """
    stored = form.decode(form.encode(hidden_NH, head, key))
    found: list[dict[str, Tensor]] = []
    done = 0
    for log_p_NV in log_probabilities(hidden_NH, head, vocab_size):
        part = slice(done, done + len(log_p_NV))
        done = part.stop
        if isinstance(stored, Sparse):
            sparse = stored[part].to(log_p_NV.device)
            found.append(_of_sparse(log_p_NV, sparse))
        else:
            states_NH = stored[part].to(hidden_NH)
            (log_q_NV,) = log_probabilities(states_NH, head, vocab_size)
            found.append({"error": _sum(log_p_NV.exp(), log_p_NV - log_q_NV)})
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def _of_sparse(log_p_NV: Tensor, sparse: Sparse) -> dict[str, Tensor]:
    known_NK, share_NK = log_p_NV.gather(-1, sparse.ids_NK), sparse.probability_NK
    if sparse.tail_N is None:
        return {"error": (torch.xlogy(share_NK, share_NK) - share_NK * known_NK).sum(-1)}
    known = _sum(known_NK.exp(), known_NK - share_NK.log())
    rest_NV = log_p_NV.scatter(-1, sparse.ids_NK, -torch.inf)
    log_rest_N = rest_NV.logsumexp(-1)
    rest_N, log_tail_N = log_rest_N.exp(), sparse.tail_N.log()
    within = torch.xlogy(rest_NV.exp(), rest_NV.exp()).sum(-1)  # Σ p log p over the tail
    each = log_tail_N - torch.tensor(log_p_NV.shape[1] - known_NK.shape[1]).log()
    return {
        "error": known + rest_N * (log_rest_N - log_tail_N),
        "tail": rest_N,
        "tail evenly": known + within - rest_N * each,
    }


def _sum(p: Tensor, difference: Tensor) -> Tensor:
    return (p * difference).sum(-1)
