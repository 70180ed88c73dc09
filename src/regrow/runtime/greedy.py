"""Greedy generation with the KV cache, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice, takewhile

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def prefill(model: PreTrainedModel, ids_1T: Tensor) -> tuple[int, DynamicCache]:
    """Return the most likely token after the prompt [1, T], and the KV cache of the prompt."""
    cache = DynamicCache(config=model.config)
    return _next(model, ids_1T, cache), cache


def decode(model: PreTrainedModel, token: int, cache: DynamicCache) -> Iterator[int]:
    """Yield the tokens after `token` without end; each input token is added to the cache."""
    while True:
        token = _next(model, torch.tensor([[token]], device=model.device), cache)
        yield token


@torch.no_grad()
def step(model: PreTrainedModel, ids_BT: Tensor, cache: DynamicCache) -> Tensor:
    """Return the most likely token [B, 1] after each row of `ids_BT`; the cache gets the rows."""
    output = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    likeliest: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
    return likeliest


def _next(model: PreTrainedModel, ids_1T: Tensor, cache: DynamicCache) -> int:
    return int(step(model, ids_1T, cache))


def continuation(
    model: PreTrainedModel, ids: list[int], new_tokens: int, ends: set[int]
) -> list[int]:
    """Return at most `new_tokens` greedy tokens after `ids`, before the first token of `ends`."""
    token, cache = prefill(model, torch.tensor([ids], device=model.device))
    return until(chain([token], decode(model, token, cache)), new_tokens, ends)


def until(tokens: Iterable[int], limit: int, ends: set[int]) -> list[int]:
    """Return at most `limit` tokens, before the first token of `ends`."""
    return list(takewhile(lambda token: token not in ends, islice(tokens, limit)))
