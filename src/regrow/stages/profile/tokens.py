"""Count token ids over far more text than runs through the model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.data import DataConfig
from regrow.data.blend import Job, blend
from regrow.progress import progress


def count_tokens(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, tokens: int
) -> Tensor:
    """Occurrences [vocab_size, 1] of each id in about the first `tokens` of the calibration split.

    The documents are those of the blend, none twice; ids beyond the vocabulary are not counted.
    """
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    seen = 0
    with progress("counting tokens", tokens) as counter:
        for document in blend(Job(data, tokenizer, "calibration", None)):
            ids = torch.tensor(document.ids, dtype=torch.int64)
            counts_V += torch.bincount(ids[ids < vocab_size], minlength=vocab_size)
            seen += len(ids)
            counter.advance(len(ids))
            if seen >= tokens:
                break
    return counts_V.float()[:, None]
