/* Projection and back projection on a CPU.
 *
 * Same semantics as the JAX forms of engine/projector.py, which are the reference; called from compiled programs
 * through XLA's foreign function interface. engine/native.py compiles this file for the processor it runs on. What it
 * gains over XLA: accumulators in registers, and tiles that stay in the second-level cache.
 *
 * x is contiguous. CHUNK planes are handled at a time, copied into buffers in which a row of voxels is followed by
 * zeros, so that taps need no bounds.
 */
#include "native.h"

#define TILE (512 * 1024) /* bytes of a tile: half of a common second-level cache */
#define GUARD 3           /* zeros of a row: one before it, two behind */

static inline float between(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

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

/* -------------------------------------------------------------------------------------------------- handlers */

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
