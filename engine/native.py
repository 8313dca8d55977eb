"""The operators in C on this machine: compiled at first use, kept, and called from compiled programs.

On a CPU these kernels do projection, back projection, the TV operator and the coupling of the elements two to five
times faster than the JAX forms of `projector`, `penalties` and `coupling`, which are the reference, run on every
platform, and stay in use where there is no C compiler or TOMOATLAS_NATIVE=0 is set. Nothing here imports JAX before it
is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import uuid
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

    from engine.coupling import Block
    from engine.penalties import Field
    from engine.projector import Geometry

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("projector.c", "proximal.c", "native.h"))
_HANDLERS = ("tomoatlas_project", "tomoatlas_backproject", "tomoatlas_variation", "tomoatlas_target",
             "tomoatlas_minimiser")
# Not -ffast-math: a NaN must stay one, since it is how a solve that went wrong is noticed.
_FLAGS = ("-shared", "-fPIC", "-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
          "-fassociative-math", "-freciprocal-math")
# Compilers differ (Apple's knows no OpenMP): the first of these that works.
_EXTRAS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where compiled programs are kept, for one kind of processor.

    A cluster's nodes share the home folder, and code compiled for one processor may not run on another.
    """
    root = env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "/tmp"), ".cache")
    return Path(root, "tomoatlas", f"{platform.machine()}-{_processor()}")


@cache
def ready() -> bool:
    """Whether the kernels can be called: compiled, loaded and made known to JAX, once per process."""
    if os.environ.get("TOMOATLAS_NATIVE") == "0":
        return False
    import jax

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin between calls would slow XLA's down
    try:
        library = ctypes.CDLL(str(_library(jax.ffi.include_dir())))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"the operators in C could not be compiled or loaded: {error}. Going on with their slower JAX "
                      "form; for the fast one, name a C compiler in CC and a folder that can be written in "
                      "XDG_CACHE_HOME", RuntimeWarning, stacklevel=2)
        return False
    for name in _HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def project(volume: jax.Array, rays: Geometry, pixels: int) -> jax.Array:
    """As `projector.project`, on the CPU."""
    import jax
    import jax.numpy as jnp

    *lead, nz, ny, nx = volume.shape
    flat = volume.reshape(-1, nz, ny, nx)
    shape = jax.ShapeDtypeStruct((len(flat), len(rays.angles), pixels, nx), jnp.float32)
    images = _call(_HANDLERS[0], shape, flat, jnp.cos(rays.angles), jnp.sin(rays.angles), rays.weight)
    return images.reshape(*lead, *shape.shape[1:])


def backproject(projections: jax.Array, rays: Geometry, nz: int, ny: int) -> jax.Array:
    """As `projector.backproject`, on the CPU."""
    import jax
    import jax.numpy as jnp

    *lead, tilts, pixels, nx = projections.shape
    flat = projections.reshape(-1, tilts, pixels, nx)
    shape = jax.ShapeDtypeStruct((len(flat), nz, ny, nx), jnp.float32)
    volumes = _call(_HANDLERS[1], shape, flat, jnp.cos(rays.angles), jnp.sin(rays.angles), rays.weight)
    return volumes.reshape(*lead, nz, ny, nx)


def prox_tv(volume: jax.Array, metric: jax.Array, dual: Field, weight: jax.Array, floor: jax.Array, steps: jax.Array,
            low: jax.Array, high: jax.Array, *, dual_only: bool) -> tuple[jax.Array | None, Field]:
    """As `penalties.prox_tv_reference`, on the CPU; several steps in one pass over memory."""
    import jax
    import jax.numpy as jnp

    from engine.penalties import relaxation

    flat, relax = (-1, *volume.shape[-3:]), relaxation(volume.shape[-3])
    shape = jax.ShapeDtypeStruct(volume.reshape(flat).shape, jnp.float32)
    numbers, integers = jnp.stack([weight, floor, jnp.float32(relax)]), jnp.stack([steps, low, high])
    arrays = (a.reshape(flat).astype(jnp.float32) for a in (volume, metric, *dual))
    # The dual is raised in the memory it lies in: else a solve's loop would copy it in every iteration.
    results = _call(_HANDLERS[2], (shape,) * (3 if dual_only else 4), *arrays, numbers, integers,
                    in_place={2: 0, 3: 1, 4: 2})
    z, y, x = (a.reshape(volume.shape).astype(d.dtype) for a, d in zip(results[:3], dual))
    return None if dual_only else results[3].reshape(volume.shape), (z, y, x)


def couple(block: Block, dual: Field, edge: jax.Array, *, final: bool) -> tuple[jax.Array, jax.Array]:
    """As `coupling.couple_reference`, on the CPU; all elements of a voxel in one pass over memory."""
    import jax
    import jax.numpy as jnp

    x, numbers = block.x, jnp.stack([block.gamma, block.scale, block.rho, block.floor])
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x.shape, x.shape[1:] if final else x.shape)]
    arrays = (x, block.images, block.maps, block.bound, block.contrast.reshape(-1), numbers, *dual, edge)
    first, second = _call(_HANDLERS[4 if final else 3], shapes, *(a.astype(jnp.float32) for a in arrays))
    return first, second


def _call(name: str, shapes, *arrays, in_place: dict[int, int] | None = None):
    import jax

    # A batch (vmap) is taken one by one: each call fills the cores by itself.
    return jax.ffi.ffi_call(name, shapes, vmap_method="sequential", input_output_aliases=in_place)(*arrays)


def _library(include: str) -> Path:
    """The shared library for these sources, compiled if it is not there yet. Raises RuntimeError."""
    # XLA's calling convention is versioned with its headers, so they are part of the name.
    header = Path(include, "xla", "ffi", "api", "c_api.h").read_bytes()
    parts = (*(source.read_bytes() for source in _SOURCES), header, repr((_FLAGS, _EXTRAS)).encode())
    name = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    path = cache_folder(os.environ) / f"native-{name}.so"
    if path.exists():
        return path
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    compiler = shlex.split(os.environ.get("CC", "")) or ([found] if found else [])  # CC may name options too
    if not compiler:
        raise RuntimeError("no C compiler was found (cc, gcc or clang; or name one in CC)")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    units, said = [str(source) for source in _SOURCES if source.suffix == ".c"], ""
    try:
        for extra in _EXTRAS:
            made = subprocess.run([*compiler, *_FLAGS, *extra, f"-I{include}", *units, "-o", str(aside), "-lm"],
                                  capture_output=True, text=True, check=False)
            if made.returncode == 0:
                os.replace(aside, path)
                return path
            lines = made.stderr.splitlines()
            said = next((line for line in lines if "error" in line), lines[-1] if lines else "nothing")
    finally:
        aside.unlink(missing_ok=True)
    raise RuntimeError(f"{' '.join(compiler)} says: {said}")


def _processor() -> str:
    """A short name for this processor's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
