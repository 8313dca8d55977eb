/* The proximal operator of total variation, and the coupling of a voxel's elements, on a CPU.
 *
 * Same semantics as the JAX forms of engine/penalties.py and engine/coupling.py, which are the reference. What they
 * gain over XLA: several TV steps in one pass over memory; for the coupling, all elements of a voxel at once, one pass
 * for a dozen, and powers that vectorise.
 */
#include "native.h"

#define SPAN 1024 /* voxels that are coupled at a time: in runs of 128, of so many arrays, it took 1.4 times as long */
#define STEPS 6 /* of TV in one pass: at 192^3 20 steps took .87, .72, .64, 1.07 ns per voxel each by 3, 6, 12, 20 */

/* ------------------------------------------------------------------------------------------- total variation */

typedef struct { float *z, *y, *x; } Dual;
typedef struct {
    size nz, ny, nx, low, high; /* planes low .. high - 1 exist: no difference is taken across their ends */
    float weight, floor, relax;
    const float *volume, *metric;
    Dual dual;     /* raised in place */
    float *primal; /* NULL: not asked for */
} Variation;

/* Planes z0 .. z1 - 1 of a volume, and those from .. to - 1 that they depend on, of which it has copies. */
typedef struct { size z0, z1, from, to; Dual before, behind; } Slab;

static Dual plane_of(Dual d, size offset) { return (Dual){d.z + offset, d.y + offset, d.x + offset}; }

static Dual slab_plane(const Variation *v, const Slab *s, size z) {
    const size plane = v->ny * v->nx;
    if (z < s->z0) return plane_of(s->before, (z - s->from) * plane);
    return z < s->z1 ? plane_of(v->dual, z * plane) : plane_of(s->behind, (z - s->z1) * plane);
}

/* u = max(volume - metric K'dual, floor) of row y of plane z. zeros: a row of them. */
static void primal_row(const Variation *v, const Slab *s, size z, size y, const float *zeros, float *restrict u) {
    const size nx = v->nx;
    const float *volume = v->volume + (z * v->ny + y) * nx, *metric = v->metric + (z * v->ny + y) * nx;
    const Dual d = plane_of(slab_plane(v, s, z), y * nx);
    const float *below = z > s->from ? slab_plane(v, s, z - 1).z + y * nx : zeros, *before = y ? d.y - nx : zeros;
    const float floor = v->floor, *restrict dz = d.z, *restrict dy = d.y, *restrict dx = d.x;
    /* From y = 1 on there is a value in front of the row, another row's: the first voxel is set apart from it below. */
    for (size x = !y; x < nx; x++) {
        const float value = volume[x] - metric[x] * (below[x] - dz[x] + before[x] - dy[x] + dx[x - 1] - dx[x]);
        u[x] = value < floor ? floor : value; /* this way round a NaN stays */
    }
    const float first = volume[0] - metric[0] * (below[0] - dz[0] + before[0] - dy[0] - dx[0]);
    u[0] = first < floor ? floor : first;
}

/* relax / (6 (metric here + the largest here and behind)), the step size of a plane's dual. */
static void rate_plane(const Variation *v, size z, const float *zeros, float *rate) {
    const size nx = v->nx;
    const float relax = v->relax / 6;
    for (size y = 0; y < v->ny; y++) {
        const float *m = v->metric + (z * v->ny + y) * nx;
        const float *m_z = z < v->nz - 1 ? m + v->ny * nx : zeros, *m_y = y < v->ny - 1 ? m + nx : zeros;
        float *restrict to = rate + y * nx;
        for (size x = 0; x < nx; x++) {
            const float most = m_z[x] > m_y[x] ? m_z[x] : m_y[x];
            to[x] = most > m[x] ? most : m[x];
        }
        for (size x = 0; x < nx - 1; x++) to[x] = relax / (m[x] + (m[x + 1] > to[x] ? m[x + 1] : to[x]));
        to[nx - 1] = relax / (m[nx - 1] + to[nx - 1]);
    }
}

/* One projected gradient step of a row of the dual. u_z, u_y: the rows behind; crossed: 0 where x has none. */
static void dual_row(size count, float weight, const float *restrict rate, const float *restrict u,
                     const float *restrict u_z, const float *restrict u_y, const float *restrict crossed,
                     float *restrict dz, float *restrict dy, float *restrict dx) {
    for (size x = 0; x < count; x++) {
        const float a = dz[x] + rate[x] * (u_z[x] - u[x]), b = dy[x] + rate[x] * (u_y[x] - u[x]);
        const float c = dx[x] + rate[x] * crossed[x] * (u[x + 1] - u[x]);
        const float length = sqrtf(a * a + b * b + c * c);
        const float shrink = length > weight ? weight / length : 1;
        dz[x] = a * shrink, dy[x] = b * shrink, dx[x] = c * shrink;
    }
}

