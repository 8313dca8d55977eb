/* The proximal operator of total variation, and the coupling of a voxel's elements, on a CPU.
 *
 * Same semantics as the JAX forms of engine/penalties.py and engine/coupling.py, which are the reference. What they
 * gain over XLA: several TV steps in one pass over memory; for the coupling, all elements of a voxel at once, one pass
 * for a dozen, and powers that vectorise.
 */
#include "native.h"

#define SPAN 128 /* voxels along x that are coupled at a time: 3 KB per element */
#define STEPS 6 /* of TV in one pass: at 192^3 20 steps took 2.1, 1.8, 2.2, 3.3 ns per voxel and step by 3, 6, 8, 20 */

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

/* -------------------------------------------------------------------------------------------------- coupling */

typedef struct {
    size elements, nz, ny, nx;
    const float *x, *images, *maps, *bound, *contrast;
    float gamma, scale, rho, floor;
    Dual dual;
    const float *edge;     /* the dual's x component in front of the first plane: (elements, nz, ny) */
    float *volume;         /* TV's target, or with `scatter` the next volume */
    float *rate, *scatter; /* one of them is NULL */
} Coupling;

/* One element in a row of voxels: its share is u = max(free - give total, floor), and pushes back by weight (u - x). */
typedef struct { float x[SPAN], plain[SPAN], rate[SPAN], free[SPAN], give[SPAN], weight[SPAN]; } Element;

/* x^g of a positive x, to 3e-7 of itself where |g log2 x| < 30; infinity and NaN stay. As 2^(g log2 x): the exponent's
 * whole part times g is taken off by fused arithmetic, or its rounding alone would exceed that. Minimax polynomials. */
static inline float power(float x, float g) {
    union { float value; int32_t bits; } part = {x}, whole;
    const int32_t exponent = (part.bits - 0x3f3504f3) >> 23; /* leaves a factor from sqrt(1/2) to sqrt(2) */
    part.bits -= exponent * (1 << 23);
    const float t = part.value - 1, e = exponent;
    float log = 0.125836983f;
    log = log * t - 0.207269728f, log = log * t + 0.215715617f, log = log * t - 0.238944829f;
    log = log * t + 0.287916243f, log = log * t - 0.360703677f, log = log * t + 0.480910629f;
    log = log * t - 0.721347332f, log = log * t + 1.442695022f, log *= t;
    float n = rintf(g * (e + log));
    n = n < -127 ? -127 : n > 128 ? 128 : n;
    const float f = __builtin_fmaf(g, log, __builtin_fmaf(g, e, -n));
    float exp = 0.000153458124f;
    exp = exp * f + 0.00133999309f, exp = exp * f + 0.00961848907f, exp = exp * f + 0.0555032864f;
    exp = exp * f + 0.240226462f, exp = exp * f + 0.693147182f, exp = exp * f + 1;
    whole.bits = ((int32_t)n + 127) * (1 << 23);
    return x <= 3e38f ? exp * whole.value : x;
}

/* K'dual of `width` voxels from x0 on, in row y of plane z of a volume whose voxels start at `at`. */
static void adjoint_row(const Coupling *c, size element, size z, size y, size x0, size width, float *restrict back) {
    const size nx = c->nx, plane = c->ny * nx, at = ((element * c->nz + z) * c->ny + y) * nx + x0;
    const Dual d = plane_of(c->dual, at);
    back[0] = (x0 ? d.x[-1] : c->edge[(element * c->nz + z) * c->ny + y]) - d.x[0] - d.y[0] - d.z[0];
    for (size x = 1; x < width; x++) back[x] = d.x[x - 1] - d.x[x] - d.y[x] - d.z[x];
    if (z)
        for (size x = 0; x < width; x++) back[x] += d.z[x - plane];
    if (y)
        for (size x = 0; x < width; x++) back[x] += d.y[x - nx];
}

static void element_row(const Coupling *c, size element, size row, size x0, size width, const float *restrict back,
                        Element *restrict to) {
    const size at = (element * c->nz * c->ny + row) * c->nx + x0;
    const float *restrict x = c->x + at, *restrict map = c->maps + at, *restrict bound = c->bound + at;
    const float *restrict image = c->images + row * c->nx + x0;
    const float gamma = c->gamma, factor = gamma * c->contrast[element], scale = c->scale, rho = c->rho;
    for (size k = 0; k < width; k++) {
        const float slope = factor * power(x[k], gamma - 1), pull = slope * image[k];
        const float bend = pull < 0 ? 0 : (gamma - 1) * pull; /* times x; this way round a NaN stays */
        const float rate = x[k] / (scale * bound[k] * x[k] + bend), plain = x[k] - rate * (pull + map[k]);
        to->x[k] = x[k], to->plain[k] = plain, to->rate[k] = rate;
        to->free[k] = plain - rate * back[k], to->give[k] = rate * slope, to->weight[k] = rho * slope;
    }
}

/* rho slope . (u - x) of the minimiser u: the root of a concave, piecewise linear function with a kink per element at
 * most, so that Newton's method ends after one step more than that. */
