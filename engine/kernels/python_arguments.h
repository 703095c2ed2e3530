/* Arguments of the functions that Python sees: plain integers, all of them needed. */
#ifndef COMBOIO_PYTHON_ARGUMENTS_H
#define COMBOIO_PYTHON_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Fills `values`; 0 and a Python error where the count or a type is wrong. */
static inline int integers(PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted,
                           int64_t *values) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments wanted, %zd given", wanted, count);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        values[i] = PyLong_AsLongLong(args[i]);
        if (values[i] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

#endif
