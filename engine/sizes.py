"""Sizes chosen for the solver's sake: padded lists of tilts, coarser volumes. Without JAX: `check` needs them too."""

from __future__ import annotations

# A sweep over tilt counts then compiles a handful of programs. One costs 5 to 10 s to compile; up to 16 tilts their
# projections are a small part of an iteration, and doubling is cheap. A single one, a 2D map, is never padded.
_BUCKETS = (1, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192)


def bucket(tilts: int) -> int:
    """The padded number of tilts: the next of a few lengths."""
    return next((b for b in _BUCKETS if b >= tilts), -(-tilts // 64) * 64)


SMALLEST = 24  # voxels along y and z that a volume of a coarse solve has at least
DEEPEST = 3


def halvings(nz: int, ny: int) -> int:
    """How often a volume's voxels are doubled in size for the coarse solves before its own: at most three times.

    Until 24 to 47 voxels are left: at 16 the specimen is lost, and the solve of 24 to 47 needs no better start.
    """
    return next((k for k in range(DEEPEST) if -(-min(nz, ny) // 2 ** (k + 1)) < SMALLEST), DEEPEST)


def slab_width(planes: int, devices: int, halvings: int) -> int:
    """Planes of each of so many slabs: enough of them, and whole pairs at each halving. Two remain at the coarsest."""
    part = 2**halvings
    return max(-(-planes // (devices * part)), 2 if halvings else 1) * part
