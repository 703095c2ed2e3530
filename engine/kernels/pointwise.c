/* Norms, rotary embedding and gated activations, over as many rows as there are. */
#include "pointwise.h"
#include "python_arguments.h"

extern const PointwiseKernels portable_pointwise_kernels, avx2_pointwise_kernels,
    avx512_pointwise_kernels, neon_pointwise_kernels;

/* Fewer elements than this are done sooner than another thread begins. */
enum { PIECE_ELEMENTS = 16384 };

static const PointwiseKernels *kernels(void) {
#if defined(HAVE_X86)
    if (allowed_isa & ISA_AVX512) return &avx512_pointwise_kernels;
    if (allowed_isa & ISA_AVX2) return &avx2_pointwise_kernels;
#elif defined(HAVE_NEON)
    if (allowed_isa & ISA_NEON) return &neon_pointwise_kernels;
#endif
    return &portable_pointwise_kernels;
}

static void norm_piece(void *norm, int64_t begin, int64_t end) {
    kernels()->norm(norm, begin, end);
}

static void rope_piece(void *rope, int64_t begin, int64_t end) {
    kernels()->rope(rope, begin, end);
}

static void gated_piece(void *gated, int64_t begin, int64_t end) {
    kernels()->gated(gated, begin, end);
}

static PyObject *run(int64_t rows, int64_t row_elements, Task task, void *context) {
    int64_t grain = PIECE_ELEMENTS / (row_elements + 1) + 1;
    if (rows <= grain) { /* too short to let another Python thread in */
        task(context, 0, rows);
        Py_RETURN_NONE;
    }
    Py_BEGIN_ALLOW_THREADS
    parallel_for(rows, grain, task, context);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* x, residual, weight, out; stride, inner, inner_stride; rows, size, dtype, round_first; epsilon and
 * weight_offset as float. */
static PyObject *py_norm(PyObject *module, PyObject *const *args, Py_ssize_t num_args) {
    int64_t number[11];
    if (!integers(args, num_args - 2, 11, number)) return NULL; /* 13 in all */
    double epsilon = PyFloat_AsDouble(args[11]), offset = PyFloat_AsDouble(args[12]);
    if (PyErr_Occurred()) return NULL;
    Norm norm = {
        .x = (const char *)number[0],
        .residual = (char *)number[1],
        .weight = (const char *)number[2],
        .out = (char *)number[3],
        .stride = number[4],
        .inner = number[5],
        .inner_stride = number[6],
        .rows = number[7],
        .size = number[8],
        .dtype = (int)number[9],
        .round_first = (int)number[10],
        .epsilon = (float)epsilon,
        .weight_offset = (float)offset,
    };
    return run(norm.rows, norm.size, norm_piece, &norm);
}

/* x, cosine, sine; strides of rows, heads and the tables; rows, heads, size, dtype, table dtype */
static PyObject *py_rope(PyObject *module, PyObject *const *args, Py_ssize_t num_args) {
    int64_t number[11];
    if (!integers(args, num_args, 11, number)) return NULL;
    Rope rope = {
        .x = (char *)number[0],
        .cosine = (const char *)number[1],
        .sine = (const char *)number[2],
        .row_stride = number[3],
        .head_stride = number[4],
        .table_stride = number[5],
        .rows = number[6],
        .heads = number[7],
        .size = number[8],
        .dtype = (int)number[9],
        .table_dtype = (int)number[10],
    };
    return run(rope.rows, rope.heads * rope.size, rope_piece, &rope);
}

/* gate, up, out; their strides; rows, size, dtype, activation */
static PyObject *py_gated(PyObject *module, PyObject *const *args, Py_ssize_t num_args) {
    int64_t number[10];
    if (!integers(args, num_args, 10, number)) return NULL;
    Gated gated = {
        .gate = (const char *)number[0],
        .up = (const char *)number[1],
        .out = (char *)number[2],
        .gate_stride = number[3],
        .up_stride = number[4],
        .out_stride = number[5],
        .rows = number[6],
        .size = number[7],
        .dtype = (int)number[8],
        .activation = (int)number[9],
    };
    return run(gated.rows, gated.size, gated_piece, &gated);
}

PyMethodDef pointwise_methods[] = {
    {"norm", (PyCFunction)(void (*)(void))py_norm, METH_FASTCALL, NULL},
    {"rope", (PyCFunction)(void (*)(void))py_rope, METH_FASTCALL, NULL},
    {"gated", (PyCFunction)(void (*)(void))py_gated, METH_FASTCALL, NULL},
    {NULL},
};
