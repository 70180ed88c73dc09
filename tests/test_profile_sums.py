"""Sums over tokens in portions, against whole sums in float64."""

from __future__ import annotations

import pytest
import torch

from regrow.stages.profile.collect import PORTION, cosine_distance_sum, square_sum

CHANNELS = 384
TOKENS = 2 * PORTION // CHANNELS + 5


def rows(seed: int, dtype: torch.dtype, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, CHANNELS, generator=generator).to(dtype)


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_equal_those_of_the_whole(dtype: torch.dtype, tokens: int) -> None:
    first, second = rows(0, dtype, tokens), rows(1, dtype, tokens)
    before = first.clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = square_sum(first)
    assert sums.dtype == wide
    torch.testing.assert_close(sums.double(), first.double().square().sum(0), rtol=1e-5, atol=0)
    cosine = torch.cosine_similarity(first.double(), second.double(), dim=-1)
    distance = cosine_distance_sum(first, second)
    assert (distance.dtype, distance.shape) == (wide, (1,))
    torch.testing.assert_close(distance.double(), (1 - cosine).sum()[None], rtol=1e-5, atol=1e-12)
    assert torch.equal(first, before)  # what the model computes on with is not written to
