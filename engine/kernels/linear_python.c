/* The functions of linear.c and linear_pack.c as Python calls them: addresses are integers, 0 for
 * none, and strides are in elements. */
#include "python_arguments.h"

#include "linear.h"

/* linear(format, rows, cols, strips, tokens, x, x_dtype, x_stride, y, y_dtype, y_stride,
 *        bias, bias_dtype, residual, residual_dtype, residual_stride) */
static PyObject *py_linear(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    int64_t a[16];
    if (!integers(args, count, 16, a)) return NULL;
    Linear work = {
        .format = (int)a[0],
        .rows = a[1],
        .cols = a[2],
        .strips = (const uint8_t *)a[3],
        .tokens = a[4],
        .x = (const uint8_t *)a[5],
        .x_dtype = (int)a[6],
        .x_stride = a[7] * dtype_bytes((int)a[6]),
        .y = (uint8_t *)a[8],
        .y_dtype = (int)a[9],
        .y_stride = a[10] * dtype_bytes((int)a[9]),
        .bias = (const void *)a[11],
        .bias_dtype = (int)a[12],
        .residual = (const uint8_t *)a[13],
        .residual_dtype = (int)a[14],
        .residual_stride = a[15] * dtype_bytes((int)a[14]),
    };
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = linear(&work);
    Py_END_ALLOW_THREADS
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* pack(format, rows, cols, strips, matrix, dtype, row_stride, col_stride), and unpack(). False
 * where bf12 has no room for all the weights that it has to list. */
static int packing(PyObject *const *args, Py_ssize_t count, Pack *work) {
    int64_t a[8];
    if (!integers(args, count, 8, a)) return 0;
    *work = (Pack){
        .format = (int)a[0],
        .rows = a[1],
        .cols = a[2],
        .strips = (uint8_t *)a[3],
        .matrix = (uint8_t *)a[4],
        .dtype = (int)a[5],
        .row_stride = a[6],
        .col_stride = a[7],
    };
    return 1;
}

static PyObject *py_pack(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Pack work;
    int done;
    if (!packing(args, count, &work)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    done = pack(&work);
    Py_END_ALLOW_THREADS
    if (work.no_memory) return PyErr_NoMemory();
    return PyBool_FromLong(done);
}

static PyObject *py_unpack(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Pack work;
    int done;
    if (!packing(args, count, &work)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    done = unpack(&work);
    Py_END_ALLOW_THREADS
    if (!done) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyMethodDef linear_methods[] = {
    {"linear", (PyCFunction)(void (*)(void))py_linear, METH_FASTCALL, NULL},
    {"pack", (PyCFunction)(void (*)(void))py_pack, METH_FASTCALL, NULL},
    {"unpack", (PyCFunction)(void (*)(void))py_unpack, METH_FASTCALL, NULL},
    {NULL},
};
