"""Verifies an export: compares llama.cpp with transformers on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.llama_cpp import GgufModel
from regrow.runtime.progress import say
from regrow.stage_dir import Figure

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

MOST = {"F32": 0.01, "F16": 0.01, "BF16": 0.02, "Q8_0": 0.2}
"""Limit of the mean KL in nats by type; a larger KL means a faulty file, not lost precision."""
ROWS = 64
"""Number of positions whose distributions are compared at once."""
SAMPLE = """\
The lighthouse keeper wrote one line each evening: the wind, the tide, and the number of ships that
had passed. In 1907 there were 412 of them; by the spring of 1911, fewer than 30. "Nobody comes this
way any more," he said, "and I can't blame them." Still, he lit the lamp at 6:45 p.m., as he'd done
since he was nineteen.

A prime number has exactly two divisors, 1 and itself: 2, 3, 5, 7, 11, 13, 17, 19, 23 and so on.
There is no largest one. Suppose there were; multiply all of them together, add one, and the result
is divisible by none of them: it is a prime itself or has a prime factor that was not in the list.

    def largest(values):
        best = values[0]
        for value in values[1:]:
            if value > best:
                best = value
        return best

Water boils at 100 °C at sea level, but at about 93 °C in Denver, which lies 1,609 metres higher.
Größe, naïve, 東京 and Москва are words, too.
"""
"""Text for the comparison when the user gives none."""


@dataclass(frozen=True)
class Proof:
    """Measured differences between the outputs of llama.cpp and transformers."""

    positions: int
    kl: float
    """KL(transformers ‖ llama.cpp) of the next token in nats, mean over the positions."""
    worst: float
    """The largest KL of a single position."""
    same_top: float
    """Share of positions where both have the same most likely token."""
    greedy_equal: int
    """Number of equal tokens of the greedy continuation before the first difference."""
    greedy_tokens: int
    first_difference: str | None
    """First difference between the two tokenizations of the text; None when they are equal."""
    text: str

    def figures(self) -> list[Figure]:
        """The figures for the manifest."""
        convention = (
            f"llama.cpp on the file against transformers in float32 on the folder; {self.text}"
        )
        n = self.positions
        return [
            Figure(name="kl", value=self.kl, unit="nats", n=n, convention=convention),
            Figure(name="kl_worst", value=self.worst, unit="nats", n=n, convention=convention),
            Figure(name="same_top_token", value=self.same_top, n=n, convention=convention),
            Figure(
                name="greedy_equal", value=self.greedy_equal, unit="tokens", n=self.greedy_tokens
            ),
            Figure(
                name="same_tokens",
                value=float(self.first_difference is None),
                convention=convention,
            ),
        ]

    def lines(self) -> list[str]:
        """The lines to print in the terminal."""
        equal = self.greedy_equal == self.greedy_tokens
        greedy = f"equal in all {self.greedy_tokens} tokens"
        if not equal:
            greedy = f"different from token {self.greedy_equal + 1} of {self.greedy_tokens} on"
        lines = [
            f"verified: llama.cpp against transformers, {self.positions} positions of {self.text}: "
            f"KL {self.kl:.2e} nats (worst {self.worst:.1e}), same top token {self.same_top:.1%}, "
            f"greedy continuation {greedy}"
        ]
        if self.first_difference is not None:
            lines.append(f"  llama.cpp tokenizes this text differently: {self.first_difference}")
        return lines


def prove(
    path: Path,
    checkpoint: Checkpoint,
    windows: list[list[int]],
    text: tuple[str, str],
    prompt: str,
    new_tokens: int,
) -> Proof:
    """Compare the GGUF file with the checkpoint that it was made from, on windows of token ids.

    `text` is a pair: a plain text, on which the two tokenizers are compared, and a description of
    the windows. Raises UserError when llama.cpp cannot open the file.
    """
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    assert isinstance(ids, list)
    longest = max([len(ids) + new_tokens, *map(len, windows)])
    with GgufModel(path, context=longest) as gguf:
        kls, same = [], []
        model = checkpoint.model(_dtype(checkpoint, path))
        for window in windows:
            kl, top = compare(_logits(model, window), gguf.logits(window))
            kls.append(kl)
            same.append(top)
        expected, continuation = _greedy(model, ids, new_tokens), gguf.greedy(ids, new_tokens)
        difference = _difference(tokenizer, gguf, text[0])
    all_kls = [float(value) for kl in kls for value in kl]
    pairs = list(zip(expected, continuation, strict=True))
    equal = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    tops = [float(value) for top in same for value in top]
    return Proof(
        positions=len(all_kls),
        kl=sum(all_kls) / len(all_kls),
        worst=max(all_kls),
        same_top=sum(tops) / len(tops),
        greedy_equal=equal,
        greedy_tokens=new_tokens,
        first_difference=difference,
        text=text[1],
    )


def check(proof: Proof, type_name: str, path: Path) -> None:
    """Raise UserError when the KL is too large for the type, which means an error of the export."""
    limit = MOST.get(type_name)
    if limit is not None and not proof.kl <= limit:
        raise UserError(
            f"{path.name}: llama.cpp's next-token distributions are {proof.kl:.2g} nats from "
            f"transformers', more than {limit} for {type_name}, so the file was deleted: use "
            "--verify never to keep it and inspect it"
        )


def compare(p_logits: torch.Tensor, q_logits: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p ‖ q) of the next token [T] in nats, and whether the top tokens agree [T].

    Both arguments are logits [T, V]; the KL is computed in float64.
    """
    import torch

    kls, same = [], []
    for rows in range(0, len(p_logits), ROWS):
        p = p_logits[rows : rows + ROWS].double().log_softmax(-1)
        q = torch.from_numpy(q_logits[rows : rows + ROWS]).double().log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kls), torch.cat(same)


def _logits(model: PreTrainedModel, window: list[int]) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([window])).logits[0].float()
    return logits


def _greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    import torch

    tokens: list[int] = []
    input_ids, cache = ids, None
    with torch.inference_mode():
        for _ in range(count):
            out = model(torch.tensor([input_ids]), past_key_values=cache, use_cache=True)
            cache, input_ids = out.past_key_values, [int(out.logits[0, -1].argmax())]
            tokens += input_ids
    return tokens


def _dtype(checkpoint: Checkpoint, path: Path) -> torch.dtype:
    """float32 if memory suffices for a float32 model and the file, otherwise the stored dtype."""
    import torch

    stored = sum(map(checkpoint.bytes, checkpoint.names()))
    width = getattr(torch, checkpoint.main_dtype).itemsize
    if psutil.virtual_memory().available > 4 * stored // width + path.stat().st_size:
        return torch.float32
    say("verify: too little memory for float32; transformers computes in the stored dtype")
    return checkpoint.compute_dtype(torch.device("cpu"))


def _difference(tokenizer: object, gguf: GgufModel, text: str) -> str | None:
    assert callable(tokenizer)
    expected: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = gguf.tokenize(text)
    if expected == tokens:
        return None
    at = next((n for n, (a, b) in enumerate(zip(expected, tokens, strict=False)) if a != b), None)
    at = min(len(expected), len(tokens)) if at is None else at
    return f"token {at} is {tokens[at : at + 3]}, in transformers {expected[at : at + 3]}"
