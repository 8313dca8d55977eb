"""GPU kernels of the fused solver: for projection, back projection, a step of total variation, and the coupling.

Written with Pallas and lowered to Triton through XLA, which serves GPUs of compute capability 8.0 and above (A100 to
H200); Pallas' other back end, Mosaic GPU, starts at 9.0 and cannot gather rows by index. On older GPUs (V100, T4: 7.0
and 7.5) `available` says no, and `forms` takes the JAX reference, which XLA compiles for them: the same answers from
more launches and more memory traffic. So it will be with a JAX that has no Triton back end (0.11 announces its end).

Volumes are (..., z, y, x) and projections (..., tilt, y, x) as everywhere, x contiguous: a program owns some rows and
a block of x, reads rows whole (256 bytes) and sums in registers. Leading axes are further programs, by vmap.

What moves, at 256^3 and 47 tilts in float32 (estimates; `make bench-gpu` measures). Each of the 47 x 256^3 pairs of
ray and row takes two taps, 6.3 GB from L1 cache (0.22 ms at an H200's 28 TB/s). Neighbouring pixels share a tap and
neighbouring tilts share rows, so that about 2 GB come from L2 (0.4 ms at 5 TB/s). Programs run x block by x block, and
a block of the volume (17 MB) stays in L2 (50 MB): device memory moves the least there is, 80 MB (0.02 ms). The back
projection tiles z and y: 32 voxels read some 10 rows per tilt, 1 GB from L2. A TV step is bound by device memory:
8 arrays, 0.54 GB per element (0.13 ms at 4.3 TB/s), 5 with 16-bit duals; the primal at the end takes 6, or 4.5. So is
the coupling, which moves 8 and holds all elements of a voxel in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from engine.coupling import Block
    from engine.projector import Geometry

# Rows and columns of a program's tile; powers of two, as Triton wants them. 16 sums per thread keep eight 16-byte loads
# in flight; TV holds some thirty values per voxel, and so takes 4.
_X = 64
_TILTS, _PIXELS = 2, 16
_BACK_Z, _BACK_Y = 4, 8
_TV_Z, _TV_Y = 2, 4
_WARPS = 4
_CACHE = 24 << 20  # bytes of a block of volume that should stay in L2; beyond that, x blocks of 32
_CAPABILITY = 8.0  # XLA compiles Triton for no older GPU

Field = tuple[jax.Array, jax.Array, jax.Array]


@cache
def available() -> bool:
    """Whether this process has GPUs, and all of them can run the kernels."""
    try:
        _pallas()
        return all(float(device.compute_capability) >= _CAPABILITY for device in jax.devices("cuda"))
    except (ImportError, RuntimeError):  # no such back end, no such GPU
        return False


def project(volume: jax.Array, rays: Geometry, pixels: int, *, interpret: bool = False) -> jax.Array:
    """`projector.project`: line integrals (..., tilt, pixels, x) of volumes (..., z, y, x)."""
    nz, ny, nx = volume.shape[-3:]
    tilts = rays.angles.shape[0]
    width = _width(nx, nz * ny)
    body = partial(_project_rows, pixels=pixels, shape=(nz, ny, nx), tilts=tilts, width=width)
    call = _kernel(body, (-(-pixels // _PIXELS), -(-tilts // _TILTS), -(-nx // width)), interpret)

    def one(volume: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct((tilts, pixels, nx), volume.dtype)
        return call(_ray_table(rays, nz, ny, pixels), volume.reshape(-1), out_shape=out)

    return _over_leading(one, volume)


def backproject(projections: jax.Array, rays: Geometry, nz: int, ny: int, *, interpret: bool = False) -> jax.Array:
    """`projector.backproject`: the adjoint, volumes (..., nz, ny, x) from projections (..., tilt, pixels, x)."""
    tilts, pixels, nx = projections.shape[-3:]
    width = _width(nx, tilts * pixels)
    body = partial(_back_rows, pixels=pixels, shape=(nz, ny, nx), width=width)
    call = _kernel(body, (-(-ny // _BACK_Y), -(-nz // _BACK_Z), -(-nx // width)), interpret)

    def one(projections: jax.Array) -> jax.Array:
        cos, sin = jnp.cos(rays.angles), jnp.sin(rays.angles)
        m = jnp.maximum(jnp.abs(cos), jnp.abs(sin))
        origin = (pixels - 1) / 2 - (ny - 1) / 2 * cos - (nz - 1) / 2 * sin
        used = jnp.max(jnp.where(rays.weight != 0, jnp.arange(1, tilts + 1), 0))
        table = jnp.stack([origin, cos, sin, 1 / m, rays.weight / m, jnp.full(tilts, used, jnp.float32)])
        return call(table, projections.reshape(-1), out_shape=jax.ShapeDtypeStruct((nz, ny, nx), projections.dtype))

    return _over_leading(one, projections)


def prox_tv(volume: jax.Array, metric: jax.Array, dual: Field, weight: jax.Array, floor: jax.Array, steps: jax.Array,
            low: jax.Array, high: jax.Array, *, dual_only: bool = False, interpret: bool = False,
            ) -> tuple[jax.Array | None, Field]:
    """`penalties.prox_tv_reference`: a launch per step, and one for the primal, which XLA may fuse with what follows.

    The duals may be of 16 bits: sums are of 32, and the primal belongs to the duals as they are returned.
    """
    # Imported late: `penalties` itself imports the forms of its operators.
    from engine.penalties import Dual, primal

    numbers = jnp.stack([weight, floor, low.astype(jnp.float32), high.astype(jnp.float32)])

    def step(field: Field) -> Field:
        return _tv_step(volume, metric, field, numbers, interpret)

    field = _repeated(step, tuple(dual), steps)
    if dual_only:
        return None, field
    return primal(volume, metric, Dual(*(f.astype(volume.dtype) for f in field)), floor), field


def couple(block: Block, dual: Field, edge: jax.Array, *, final: bool, interpret: bool = False,
           ) -> tuple[jax.Array, jax.Array]:
    """`coupling.couple_reference` in one launch: all elements of a voxel in registers."""
    elements, nz, ny, nx = block.x.shape
    width = _width(nx, elements * nz * ny, _X // 2)
    body = partial(_couple_rows, shape=(elements, nz, ny, nx), width=width, final=final)
    call = _kernel(body, (-(-nx // width), -(-ny // _TV_Y), nz), interpret)
    out = tuple(jax.ShapeDtypeStruct(shape, jnp.float32)
                for shape in (block.x.shape, block.x.shape[1:] if final else block.x.shape))
    arrays = (block.contrast, block.x, block.images, block.maps, block.bound, edge, *dual)
    numbers = jnp.stack([block.gamma, block.scale, block.rho, block.floor])
    return call(numbers, *(a.reshape(-1) for a in arrays), out_shape=out)


def _tv_step(volume: jax.Array, metric: jax.Array, field: Field, numbers: jax.Array, interpret: bool) -> Field:
    """One step on the dual, into new memory, since neighbours read the old one. numbers: weight, floor, low, high."""
    from engine.penalties import relaxation

    nz, ny, nx = volume.shape[-3:]
    width = _width(nx, nz * ny, _X)
    body = partial(_tv_rows, shape=(nz, ny, nx), width=width, relax=relaxation(nz))
    call = _kernel(body, (-(-nx // width), -(-ny // _TV_Y), -(-nz // _TV_Z)), interpret)

    def one(volume: jax.Array, metric: jax.Array, field: Field) -> Field:
        flat = [a.reshape(-1) for a in (volume, metric, *field)]
        return call(numbers, *flat, out_shape=(jax.ShapeDtypeStruct((nz, ny, nx), field[0].dtype),) * 3)

    return _over_leading(one, volume, metric, field)


def _repeated(step: Callable, state: Any, steps: jax.Array) -> Any:
    """step(step(... state)), `steps` times.

    A loop hands its state on in the buffers it got it in, so a step that writes to new memory costs a copy of all it
    wrote; after two steps the result is back where it belongs. The last one or two stand behind the loop and write to
    memory of their own: no number of steps but 0 costs a copy, at the price of a third set of fields while they run.
    """
    state = jax.lax.fori_loop(0, (steps - 1) // 2, lambda _, state: step(step(state)), state)
    ends = [lambda state: state, step, lambda state: step(step(state))]
    return jax.lax.switch(jnp.where(steps == 0, 0, 2 - steps % 2), ends, state)


def _project_rows(table: Any, volume: Any, out: Any, *, pixels: int, shape: tuple[int, int, int], tilts: int,
                  width: int) -> None:
    """A tile of tilts and pixels: each ray crosses row after row of voxels and takes two taps of each."""
    nz, ny, nx = shape
    pl, triton = _pallas()
    row = jnp.arange(_TILTS * _PIXELS)
    tilt = pl.program_id(1) * _TILTS + jax.lax.div(row, _PIXELS)
    pixel = pl.program_id(0) * _PIXELS + jax.lax.rem(row, _PIXELS)
    x = pl.program_id(2) * width + jnp.arange(width)
    known = tilt < tilts
    origin, per_pixel, per_row, scale, flat = (triton.load(table.at[k, tilt], mask=known, other=0.0) for k in range(5))
    steep = flat == 0
    length = jnp.where(steep, nz, ny)
    row_stride, tap_stride = jnp.where(steep, nx, ny * nx), jnp.where(steep, ny * nx, nx)
    rows = jnp.where(scale == 0, 0, jnp.where(steep, ny, nz))  # padding crosses nothing
    origin += pixel.astype(jnp.float32) * per_pixel

    def add_row(r: jax.Array, total: jax.Array) -> jax.Array:
        place = origin + r.astype(jnp.float32) * per_row
        floor = jnp.floor(place)
        first, share = floor.astype(jnp.int32), place - floor
        for tap, weight in ((first, 1 - share), (first + 1, share)):
            inside = (tap >= 0) & (tap < length) & (r < rows)
            at = (r * row_stride + tap * tap_stride)[:, None] + x[None, :]
            mask = inside[:, None] & _within(x, nx, width)
            total += (weight * scale)[:, None] * triton.load(volume.at[at], mask=mask, other=0.0)
        return total

    total = jax.lax.fori_loop(0, jnp.max(rows), add_row, jnp.zeros((row.size, width), jnp.float32))
    at = (tilt[:, None], pixel[:, None], x[None, :])
    triton.store(out.at[at], total, mask=(known & (pixel < pixels))[:, None] & _within(x, nx, width))


def _back_rows(table: Any, images: Any, out: Any, *, pixels: int, shape: tuple[int, int, int], width: int) -> None:
    """A tile of z and y: each voxel takes two pixels of each tilt, weighted by the hat about its landing point."""
    nz, ny, nx = shape
    pl, triton = _pallas()
    row = jnp.arange(_BACK_Z * _BACK_Y)
    z = pl.program_id(1) * _BACK_Z + jax.lax.div(row, _BACK_Y)
    y = pl.program_id(0) * _BACK_Y + jax.lax.rem(row, _BACK_Y)
    x = pl.program_id(2) * width + jnp.arange(width)
    along_z, along_y = z.astype(jnp.float32), y.astype(jnp.float32)

    def add_tilt(tilt: jax.Array, total: jax.Array) -> jax.Array:
        origin, cos, sin, sharp, scale = (table[k, tilt] for k in range(5))
        place = origin + along_y * cos + along_z * sin
        floor = jnp.floor(place)
        first, share = floor.astype(jnp.int32), place - floor
        for tap, distance in ((first, share), (first + 1, 1 - share)):
            weight = jnp.maximum(1 - distance * sharp, 0) * scale
            # A hat narrower than its pixel needs no load, nor does a tilt that is left out.
            inside = (tap >= 0) & (tap < pixels) & (weight > 0)
            at = (tilt * (pixels * nx) + tap * nx)[:, None] + x[None, :]
            mask = inside[:, None] & _within(x, nx, width)
            total += weight[:, None] * triton.load(images.at[at], mask=mask, other=0.0)
        return total

    total = jax.lax.fori_loop(0, table[5, 0].astype(jnp.int32), add_tilt, jnp.zeros((row.size, width), jnp.float32))
    at = (z[:, None], y[:, None], x[None, :])
    triton.store(out.at[at], total, mask=((z < nz) & (y < ny))[:, None] & _within(x, nx, width))


class _Tile(NamedTuple):
    """A tile of voxels as columns z, y (rows, 1) and a row x (1, width)."""

    shape: tuple[int, int, int]
    z: jax.Array
    y: jax.Array
    x: jax.Array
    place: jax.Array  # of each voxel in an array

    def inside(self, *to: int) -> jax.Array | None:
        """Where the voxel so far away exists; None if everywhere, since a load without a mask costs less."""
        tests = []
        for at, by, size, tile in zip((self.z, self.y, self.x), to, self.shape, (_TV_Z, _TV_Y, self.x.size)):
            if by < 0:
                tests.append(at >= -by)
            if by > 0 or size % tile:
                tests.append(at < size - by)
        return reduce(jnp.logical_and, tests) if tests else None

    def read(self, array: Any, *to: int) -> jax.Array:
        """An array's values so far away, 0 beyond the volume."""
        _, ny, nx = self.shape
        _, triton = _pallas()
        at, mask = self.place + ((to[0] * ny + to[1]) * nx + to[2]), self.inside(*to)
        return triton.load(array.at[at], mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)


