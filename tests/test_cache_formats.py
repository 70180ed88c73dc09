"""Every format of a cache against what it stores, slowly and in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_cache import exact_p, states_and_head
from torch import Tensor

from regrow import plugins
from regrow.errors import UserError
from regrow.stages.cache.stage import CONVENTIONS, errors
from regrow.training.cache import formats
from regrow.training.cache.formats import hidden, log_probabilities, make, samples, topk
from regrow.training.cache.sparse import Sparse
from regrow.training.cache.store import bit_width, pack, packed_bytes, unpack

V, H = 97, 16
SETTINGS: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "k": 5,
    "bits": 8,
    "draws": 20,
    "sampling": "systematic",
    "seed": 0,
    "dtype": "bfloat16",
}
NAMES = plugins.names(formats.__name__)
KEY = b"k" * 32


@pytest.mark.parametrize(
    ("size", "bits"), [(1, 1), (2, 1), (3, 2), (97, 7), (49152, 16), (65537, 17), (151936, 18)]
)
@pytest.mark.parametrize("count", [1, 7, 18])
def test_packed_bits_unpack_to_the_same_numbers(size: int, bits: int, count: int) -> None:
    assert bit_width(size) == bits
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, size, (9, count), generator=draw)
    values[0], values[1] = 0, size - 1
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (9, packed_bytes(count, bits)) == (9, (count * bits + 7) // 8)
    assert torch.equal(unpack(packed, count, bits), values)
    text = "".join(f"{int(value):0{bits}b}" for value in values[5])
    assert "".join(f"{int(byte):08b}" for byte in packed[5]).rstrip("0") == text.rstrip("0")


def test_a_number_that_does_not_fit_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        pack(torch.tensor([[8]]), 3)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_encodes_reproducibly_and_reports_its_error(name: str) -> None:
    """What is stored is small as told, the same each time, and gives about what went in."""
    form = make(name, SETTINGS)
    states, head = states_and_head()
    states = states.bfloat16()
    stored = form.encode(states, head, KEY)
    encoded_again = form.encode(states, head, KEY)
    assert all(torch.equal(value, encoded_again[key]) for key, value in stored.items())
    size = sum(value.numel() * value.element_size() for value in stored.values())
    assert size <= form.bytes_per_token() * len(states)
    assert size >= 0.3 * form.bytes_per_token() * len(states)
    back = form.decode(stored)
    assert isinstance(back, Tensor) == form.STATES
    measured = errors(form, states, head, KEY, V)
    assert measured["error"].shape == (len(states),)
    assert 0 <= float(measured["error"].mean()) < 0.5
    assert name in CONVENTIONS


def test_topk_buckets_are_those_of_the_softmax() -> None:
    states, head = states_and_head()
    p_NV = exact_p(states, head, V)
    form = topk.Format(V, k=5, bits=8)
    back = form.decode(form.encode(states, head, KEY))
    assert isinstance(back, Sparse)
    assert back.tail_N is not None
    for row, (ids, probabilities, tail) in enumerate(
        zip(back.ids_NK, back.probability_NK.double(), back.tail_N.double(), strict=True)
    ):
        assert ids.tolist() == p_NV[row].argsort(descending=True)[:5].tolist()
        exact = torch.cat([p_NV[row, ids], 1 - p_NV[row, ids].sum()[None]])
        buckets = torch.cat([probabilities, tail[None]])
        assert float(buckets.sum()) == pytest.approx(1, abs=1e-6)
        codes = (exact.sqrt() * 255).round().clamp(min=1)
        expected = codes**2 / (codes**2).sum()
        # Rounding in float32 may take a value that lies between two codes to the other one.
        assert float((buckets.sqrt() - exact.sqrt()).abs().max()) < 1.1 / 255
        assert float((buckets - expected).abs().max()) < 2 / 255


@pytest.mark.parametrize("bits", [4, 6, 8, 10])
def test_topk_error_is_the_kl_over_the_buckets(bits: int) -> None:
    """By hand in float64; it falls four-fold with each bit, and tells what the tail would cost."""
    states, head = states_and_head()
    p_NV, form = exact_p(states, head, V), topk.Format(V, k=5, bits=bits)
    back = form.decode(form.encode(states, head, KEY))
    assert isinstance(back, Sparse)
    assert back.tail_N is not None
    measured = errors(form, states, head, KEY, V)
    for row in range(len(states)):
        spread = torch.full((V,), float(back.tail_N[row]) / (V - 5), dtype=torch.float64)
        spread[back.ids_NK[row]] = back.probability_NK[row].double()
        p = p_NV[row]
        rest = torch.ones(V, dtype=torch.bool)
        rest[back.ids_NK[row]] = False
        kl = (p * (p / spread).log())[~rest].sum()
        kl = kl + p[rest].sum() * (p[rest].sum() / back.tail_N[row].double()).log()
        assert float(measured["error"][row]) == pytest.approx(float(kl), abs=2e-6)
        assert float(measured["tail"][row]) == pytest.approx(float(p[rest].sum()), abs=1e-6)
        evenly = (p * (p / spread).log()).sum()
        assert float(measured["tail evenly"][row]) == pytest.approx(float(evenly), abs=5e-6)
    assert float(measured["error"].mean()) < 6 * 4.0**-bits


@pytest.mark.parametrize("sampling", ["systematic", "multinomial"])
def test_samples_are_unbiased(sampling: Any) -> None:
    """The mean share over many blocks' draws is p, within five standard errors of each id."""
    states, head = states_and_head(tokens=6)
    p_NV = exact_p(states, head, V)
    form, count = samples.Format(V, draws=10, sampling=sampling), 600
    shares = torch.zeros(count, 6, V, dtype=torch.float64)
    for number in range(count):
        back = form.decode(form.encode(states, head, number.to_bytes(32, "big")))
        assert isinstance(back, Sparse)
        shares[number].scatter_add_(-1, back.ids_NK, back.probability_NK.double())
    torch.testing.assert_close(shares.sum(-1), torch.ones(count, 6).double())
    error = shares.std(0) / count**0.5
    assert bool(((shares.mean(0) - p_NV).abs() <= 5 * error + 1e-3).all())
    counts, expected = shares * 10, p_NV * 10
    if sampling == "systematic":  # as many as expected, rounded down or up
        assert bool(((counts > expected - 1.0001) & (counts < expected + 1.0001)).all())
    else:  # the variance of independent draws: n p (1 − p)
        variance = counts.var(0).sum()
        assert float(variance) == pytest.approx(float((expected * (1 - p_NV)).sum()), rel=0.1)


