/* The module engine.kernels._native: every file's functions, and the choice of kernels. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "native.h"
#include "python_arguments.h"

/* One array of functions for each file that has some; NULL ends the list. */
extern PyMethodDef attention_methods[], linear_methods[], pointwise_methods[];

static PyMethodDef *const METHODS[] = {
    attention_methods,
    linear_methods,
    pointwise_methods,
    NULL,
};

static PyObject *py_choose(PyObject *module, PyObject *name) {
    const char *wanted = PyUnicode_AsUTF8(name), *why_not;
    if (!wanted) return NULL;
    if ((why_not = allow_isa(wanted))) {
        PyErr_SetString(PyExc_ValueError, why_not);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_name(PyObject *module, PyObject *unused) {
    return PyUnicode_FromString(isa_name());
}

static PyObject *py_set_threads(PyObject *module, PyObject *threads) {
    long wanted = PyLong_AsLong(threads);
    if (wanted == -1 && PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    set_num_threads(wanted > 256 ? 256 : (int)wanted);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_threads(PyObject *module, PyObject *unused) {
    return PyLong_FromLong(num_threads());
}

static PyMethodDef module_methods[] = {
    {"choose", py_choose, METH_O, NULL},
    {"name", py_name, METH_NOARGS, NULL},
    {"set_threads", py_set_threads, METH_O, NULL},
    {"threads", py_threads, METH_NOARGS, NULL},
    {NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "engine.kernels._native",
    .m_doc = "Kernels in C; engine.kernels gives them types.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__native(void) {
    allow_isa("auto");
    PyObject *module = PyModule_Create(&definition);
    for (PyMethodDef *const *methods = METHODS; module && *methods; methods++)
        if (PyModule_AddFunctions(module, *methods)) Py_CLEAR(module);
    if (module && PyModule_AddIntConstant(module, "VERSION", KERNELS_VERSION)) Py_CLEAR(module);
    return module;
}
