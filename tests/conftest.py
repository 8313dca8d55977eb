"""Shared by the tests: JAX stays on the CPU, and one small simulated specimen serves every module that needs data."""

import os

import pytest

from launch import devices

# Before anything uses JAX, here and in the workers that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = devices.environment(0, 1, os.environ)["XLA_FLAGS"]


@pytest.fixture(scope="session")
def tiny():
    """`cocuo` at 16^3 with 9 images and 5 maps at F3's noise: padded to 16 and 8 tilts, and solved in 0.1 s."""
    from tests.specimens import simulated

    return simulated(16, 9, 5)
