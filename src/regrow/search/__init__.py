"""Search for a shape: candidates for a target, their scores untrained, and their latency."""