def test_systematic_samples_are_less_noisy() -> None:
    states, head = states_and_head()
    noise = {
        sampling: errors(samples.Format(V, 20, sampling), states, head, KEY, V)["error"].mean()
        for sampling in ("systematic", "multinomial")
    }
    assert float(noise["systematic"]) < 0.8 * float(noise["multinomial"])


def test_samples_follow_from_seed_and_key() -> None:
    states, head = states_and_head()

    def ids(seed: int, key: bytes) -> Tensor:
        return samples.Format(V, 10, "multinomial", seed).encode(states, head, key)["ids"]

    assert torch.equal(ids(0, KEY), ids(0, KEY))
    assert not torch.equal(ids(0, KEY), ids(1, KEY))
    assert not torch.equal(ids(0, KEY), ids(0, b"o" * 32))


def test_samples_carry_the_entropy() -> None:
    states, head = states_and_head()
    p_NV = exact_p(states, head, V)
    form = samples.Format(V)
    back = form.decode(form.encode(states, head, KEY))
    assert isinstance(back, Sparse)
    expected = -(p_NV * p_NV.log()).sum(-1)
    torch.testing.assert_close(back.entropy_N, expected.float(), rtol=1e-3, atol=1e-3)


def test_samples_of_a_certain_teacher() -> None:
    """One id has all of the mass: one entry a token, and no noise."""
    states, head = states_and_head()
    form = samples.Format(V, draws=20)
    stored = form.encode(states * 1000, head, KEY)
    assert stored["unique"].tolist() == [1] * len(states)
    back = form.decode(stored)
    assert isinstance(back, Sparse)
    expected = exact_p(states, head, V).argmax(-1)
    assert torch.equal(back.ids_NK[:, 0], expected)
    assert back.probability_NK.tolist() == [[1.0]] * len(states)


def test_hidden_is_exact_and_int8_half_a_step_off() -> None:
    states, head = states_and_head()
    exact = hidden.Format(H)
    half = states.bfloat16()
    assert torch.equal(exact.decode(exact.encode(half, head, KEY)), half)
    form = hidden.Format(H, "int8")
    back = form.decode(form.encode(half, head, KEY)).double()
    step = half.double().abs().amax(-1, keepdim=True) / 127
    assert bool(((back - half.double()).abs() <= 0.5 * step + 2**-8 * back.abs()).all())
    p_NV, q_NV = exact_p(half, head, V), exact_p(back, head, V)
    kl = (p_NV * (p_NV / q_NV).log()).sum(-1)
    measured_kl = errors(form, half.float(), head, KEY, V)["error"]
    torch.testing.assert_close(measured_kl, kl.float(), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(("name", "wrong"), [("topk", {"k": V}), ("samples", {"draws": 256})])
def test_impossible_settings_are_refused(name: str, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="give 1 to"):
        make(name, {**SETTINGS, **wrong})


def test_distributions_are_over_the_shared_ids() -> None:
    """An embedding can have rows of padding beyond the tokenizer's ids: they get no probability."""
    states, head = states_and_head()
    shared = V - 20
    expected = exact_p(states, head, shared)
    assert float((exact_p(states, head, V)[:, shared:].sum(-1)).mean()) > 0.05
    (log_p_NV,) = log_probabilities(states, head, shared)
    torch.testing.assert_close(log_p_NV.exp(), expected.float(), rtol=1e-4, atol=1e-7)
    for name in ("topk", "samples"):
        form = make(name, {**SETTINGS, "vocab_size": shared, "k": 5, "draws": 40})
        back = form.decode(form.encode(states, head, KEY))
        assert isinstance(back, Sparse)
        assert int(back.ids_NK.max()) < shared
        if back.tail_N is not None:
            kept = expected.gather(-1, back.ids_NK)
            assert float((back.probability_NK - kept).abs().max()) < 0.01


def test_systematic_draws_of_each_token_start_on_their_own() -> None:
    """Equal tokens of one sequence: the mean of their shares is p, as it is over sequences."""
    states, head = states_and_head(tokens=1)
    count, draws = 2_000, 7
    form = samples.Format(V, draws=draws)
    back = form.decode(form.encode(states.expand(count, -1), head, KEY))
    assert isinstance(back, Sparse)
    shares_NV = torch.zeros(count, V, dtype=torch.float64)
    shares_NV.scatter_add_(-1, back.ids_NK, back.probability_NK.double())
    p_V = exact_p(states, head, V)[0]
    # A share is ⌊np⌋ or ⌈np⌉ of n draws: Bernoulli with variance at most 1/(4 n²) around p.
    error = 5 / (2 * draws * count**0.5)
    assert float((shares_NV.mean(0) - p_V).abs().max()) < error