/* Memory of a slab's pass: per step a plane of u and one row more; step sizes of the planes that steps are at. */
typedef struct { size stride; float *u, *rate, *zeros, *crossed; } Room;

static float *u_row(const Variation *v, const Room *r, int step, size z, size y) {
    return r->u + (step * (v->ny + 1) + (z * v->ny + y) % (v->ny + 1)) * r->stride;
}

/* Step `step` of plane z. The dual is overwritten, and so u of the plane behind is taken from it row by row ahead. */
static void step_plane(const Variation *v, const Slab *s, const Room *r, int step, int steps, size z) {
    const size nx = v->nx;
    const float *rate = r->rate + z % steps * v->ny * nx;
    const Dual d = slab_plane(v, s, z);
    for (size y = 0; z == s->from && y < v->ny; y++) primal_row(v, s, z, y, r->zeros, u_row(v, r, step, z, y));
    for (size y = 0; y < v->ny; y++) {
        const float *u = u_row(v, r, step, z, y), *u_y = y < v->ny - 1 ? u_row(v, r, step, z, y + 1) : u;
        float *u_z = z < s->to - 1 ? u_row(v, r, step, z + 1, y) : NULL;
        if (u_z) primal_row(v, s, z + 1, y, r->zeros, u_z);
        dual_row(nx, v->weight, rate + y * nx, u, u_z ? u_z : u, u_y, r->crossed, d.z + y * nx,
                 d.y + y * nx, d.x + y * nx);
    }
}

/* All steps of a slab in one pass over memory: in each plane, a step follows the one before it by one plane. */
static int variation_slab(const Variation *v, int steps, const Slab *s) {
    const size plane = v->ny * v->nx, stride = (v->nx + LANES) / LANES * LANES;
    Room r = {stride, scratch(sizeof(float) * (steps * ((v->ny + 1) * stride + plane) + 2 * v->nx), 0)};
    if (!r.u) return 0;
    r.rate = r.u + steps * (v->ny + 1) * stride;
    r.zeros = r.rate + steps * plane, r.crossed = r.zeros + v->nx;
    for (size x = 0; x < v->nx; x++)
        r.zeros[x] = 0, r.crossed[x] = x + 1 != v->low && x + 1 != v->high && x + 1 != v->nx;
    for (size row = 0; row < steps * (v->ny + 1); row++) r.u[row * stride + v->nx] = 0; /* behind the last voxel */
    for (size front = s->from; front < s->to + steps; front++) {
        if (steps && front < s->to) rate_plane(v, front, r.zeros, r.rate + front % steps * plane);
        for (int step = 0; step < steps; step++)
            if (front >= s->from + step && front < s->to + step) step_plane(v, s, &r, step, steps, front - step);
        for (size y = 0, z = front - steps; v->primal && z >= s->z0 && z < s->z1 && y < v->ny; y++)
            primal_row(v, s, z, y, r.zeros, v->primal + z * plane + y * v->nx);
    }
    return 1;
}

/* Where one element is cut into slabs, each gets copies of the planes around it, before any is changed. */
static Slab slab_of(const Variation *v, int steps, size index, size slabs, float *copies) {
    const size plane = v->ny * v->nx, z0 = index * v->nz / slabs, z1 = (index + 1) * v->nz / slabs;
    Slab s = {z0, z1, z0 > steps ? z0 - steps - 1 : 0, least(v->nz, z1 + steps)};
    const size before = (z0 - s.from) * plane, behind = (s.to - z1) * plane;
    s.before = (Dual){copies, copies + before, copies + 2 * before};
    copies += 3 * before;
    s.behind = (Dual){copies, copies + behind, copies + 2 * behind};
    return s;
}

static void copy_planes(Dual to, Dual from, size floats) {
    memcpy(to.z, from.z, sizeof(float) * floats);
    memcpy(to.y, from.y, sizeof(float) * floats);
    memcpy(to.x, from.x, sizeof(float) * floats);
}

static int variation_pass(const Variation *whole, size count, int steps) {
    const size plane = whole->ny * whole->nx, around = 3 * (2 * steps + 1) * plane; /* floats of a slab's copies */
    const size slabs = least((threads() + count - 1) / count, (whole->nz + 7) / 8);
    float *copies = slabs > 1 ? scratch(sizeof(float) * count * slabs * around, 1) : NULL;
    int ok = slabs == 1 || copies;
    for (int copying = slabs > 1; ok && copying >= 0; copying--)
#pragma omp parallel for schedule(dynamic) reduction(&& : ok)
        for (size job = 0; job < count * slabs; job++) {
            const size at = job / slabs * plane * whole->nz;
            Variation v = *whole;
            v.volume += at, v.metric += at, v.dual = plane_of(v.dual, at);
            if (v.primal) v.primal += at;
            const Slab s = slab_of(&v, steps, job % slabs, slabs, copies + job * around);
            if (copying) {
                copy_planes(s.before, plane_of(v.dual, s.from * plane), (s.z0 - s.from) * plane);
                copy_planes(s.behind, plane_of(v.dual, s.z1 * plane), (s.to - s.z1) * plane);
            } else
                ok = variation_slab(&v, steps, &s) && ok;
        }
    return ok;
}

