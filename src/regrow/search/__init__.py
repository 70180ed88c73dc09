"""Shape search: candidate shapes for a target, their scores without training, and their latency."""