static void balance(const Element *each, size elements, size width, float floor, float *restrict total) {
    float excess[SPAN], curvature[SPAN], before[SPAN];
    for (size k = 0; k < width; k++) total[k] = before[k] = 0;
    for (size step = 0, changed = 1; step <= elements && changed; step++) {
        for (size k = 0; k < width; k++) excess[k] = total[k], curvature[k] = 1;
        for (const Element *e = each; e < each + elements; e++)
            for (size k = 0; k < width; k++) {
                const float u = e->free[k] - e->give[k] * total[k];
                excess[k] -= e->weight[k] * ((u < floor ? floor : u) - e->x[k]);
                curvature[k] += u > floor ? e->weight[k] * e->give[k] : 0;
            }
        int other = 0; /* elements leave the floor or reach it one after the other: no two sets have one curvature */
        for (size k = 0; k < width; k++) {
            other |= curvature[k] != before[k];
            before[k] = curvature[k];
            total[k] -= excess[k] / curvature[k];
        }
        changed = other;
    }
}

/* Asks for the next row of what `element_row` and `adjoint_row` read: more streams than a processor foresees. */
static void fetch_row(const Coupling *c, size element, size row, size x0, size width) {
    const size plane = c->ny * c->nx, at = (element * c->nz * c->ny + row + 1) * c->nx + x0;
    const float *next[] = {c->x + at, c->maps + at, c->bound + at, c->dual.z + at, c->dual.y + at, c->dual.x + at,
                           c->dual.z + (at > plane ? at - plane : 0), c->images + (row + 1) * c->nx + x0};
    for (size x = 0; x < width; x += 16)
        for (int k = 0; k < 7 + !element; k++) __builtin_prefetch(next[k] + x);
}

static void couple_voxels(const Coupling *c, size row, size x0, size width, Element *each) {
    float total[SPAN], back[SPAN], sum[SPAN] = {0};
    for (size e = 0; e < c->elements; e++) {
        fetch_row(c, e, row, x0, width);
        adjoint_row(c, e, row / c->ny, row % c->ny, x0, width, back);
        element_row(c, e, row, x0, width, back, each + e);
    }
    balance(each, c->elements, width, c->floor, total);
    for (size e = 0; e < c->elements; e++) {
        const size at = (e * c->nz * c->ny + row) * c->nx + x0;
        const Element *restrict one = each + e;
        float *restrict to = c->volume + at;
        if (c->rate) {
            for (size k = 0; k < width; k++) to[k] = one->plain[k] - one->give[k] * total[k];
            memcpy(c->rate + at, one->rate, sizeof(float) * width);
            continue;
        }
        for (size k = 0; k < width; k++) {
            const float u = one->free[k] - one->give[k] * total[k], new = u < c->floor ? c->floor : u;
            to[k] = new;
            sum[k] += c->contrast[e] * power(new, c->gamma);
        }
    }
    if (c->scatter) memcpy(c->scatter + row * c->nx + x0, sum, sizeof(float) * width);
}

static int couple(const Coupling *c) {
    int ok = 1;
#pragma omp parallel for schedule(static) reduction(&& : ok)
    for (size row = 0; row < c->nz * c->ny; row++) {
        Element *each = scratch(sizeof(Element) * c->elements, 1);
        for (size x0 = 0; each && x0 < c->nx; x0 += SPAN)
            couple_voxels(c, row, x0, least(SPAN, c->nx - x0), each);
        ok = ok && each;
    }
    return ok;
}

/* -------------------------------------------------------------------------------------------------- handlers */

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

static Coupling coupling_of(XLA_FFI_CallFrame *frame) {
    const int64_t *shape = argument(frame, 0)->dims;
    const float *numbers = floats(argument(frame, 5));
    return (Coupling){
        shape[0], shape[1], shape[2], shape[3], floats(argument(frame, 0)), floats(argument(frame, 1)),
        floats(argument(frame, 2)), floats(argument(frame, 3)), floats(argument(frame, 4)), numbers[0], numbers[1],
        numbers[2], numbers[3], {floats(argument(frame, 6)), floats(argument(frame, 7)), floats(argument(frame, 8))},
        floats(argument(frame, 9)), floats(result(frame, 0)), NULL, NULL};
}

/* Arguments: x (elements, nz, ny, nx), image pull (nz, ny, nx), map pull and bound as x, contrast (elements), numbers
 * (gamma, scale, rho, floor), the dual's z, y and x, its edge. Results: TV's target and the step size per voxel. */
XLA_FFI_Error *tomoatlas_target(XLA_FFI_CallFrame *frame) {
    if (answered_version(frame)) return NULL;
    Coupling c = coupling_of(frame);
    c.rate = floats(result(frame, 1));
    return answer(frame, couple(&c));
}

/* The same arguments. Results: the next volume and what it scatters, (nz, ny, nx). */
XLA_FFI_Error *tomoatlas_minimiser(XLA_FFI_CallFrame *frame) {
    if (answered_version(frame)) return NULL;
    Coupling c = coupling_of(frame);
    c.scatter = floats(result(frame, 1));
    return answer(frame, couple(&c));
}