def _tv_rows(numbers: Any, volume: Any, metric: Any, *refs: Any, shape: tuple[int, int, int], width: int,
             relax: float) -> None:
    """A tile of voxels: the primal here and at the three voxels ahead, its gradient, the dual raised and cut."""
    nz, ny, nx = shape
    pl, triton = _pallas()
    row = jnp.arange(_TV_Z * _TV_Y)
    z = (pl.program_id(2) * _TV_Z + jax.lax.div(row, _TV_Y))[:, None]
    y = (pl.program_id(1) * _TV_Y + jax.lax.rem(row, _TV_Y))[:, None]
    x = (pl.program_id(0) * width + jnp.arange(width))[None, :]
    tile = _Tile(shape, z, y, x, (z * ny + y) * nx + x)
    weight, floor = numbers[0], numbers[1]
    low, high = numbers[2].astype(jnp.int32), numbers[3].astype(jnp.int32)

    here = [tile.read(field, 0, 0, 0) for field in refs[:3]]

    def primal(*to: int) -> jax.Array:
        """max(volume - metric x gradient_adjoint(dual), floor) at the voxel `to` away."""
        back: Any = 0.0
        for axis in range(3):
            before = [to[k] - int(axis == k) for k in range(3)]
            behind = tile.read(refs[axis], *before) if any(before) else here[axis]
            back += behind - (tile.read(refs[axis], *to) if any(to) else here[axis])
        return jnp.maximum(tile.read(volume, *to) - tile.read(metric, *to) * back, floor)

    u = primal(0, 0, 0)
    step = most = tile.read(metric, 0, 0, 0)
    crossed = (z < nz - 1, y < ny - 1, (x < nx - 1) & (x + 1 != low) & (x + 1 != high))
    slopes = []
    for axis in range(3):
        to = tuple(int(axis == k) for k in range(3))
        most = jnp.maximum(most, tile.read(metric, *to))
        slopes.append(jnp.where(crossed[axis], primal(*to) - u, 0.0))
    rate = relax / (6 * (step + most))
    raised = [d + rate * s for d, s in zip(here, slopes)]
    square = raised[0] * raised[0] + raised[1] * raised[1] + raised[2] * raised[2]
    shrink = jnp.minimum(1.0, weight * jax.lax.rsqrt(jnp.maximum(square, 1e-36)))
    for out, field in zip(refs[3:], raised):
        triton.store(out.at[z, y, x], (field * shrink).astype(out.dtype), mask=tile.inside(0, 0, 0))


