/* What the C forms of the operators share: vectors, memory, XLA's calling convention. */
#ifndef TOMOATLAS_NATIVE_H
#define TOMOATLAS_NATIVE_H
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

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int64_t size;

static inline size least(size a, size b) { return a < b ? a : b; }

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

#endif