/* At most STEPS steps per pass. */
static int variation(const Variation *whole, size count, int steps) {
    const int passes = steps > STEPS ? (steps + STEPS - 1) / STEPS : 1;
    Variation v = *whole;
    int ok = 1;
    for (int k = 0; ok && k < passes; k++) {
        v.primal = k == passes - 1 ? whole->primal : NULL;
        ok = variation_pass(&v, count, (k + 1) * (int64_t)steps / passes - k * (int64_t)steps / passes);
    }
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

/* K'dual of `width` voxels of plane z, from its voxel `from` on; a run may span rows. */
static void adjoint_run(const Coupling *c, size element, size z, size from, size width, float *restrict back) {
    static const float zeros[SPAN];
    const size nx = c->nx, plane = c->ny * nx, page = element * c->nz + z;
    const Dual d = plane_of(c->dual, page * plane + from);
    const float *below = z ? d.z - plane : zeros;
    for (size k = 1; k < width; k++) back[k] = d.x[k - 1] - d.x[k] - d.y[k] - d.z[k] + below[k];
    back[0] = (from % nx ? d.x[-1] : 0) - d.x[0] - d.y[0] - d.z[0] + below[0];
    for (size k = (nx - from % nx) % nx; k < width; k += nx) /* a row's first voxel has the edge in front of it */
        back[k] = c->edge[page * c->ny + (from + k) / nx] - d.x[k] - d.y[k] - d.z[k] + below[k];
    for (size k = from < nx ? nx - from : 0; k < width; k++) back[k] += d.y[k - nx];
}

static void element_run(const Coupling *c, size element, size voxel, size width, const float *restrict back,
                        Element *restrict to) {
    const size at = element * c->nz * c->ny * c->nx + voxel;
    const float *restrict x = c->x + at, *restrict map = c->maps + at, *restrict bound = c->bound + at;
    const float *restrict image = c->images + voxel;
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

/* All elements of `width` voxels of plane z, from its voxel `from` on. */
static void couple_run(const Coupling *c, size z, size from, size width, Element *each) {
    const size voxel = z * c->ny * c->nx + from;
    float total[SPAN], back[SPAN], sum[SPAN] = {0};
    for (size e = 0; e < c->elements; e++) {
        adjoint_run(c, e, z, from, width, back);
        element_run(c, e, voxel, width, back, each + e);
    }
    balance(each, c->elements, width, c->floor, total);
    for (size e = 0; e < c->elements; e++) {
        const size at = e * c->nz * c->ny * c->nx + voxel;
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
    if (c->scatter) memcpy(c->scatter + voxel, sum, sizeof(float) * width);
}

static int couple(const Coupling *c) {
    const size plane = c->ny * c->nx, runs = (plane + SPAN - 1) / SPAN;
    int ok = 1;
#pragma omp parallel for schedule(static) reduction(&& : ok)
    for (size job = 0; job < c->nz * runs; job++) {
        const size from = job % runs * SPAN;
        Element *each = scratch(sizeof(Element) * c->elements, 1);
        if (each) couple_run(c, job / runs, from, least(SPAN, plane - from), each);
        ok = ok && each;
    }
    return ok;
}

/* -------------------------------------------------------------------------------------------------- handlers */

/* Arguments: volumes and metric (count, nz, ny, nx), their dual's z, y and x, numbers (weight, floor, relaxation),
 * integers (steps, low, high). Results: the dual, in the memory it came in; and the primal volumes if there is a
 * fourth. */
XLA_FFI_Error *tomoatlas_variation(XLA_FFI_CallFrame *frame) {
    if (answered_version(frame)) return NULL;
    const int64_t *shape = argument(frame, 0)->dims;
    const float *numbers = floats(argument(frame, 5));
    const int32_t *integers = argument(frame, 6)->data;
    const Variation v = {
        shape[1], shape[2], shape[3], integers[1], integers[2], numbers[0], numbers[1], numbers[2],
        floats(argument(frame, 0)), floats(argument(frame, 1)),
        {floats(result(frame, 0)), floats(result(frame, 1)), floats(result(frame, 2))},
        frame->rets.size > 3 ? floats(result(frame, 3)) : NULL};
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
