"""Slabs along x: four devices find what one finds, for plane counts that four divides and that it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from engine import fused3d, sharding
from engine.data import DataError
from launch import devices
from tests.specimens import simulated

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_four_devices_agree_with_one():
    """Operators to rounding, whole solves of every method within 1e-5; in a process that has four devices."""
    given = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC", "OMP_NUM_THREADS")}
    env = devices.environment(0, 1, {**given, "JAX_PLATFORMS": "cpu"}, share=4)
    told = subprocess.run([sys.executable, "-m", "tests.slabs"], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=500, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    found = json.loads(told.stdout)
    assert len(found) == 119
    limits = {"planes:": 1e-5, "probed:": 1e-3}  # probes are as exact as conjugate gradients are made to be
    wrong = {name: value for name, value in found.items()
             if not value < next((limit for words, limit in limits.items() if words in name), 1e-6)}
    assert not wrong


@pytest.mark.parametrize("planes, halvings, width",
                         [(1, 0, 1), (7, 0, 2), (8, 0, 2), (9, 0, 3), (9, 1, 4), (33, 2, 12)])
def test_what_is_split_is_joined(planes, halvings, width):
    array = np.arange(2 * 3 * planes, dtype=np.float32).reshape(2, 3, planes)
    cut = sharding.split(array, 4, halvings)
    assert cut.shape == (4, 2, 3, width)
    np.testing.assert_array_equal(sharding.join(cut, 4, planes), array)
    np.testing.assert_array_equal(sharding.join(sharding.split(array, 1), 1, planes), array)


def test_alone_a_slab_is_the_volume():
    array = jnp.arange(6.0).reshape(2, 3)
    assert sharding.slabs() == 1 and sharding.first_plane(3) == 0
    assert sharding.total(array) is array and sharding.largest(array) is array
    np.testing.assert_array_equal(sharding.overlap(array, 1, 2), [[0, 0, 1, 2, 0, 0], [0, 3, 4, 5, 0, 0]])
    np.testing.assert_array_equal(sharding.present(2, 3), [1, 1, 0])


def test_devices_that_are_not_there_are_refused_with_the_cure():
    with pytest.raises(DataError, match="solver.devices is 64, and JAX sees 1 here.*device_count=64"):
        fused3d.reconstruct(simulated(8, 3, 3), fused3d.Settings(devices=64))