def _couple_rows(numbers: Any, contrast: Any, *refs: Any, shape: tuple[int, int, int, int], width: int, final: bool,
                 ) -> None:
    """Some rows of voxels: each element's share for no pull, Newton's method for the pull, the shares for that."""
    elements, nz, ny, nx = shape
    pl, triton = _pallas()
    z, y = jnp.full((_TV_Y, 1), pl.program_id(2)), (pl.program_id(1) * _TV_Y + jnp.arange(_TV_Y))[:, None]
    x = (pl.program_id(0) * width + jnp.arange(width))[None, :]
    row = z * ny + y
    here = _Tile((nz, ny, nx), z, y, x, row * nx + x)
    gamma, scale, rho, floor = (numbers[k] for k in range(4))
    volume, image, maps, bound, edge, *field = refs[:-2]
    first, second = refs[-2:]
    image = here.read(image, 0, 0, 0)
    each = []
    for e in range(elements):
        tile = here._replace(place=here.place + e * (nz * ny * nx))
        now = tile.read(volume, 0, 0, 0)
        slope = gamma * contrast[e] * jnp.exp((gamma - 1) * jnp.log(now))
        pull = slope * image
        rate = 1 / (scale * tile.read(bound, 0, 0, 0) + (gamma - 1) * jnp.maximum(pull, 0) / now)
        before = triton.load(edge.at[e * (nz * ny) + row], mask=y < ny, other=0.0).astype(jnp.float32)
        back = jnp.where(x == 0, before, tile.read(field[2], 0, 0, -1))
        back += tile.read(field[0], -1, 0, 0) + tile.read(field[1], 0, -1, 0)
        back -= sum(tile.read(component, 0, 0, 0) for component in field)
        plain = now - rate * (pull + tile.read(maps, 0, 0, 0))
        each.append((now, plain, rate, plain - rate * back, rate * slope, rho * slope))

    def newton(_: int, total: jax.Array) -> jax.Array:
        excess, curvature = total, jnp.ones_like(total)
        for now, _plain, _rate, free, give, weight in each:
            u = free - give * total
            excess -= weight * (jnp.maximum(u, floor) - now)
            curvature += jnp.where(u > floor, weight * give, 0.0)
        return total - excess / curvature

    total = jax.lax.fori_loop(0, elements + 1, newton, jnp.zeros((_TV_Y, width), jnp.float32))
    scatter, mask = jnp.zeros_like(total), here.inside(0, 0, 0)
    for e, (_now, plain, rate, free, give, _weight) in enumerate(each):
        if final:
            new = jnp.maximum(free - give * total, floor)
            scatter += contrast[e] * jnp.exp(gamma * jnp.log(new))
            triton.store(first.at[e, z, y, x], new, mask=mask)
        else:
            triton.store(first.at[e, z, y, x], plain - give * total, mask=mask)
            triton.store(second.at[e, z, y, x], rate, mask=mask)
    if final:
        triton.store(second.at[z, y, x], scatter, mask=mask)


