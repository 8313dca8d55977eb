/* The three operators of a solve on a CPU: projection, back projection, the proximal operator of total variation.
 *
 * Same semantics as the JAX forms of engine/projector.py and engine/penalties.py, which are the reference; called from
 * compiled programs through XLA's foreign function interface. engine/native.py compiles this file for the processor
 * it runs on. What it gains over XLA: accumulators in registers, tiles that stay in the second-level cache, and several
 * TV steps in one pass over memory.
 *
 * x is contiguous. Projectors handle CHUNK planes at a time, copied into buffers in which a row of voxels is followed
 * by zeros, so that taps need no bounds.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "xla/ffi/api/c_api.h"

#define LANES 16                /* floats of a vector */
#define CHUNK 64                /* planes handled at a time: four vectors, as many accumulators */
#define TILE (512 * 1024)       /* bytes of a tile: half of a common second-level cache */
#define GUARD 3                 /* zeros of a row: one before it, two behind */
#define STEPS 6 /* of TV in one pass: at 192^3 20 steps took 2.1, 1.8, 2.2, 3.3 ns per voxel and step by 3, 6, 8, 20 */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int64_t size;

static inline size least(size a, size b) { return a < b ? a : b; }
static inline float between(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

static int threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* Memory of one thread, kept between calls: fresh pages cost more than the work on them. */
static void *scratch(size_t bytes, int which) {
    static _Thread_local struct { void *at; size_t bytes; } kept[2];
    if (kept[which].bytes < bytes) {
        free(kept[which].at);
        bytes = (bytes + 4095) / 4096 * 4096;
        kept[which].at = aligned_alloc(4096, bytes);
        kept[which].bytes = kept[which].at ? bytes : 0;
    }
    return kept[which].at;
}

typedef struct { size count, nz, ny, nx, tilts, pixels; const float *cos, *sin, *weight; } Rays;

/* ------------------------------------------------------------------------------------------------ projection */

/* Copies rows r0.. of a volume's planes x0.., one row after the other: (rows, GUARD + length, CHUNK). */
static void pack_rows(const Rays *g, const float *volume, int steep, size r0, size rows, size x0, float *tile) {
    const size length = steep ? g->nz : g->ny, width = least(CHUNK, g->nx - x0);
    memset(tile, 0, sizeof(float) * rows * (length + GUARD) * CHUNK);
    for (size r = 0; r < rows; r++)
        for (size i = 0; i < length; i++) {
            const size z = steep ? i : r0 + r, y = steep ? r0 + r : i;
            memcpy(tile + (r * (length + GUARD) + i + 1) * CHUNK, volume + (z * g->ny + y) * g->nx + x0,
                   sizeof(float) * width);
        }
}

/* Adds what `rows` rows contribute to one tilt's image. first, share: the taps of every row and pixel. */
static inline __attribute__((always_inline)) void add_rows(const Rays *g, const float *tile, size rows, size length,
        float scale, const int32_t *first, const float *share, float *image, size width, const int vectors) {
    for (size p = 0; p < g->pixels; p++) {
        vec sum[4] = {{0}};
        for (size r = 0; r < rows; r++) {
            const float far = scale * share[r * g->pixels + p], near = scale - far;
            const float *tap = tile + (r * (length + GUARD) + first[r * g->pixels + p]) * CHUNK;
            for (int k = 0; k < vectors; k++)
                sum[k] += near * *(const vec *)(tap + k * LANES) + far * *(const vec *)(tap + CHUNK + k * LANES);
        }
        float *to = image + p * g->nx;
        const float *from = (const float *)sum;
        for (size x = 0; x < width; x++) to[x] += from[x];
    }
}

static int project_chunk(const Rays *g, const float *volume, float *images, size x0, size t0, size t1) {
    const size width = least(CHUNK, g->nx - x0);
    for (int steep = 0; steep < 2; steep++) {
        const size length = steep ? g->nz : g->ny, lines = steep ? g->ny : g->nz;
        const size most = least(lines, 1 + TILE / (sizeof(float) * CHUNK * (length + GUARD)));
        const size tile_bytes = sizeof(float) * most * (length + GUARD) * CHUNK;
        char *memory = scratch(tile_bytes + 8 * most * g->pixels, 0);
        if (!memory) return 0;
        float *tile = (float *)memory, *share = (float *)(memory + tile_bytes);
        int32_t *first = (int32_t *)(share + most * g->pixels);
        for (size r0 = 0; r0 < lines; r0 += most) {
            const size rows = least(most, lines - r0);
            int packed = 0;
            for (size t = t0; t < t1; t++) {
                const float c = g->cos[t], s = g->sin[t];
                if (g->weight[t] == 0 || (fabsf(c) < fabsf(s)) != steep) continue;
                if (!packed) pack_rows(g, volume, steep, r0, rows, x0, tile), packed = 1;
                const float along = steep ? s : c, across = steep ? c : s;
                for (size r = 0; r < rows; r++) {
                    const float base = (length - 1) / 2.f - (r0 + r - (lines - 1) / 2.f) * across / along;
                    for (size p = 0; p < g->pixels; p++) {
                        const float place = between((p - (g->pixels - 1) / 2.f) / along + base, -1, length);
                        const float below = floorf(place);
                        first[r * g->pixels + p] = (int32_t)below + 1;
                        share[r * g->pixels + p] = place - below;
                    }
                }
                float *image = images + t * g->pixels * g->nx + x0;
                const float scale = g->weight[t] / fabsf(along);
                switch ((width + LANES - 1) / LANES) {
                case 1: add_rows(g, tile, rows, length, scale, first, share, image, width, 1); break;
                case 2: add_rows(g, tile, rows, length, scale, first, share, image, width, 2); break;
                case 3: add_rows(g, tile, rows, length, scale, first, share, image, width, 3); break;
                default: add_rows(g, tile, rows, length, scale, first, share, image, width, 4);
                }
            }
        }
    }
    return 1;
}

static int project(const Rays *g, const float *volumes, float *images) {
    const size chunks = (g->nx + CHUNK - 1) / CHUNK, jobs = g->count * chunks;
    const size parts = least(g->tilts, (threads() + jobs - 1) / jobs);
    int ok = 1;
    memset(images, 0, sizeof(float) * g->count * g->tilts * g->pixels * g->nx);
#pragma omp parallel for schedule(dynamic) reduction(&& : ok)
    for (size job = 0; job < jobs * parts; job++) {
        const size e = job / (chunks * parts), chunk = job / parts % chunks, part = job % parts;
        ok = project_chunk(g, volumes + e * g->nz * g->ny * g->nx, images + e * g->tilts * g->pixels * g->nx,
                           chunk * CHUNK, part * g->tilts / parts, (part + 1) * g->tilts / parts) && ok;
    }
    return ok;
}

/* ------------------------------------------------------------------------------------------- back projection */

#define BLOCK 8 /* voxels along z and y that share the cached rows of the images */
#define SIDE 4  /* of these, voxels along y that are summed at once: their taps are mostly the same rows */

/* The tilts that count, packed: for each its direction, 1 / m, weight / m. */
typedef struct { size count; const float *cos, *sin, *narrow, *scale; } Seen;

/* Where voxel (z, y) lands: first row and the two weights, per tilt. */
static void landing(const Rays *g, size count, float up, float right, const float *restrict c, const float *restrict s,
                    const float *restrict narrow, const float *restrict scale, int32_t *restrict first,
                    float *restrict near, float *restrict far) {
    const float middle = (g->pixels - 1) / 2.f, end = g->pixels;
    for (size k = 0; k < count; k++) {
        const float place = between(right * c[k] + up * s[k] + middle, -1, end);
        const float below = floorf(place), share = place - below;
        const float low = 1 - share * narrow[k], high = 1 - (1 - share) * narrow[k];
        first[k] = (int32_t)below + 1;
        near[k] = scale[k] * (low > 0 ? low : 0);
        far[k] = scale[k] * (high > 0 ? high : 0);
    }
}

/* Sums SIDE voxels over all tilts, in planes of `vectors` (1 or 2) vectors. */
static inline __attribute__((always_inline)) void gather(const float *packed, size stride, size tilts,
        const int32_t *first, const float *near, const float *far, float *to, size step, size width,
        const int vectors) {
    vec sum[SIDE][2] = {{{0}}};
    for (size t = 0; t < tilts; t++, packed += stride)
        for (int j = 0; j < SIDE; j++) {
            const float *tap = packed + first[j * tilts + t] * (size)CHUNK;
            const float low = near[j * tilts + t], high = far[j * tilts + t];
            for (int k = 0; k < vectors; k++)
                sum[j][k] += low * *(const vec *)(tap + k * LANES) + high * *(const vec *)(tap + CHUNK + k * LANES);
        }
    for (int j = 0; j < SIDE; j++) memcpy(to + j * step, sum[j], sizeof(float) * width);
}

/* BLOCK rows z of one chunk of planes. packed: (count, pixels + GUARD, CHUNK). */
static int backproject_rows(const Rays *g, const float *packed, const Seen *seen, size x0, size z0, float *volume) {
    const size width = least(CHUNK, g->nx - x0), stride = (g->pixels + GUARD) * CHUNK, taps = SIDE * seen->count;
    float *near = scratch(sizeof(float) * (3 * taps + SIDE * CHUNK), 1);
    if (!near) return 0;
    float *far = near + taps, *edge = far + taps;
    int32_t *first = (int32_t *)(edge + SIDE * CHUNK);
    for (size y0 = 0; y0 < g->ny; y0 += BLOCK)
        for (size z = z0; z < least(z0 + BLOCK, g->nz); z++)
            for (size y = y0; y < least(y0 + BLOCK, g->ny); y += SIDE) {
                const size there = least(SIDE, g->ny - y);
                float *to = volume + (z * g->ny + y) * g->nx + x0;
                for (size j = 0; j < SIDE; j++)
                    landing(g, seen->count, z - (g->nz - 1) / 2.f, y + j - (g->ny - 1) / 2.f, seen->cos, seen->sin,
                            seen->narrow, seen->scale, first + j * seen->count, near + j * seen->count,
                            far + j * seen->count);
                for (size x = 0; x < width; x += 2 * LANES) {
                    const size planes = least(2 * LANES, width - x), step = there < SIDE ? CHUNK : g->nx;
                    float *at = there < SIDE ? edge + x : to + x;
                    if (planes > LANES)
                        gather(packed + x, stride, seen->count, first, near, far, at, step, planes, 2);
                    else
                        gather(packed + x, stride, seen->count, first, near, far, at, step, planes, 1);
                }
                for (size j = 0; there < SIDE && j < there; j++)
                    memcpy(to + j * g->nx, edge + j * CHUNK, sizeof(float) * width);
            }
    return 1;
}

static int backproject(const Rays *g, const float *images, float *volumes) {
    const size chunks = (g->nx + CHUNK - 1) / CHUNK, blocks = (g->nz + BLOCK - 1) / BLOCK;
    const size rows = g->pixels + GUARD;
    size count = 0;
    for (size t = 0; t < g->tilts; t++) count += g->weight[t] != 0;
    const size stack = count * rows * CHUNK; /* floats of one chunk of one volume's images */
    const size bytes = sizeof(float) * g->count * chunks * stack;
    float *packed = scratch(bytes + (4 * sizeof(float) + sizeof(size)) * (count + 1), 0);
    if (!packed) return 0;
    size *tilt = (size *)(packed + g->count * chunks * stack);
    float *c = (float *)(tilt + count), *s = c + count, *narrow = s + count, *scale = narrow + count;
    for (size t = 0, k = 0; t < g->tilts; t++) {
        if (g->weight[t] == 0) continue;
        tilt[k] = t, c[k] = g->cos[t], s[k] = g->sin[t];
        narrow[k] = 1 / fmaxf(fabsf(c[k]), fabsf(s[k]));
        scale[k] = g->weight[t] * narrow[k];
        k++;
    }
    const Seen seen = {count, c, s, narrow, scale};
    int ok = 1;
#pragma omp parallel for schedule(static) collapse(2)
    for (size job = 0; job < g->count * chunks; job++)
        for (size k = 0; k < count; k++) {
            const size x0 = job % chunks * CHUNK, width = least(CHUNK, g->nx - x0);
            const float *image = images + (job / chunks * g->tilts + tilt[k]) * g->pixels * g->nx + x0;
            float *to = packed + job * stack + k * rows * CHUNK;
            memset(to, 0, sizeof(float) * rows * CHUNK);
            for (size p = 0; p < g->pixels; p++)
                memcpy(to + (p + 1) * CHUNK, image + p * g->nx, sizeof(float) * width);
        }
#pragma omp parallel for schedule(static) collapse(2) reduction(&& : ok)
    for (size job = 0; job < g->count * chunks; job++)
        for (size block = 0; block < blocks; block++)
            ok = backproject_rows(g, packed + job * stack, &seen, job % chunks * CHUNK, block * BLOCK,
                                  volumes + job / chunks * g->nz * g->ny * g->nx) && ok;
    return ok;
}

/* ------------------------------------------------------------------------------------------- total variation */

typedef struct { const float *z, *y, *x; } Dual;
typedef struct { float *z, *y, *x; } DualOut;
typedef struct {
    size nz, ny, nx, low, high; /* planes low .. high - 1 exist: no difference is taken across their ends */
    float weight, floor, relax;
    const float *volume, *metric;
    Dual dual;
    float *primal; /* NULL: not asked for */
    DualOut out;
} Variation;

static Dual plane_of(Dual d, size offset) { return (Dual){d.z + offset, d.y + offset, d.x + offset}; }

/* u = max(volume - metric K'dual, floor) of plane z; below: the z component of the plane before it, or zeros. */
static void primal_plane(const Variation *v, size z, Dual d, const float *below, const float *zeros,
                         float *restrict u) {
    const size nx = v->nx;
    for (size y = 0; y < v->ny; y++) {
        const float *volume = v->volume + (z * v->ny + y) * nx, *metric = v->metric + (z * v->ny + y) * nx;
        const float *dz = d.z + y * nx, *dy = d.y + y * nx, *dx = d.x + y * nx, *bz = below + y * nx;
        const float *by = y ? dy - nx : zeros;
        float *restrict to = u + y * nx;
        const float left = bz[0] - dz[0] + by[0] - dy[0] - dx[0], first = volume[0] - metric[0] * left;
        to[0] = first < v->floor ? v->floor : first;
        for (size x = 1; x < nx; x++) {
            const float value = volume[x] - metric[x] * (bz[x] - dz[x] + by[x] - dy[x] + dx[x - 1] - dx[x]);
            to[x] = value < v->floor ? v->floor : value; /* this way round a NaN stays */
        }
    }
}

/* One projected gradient step of a row of the dual. z, y: the rows behind this one; crossed: 0 where x has none. */
static void dual_row(size count, float relax, float weight, const float *restrict metric,
                     const float *restrict metric_z, const float *restrict metric_y, const float *restrict metric_x,
                     const float *restrict u, const float *restrict u_z, const float *restrict u_y,
                     const float *restrict u_x, const float *restrict crossed, const float *restrict dz,
                     const float *restrict dy, const float *restrict dx, float *restrict tz, float *restrict ty,
                     float *restrict tx) {
    for (size x = 0; x < count; x++) {
        const float far = metric_z[x] > metric_y[x] ? metric_z[x] : metric_y[x];
        const float near = metric[x] > metric_x[x] ? metric[x] : metric_x[x];
        const float rate = relax / (metric[x] + (far > near ? far : near));
        const float a = dz[x] + rate * (u_z[x] - u[x]), b = dy[x] + rate * (u_y[x] - u[x]);
        const float c = dx[x] + rate * crossed[x] * (u_x[x] - u[x]);
        const float length = sqrtf(a * a + b * b + c * c);
        const float shrink = length > weight ? weight / length : 1;
        tz[x] = a * shrink, ty[x] = b * shrink, tx[x] = c * shrink;
    }
}

/* The same for plane z. above: u of the plane behind it (u itself for the last). */
static void dual_plane(const Variation *v, size z, Dual d, const float *u, const float *above, const float *zeros,
                       const float *crossed, DualOut to) {
    const size nx = v->nx;
    for (size y = 0; y < v->ny; y++) {
        const size row = y * nx;
        const float *m = v->metric + (z * v->ny + y) * nx, *here = u + row;
        const float *m_z = z < v->nz - 1 ? m + v->ny * nx : zeros, *m_y = y < v->ny - 1 ? m + nx : zeros;
        const float *u_y = y < v->ny - 1 ? here + nx : here;
        /* The last voxel by itself: there is nothing behind it. */
        for (size x = 0, count = nx - 1; x < nx; x += count, count = 1) {
            const int last = x == nx - 1;
            dual_row(last ? 1 : count, v->relax / 6, v->weight, m + x, m_z + x, m_y + x, last ? zeros : m + x + 1,
                     here + x, above + row + x, u_y + x, last ? here + x : here + x + 1, crossed + x, d.z + row + x,
                     d.y + row + x, d.x + row + x, to.z + row + x, to.y + row + x, to.x + row + x);
            if (last) break;
        }
    }
}

/* All steps of planes z0 .. z1 - 1 in one pass: as a plane arrives, step s takes the plane s before it. `steps` planes
 * on either side are computed too and thrown away, so that slabs need not wait for each other. */
static int variation_slab(const Variation *v, int steps, size z0, size z1) {
    const size plane = v->ny * v->nx, from = z0 > steps ? z0 - steps : 0, to = least(v->nz, z1 + steps);
    const size pad = (plane + 15) / 16 * 16;
    /* Per step two planes of u and two of each dual component; then zeros and the mask of x. */
    float *memory = scratch(sizeof(float) * (pad * (8 * (steps + 1) + 1) + v->nx), 0);
    if (!memory) return 0;
    float *zeros = memory + pad * 8 * (steps + 1), *crossed = zeros + pad;
    memset(zeros, 0, sizeof(float) * pad);
    for (size x = 0; x < v->nx; x++) crossed[x] = x + 1 != v->low && x + 1 != v->high && x + 1 != v->nx;
#define U(s, z) (memory + pad * (8 * (s) + ((z) & 1)))
#define P(s, z, k) (memory + pad * (8 * (s) + 2 + 2 * (k) + ((z) & 1)))
    for (size front = from; front < to + steps; front++)
        for (int s = 0; s <= steps; s++) {
            const size z = front - s; /* dual s of plane z is ready now; its u, then dual s + 1 of plane z - 1 */
            if (z < from || z >= to) continue;
            Dual d = s ? (Dual){P(s, z, 0), P(s, z, 1), P(s, z, 2)} : plane_of(v->dual, z * plane);
            if (s) {
                const Dual old = s > 1 ? (Dual){P(s - 1, z, 0), P(s - 1, z, 1), P(s - 1, z, 2)}
                                       : plane_of(v->dual, z * plane);
                DualOut new = {P(s, z, 0), P(s, z, 1), P(s, z, 2)};
                const float *above = z + 1 < to ? U(s - 1, z + 1) : U(s - 1, z);
                dual_plane(v, z, old, U(s - 1, z), above, zeros, crossed, new);
            }
            const float *below = zeros;
            if (z > 0 && s == 0) below = v->dual.z + (z - 1) * plane;
            else if (z > from) below = P(s, z - 1, 0);
            if (s < steps) {
                primal_plane(v, z, d, below, zeros, U(s, z));
            } else if (z >= z0 && z < z1) {
                if (v->primal) primal_plane(v, z, d, below, zeros, v->primal + z * plane);
                memcpy(v->out.z + z * plane, d.z, sizeof(float) * plane);
                memcpy(v->out.y + z * plane, d.y, sizeof(float) * plane);
                memcpy(v->out.x + z * plane, d.x, sizeof(float) * plane);
            }
        }
    return 1;
}

static int variation_pass(const Variation *whole, size count, int steps) {
    const size voxels = whole->nz * whole->ny * whole->nx;
    const size slabs = least((threads() + count - 1) / count, (whole->nz + 7) / 8);
    int ok = 1;
#pragma omp parallel for schedule(dynamic) reduction(&& : ok)
    for (size job = 0; job < count * slabs; job++) {
        const size at = job / slabs * voxels, slab = job % slabs;
        Variation v = *whole;
        v.volume += at, v.metric += at, v.dual = plane_of(v.dual, at);
        v.out.z += at, v.out.y += at, v.out.x += at;
        if (v.primal) v.primal += at;
        ok = variation_slab(&v, steps, slab * v.nz / slabs, (slab + 1) * v.nz / slabs) && ok;
    }
    return ok;
}

/* At most STEPS steps per pass; the dual goes to and fro between the result and a second one. */
static int variation(const Variation *whole, size count, int steps) {
    const size voxels = count * whole->nz * whole->ny * whole->nx;
    const int passes = steps > STEPS ? (steps + STEPS - 1) / STEPS : 1;
    float *memory = passes > 1 ? malloc(3 * sizeof(float) * voxels) : NULL;
    if (passes > 1 && !memory) return 0;
    const DualOut second = {memory, memory + voxels, memory + 2 * voxels};
    Variation v = *whole;
    int ok = 1;
    for (int k = 0; ok && k < passes; k++) {
        v.primal = k == passes - 1 ? whole->primal : NULL;
        v.out = (passes - 1 - k) % 2 ? second : whole->out;
        ok = variation_pass(&v, count, (k + 1) * (int64_t)steps / passes - k * (int64_t)steps / passes);
        v.dual = (Dual){v.out.z, v.out.y, v.out.x};
    }
    free(memory);
    return ok;
}

/* ------------------------------------------------------------------------------------- XLA's calling convention */

static XLA_FFI_Buffer *argument(XLA_FFI_CallFrame *frame, int k) { return frame->args.args[k]; }
static XLA_FFI_Buffer *result(XLA_FFI_CallFrame *frame, int k) { return frame->rets.rets[k]; }
static float *floats(XLA_FFI_Buffer *buffer) { return buffer->data; }

/* XLA asks each handler for its version once, by a call that carries this extension. */
static int answered_version(XLA_FFI_CallFrame *frame) {
    XLA_FFI_Extension_Base *extension = frame->extension_start;
    if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
    struct XLA_FFI_Metadata *metadata = ((struct XLA_FFI_Metadata_Extension *)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return 1;
}

static XLA_FFI_Error *answer(XLA_FFI_CallFrame *frame, int ok) {
    if (ok) return NULL;
    XLA_FFI_Error_Create_Args args = {0};
    args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
    args.message = "a projection or a TV step found no memory for its buffers: lower data.size or use fewer workers";
    args.errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
    return frame->api->XLA_FFI_Error_Create(&args);
}

static Rays rays_between(XLA_FFI_CallFrame *frame, XLA_FFI_Buffer *volumes, XLA_FFI_Buffer *images) {
    const int64_t *volume = volumes->dims, *image = images->dims;
    return (Rays){volume[0], volume[1], volume[2], volume[3], image[1], image[2], floats(argument(frame, 1)),
                  floats(argument(frame, 2)), floats(argument(frame, 3))};
}

/* Arguments: volumes (count, nz, ny, nx), cos, sin and weight (tilt). Result: images (count, tilt, pixels, nx). */
XLA_FFI_Error *tomoatlas_project(XLA_FFI_CallFrame *frame) {
    if (answered_version(frame)) return NULL;
    const Rays rays = rays_between(frame, argument(frame, 0), result(frame, 0));
    return answer(frame, project(&rays, floats(argument(frame, 0)), floats(result(frame, 0))));
}

/* Arguments: images (count, tilt, pixels, nx), cos, sin and weight (tilt). Result: volumes (count, nz, ny, nx). */
XLA_FFI_Error *tomoatlas_backproject(XLA_FFI_CallFrame *frame) {
    if (answered_version(frame)) return NULL;
    const Rays rays = rays_between(frame, result(frame, 0), argument(frame, 0));
    return answer(frame, backproject(&rays, floats(argument(frame, 0)), floats(result(frame, 0))));
}

/* Arguments: volumes and metric (count, nz, ny, nx), their dual's z, y and x, numbers (weight, floor, relaxation),
 * integers (steps, low, high). Results: the primal volumes and the dual. */
XLA_FFI_Error *tomoatlas_variation(XLA_FFI_CallFrame *frame) {
    if (answered_version(frame)) return NULL;
    const int64_t *shape = argument(frame, 0)->dims;
    const float *numbers = floats(argument(frame, 5));
    const int32_t *integers = argument(frame, 6)->data;
    const Variation v = {
        shape[1], shape[2], shape[3], integers[1], integers[2], numbers[0], numbers[1], numbers[2],
        floats(argument(frame, 0)), floats(argument(frame, 1)),
        {floats(argument(frame, 2)), floats(argument(frame, 3)), floats(argument(frame, 4))},
        floats(result(frame, 0)), {floats(result(frame, 1)), floats(result(frame, 2)), floats(result(frame, 3))}};
    return answer(frame, variation(&v, shape[0], integers[0]));
}
