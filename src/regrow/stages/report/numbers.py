"""Formats numbers and names for readers."""

from __future__ import annotations

NAMES = {
    "parameters": "parameters",
    "bytes": "size",
    "zeros": "zeros",
    "bytes_as_bitmask": "size as bitmask",
    "perplexity": "perplexity",
    "perplexity_per_reference_token": "perplexity per token of the reference",
    "bits_per_byte": "bits per byte",
    "kl": "KL to teacher",
    "agreement": "top-1 agreement with teacher",
    "exact_answers": "exact answers",
    "acceptance": "drafted tokens that the teacher accepts",
    "accepted_length": "tokens per pass of the teacher",
    "draft_speedup": "teacher's speed with this draft ×",
    "prefill": "prefill tokens/s",
    "prefill_speedup": "prefill ×",
    "prefill_of_flops": "prefill × ÷ ratio of FLOPs",
    "decode": "decode tokens/s",
    "decode_speedup": "decode ×",
    "decode_of_flops": "decode × ÷ ratio of FLOPs",
    "ttft": "time to first token",
    "ttft_p95": "first token, p95",
    "time_per_output_token": "time per token",
    "time_per_output_token_p95": "per token, p95",
    "load_time": "time to load",
    "peak_memory": "peak memory",
}
ORDER = tuple(NAMES)
QUALITY = ORDER[: ORDER.index("prefill")]
"""Kinds of figures of size and quality."""
SPEED = ORDER[len(QUALITY) :]
"""Kinds of figures of speed and memory; a figure of any other kind belongs to a task."""

TIMES = ("ttft", "ttft_p95", "time_per_output_token", "time_per_output_token_p95")


def millions(value: float) -> str:
    """A count with its unit: 134.5 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def megabytes(value: float) -> str:
    """Format bytes as MB or GB (powers of 1,000)."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def plain(value: float) -> str:
    """Format a number with at most four significant digits and thousands separators."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def figure(name: str, value: float) -> str:
    """Format the value of a figure by its name (`kind` or `kind/text`)."""
    kind = name.partition("/")[0]
    if kind == "parameters":
        return millions(value)
    if kind in ("bytes", "bytes_as_bitmask", "peak_memory"):
        return megabytes(value)
    shares = ("agreement", "acceptance", "zeros", "exact_answers")
    if kind in shares or kind.endswith(("_kept", "_of_flops")):
        return f"{value:.1%}"
    if kind.endswith("_speedup"):
        return f"{value:.2f}×"
    if kind in TIMES:
        return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
    if kind == "load_time":
        return f"{value:.3g} s"
    if kind.startswith(("acc,", "acc_norm", "exact_match")) or kind == "acc":
        return f"{value:.3f}"
    if kind in ("kl", "bits_per_byte"):
        return f"{value:.3f}"
    if kind.startswith("perplexity"):
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def title(name: str) -> str:
    """A figure's readable title: `perplexity, heldout`."""
    kind, _, text = name.partition("/")
    return f"{NAMES.get(kind, kind)}, {text}" if text else NAMES.get(kind, kind)


def in_order(names: list[str]) -> list[str]:
    """Sort figure names, those in ORDER first, and drop duplicates."""
    unique = list(dict.fromkeys(names))
    kinds = [name.partition("/")[0] for name in unique]
    place = {
        n: ORDER.index(k) if k in ORDER else len(ORDER) for n, k in zip(unique, kinds, strict=True)
    }
    return sorted(unique, key=place.__getitem__)


def duration(seconds: float) -> str:
    """Format seconds as 42 s, 3 min 5 s or 1 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