def _ray_table(rays: Geometry, nz: int, ny: int, pixels: int) -> jax.Array:
    """Per tilt, where the ray of pixel p crosses row r: origin + p per_pixel + r per_row; its weight; 1 if flat."""
    cos, sin = jnp.cos(rays.angles), jnp.sin(rays.angles)
    flat = jnp.abs(cos) >= jnp.abs(sin)
    main, other = jnp.where(flat, cos, sin), jnp.where(flat, sin, cos)
    length, rows = jnp.where(flat, ny, nz), jnp.where(flat, nz, ny)
    origin = ((rows - 1) / 2 * other - (pixels - 1) / 2) / main + (length - 1) / 2
    return jnp.stack([origin, 1 / main, -other / main, rays.weight / jnp.abs(main), flat.astype(jnp.float32)])


def _kernel(body: Callable, grid: tuple[int, ...], interpret: bool) -> Callable:
    """A kernel over a grid of programs, the first axis running fastest; all its arrays stay in device memory."""
    pl, triton = _pallas()

    def call(*args: jax.Array, out_shape: Any) -> Any:
        return pl.pallas_call(body, out_shape=out_shape, grid=grid, interpret=interpret,
                              compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1))(*args)

    return call


@cache
def _pallas() -> tuple[Any, Any]:
    # Imported late: Pallas costs half a second, and what runs on a CPU does not need it.
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    return pallas, triton


def _over_leading(one: Callable, first: jax.Array, *others: Any) -> Any:
    """one(...) over all axes before the last three of the first argument, which the others share."""
    for _ in range(first.ndim - 3):
        one = jax.vmap(one)
    return one(first, *others)


def _within(x: jax.Array, nx: int, width: int) -> jax.Array:
    """(1, width): which columns exist; a constant where the blocks divide x, so that loads need no mask for it."""
    return jnp.ones((1, width), bool) if nx % width == 0 else (x < nx)[None, :]


def _width(nx: int, rows: int, narrow: int = _X // 2) -> int:
    """Columns of x per program, a power of two: `narrow` where a block of all rows would not stay in L2."""
    if nx * rows >= 2**31:
        raise ValueError(f"a GPU kernel was given {nx * rows:,} values per element, and counts to {2**31 - 1:,}: "
                         "share the volume among more devices, or crop it")
    return min(_X if rows * _X * 4 <= _CACHE else narrow, 1 << max(nx - 1, 0).bit_length())
