"""Lengths to which lists of tilts are padded; without JAX, since `check` needs them on a login node."""

from __future__ import annotations

# A sweep over tilt counts then compiles a handful of programs. One costs 5 to 10 s to compile; up to 16 tilts their
# projections are a small part of an iteration, and doubling is cheap.
_BUCKETS = (4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192)


def bucket(tilts: int) -> int:
    """The padded number of tilts: the next of a few lengths."""
    return next((b for b in _BUCKETS if b >= tilts), -(-tilts // 64) * 64)
