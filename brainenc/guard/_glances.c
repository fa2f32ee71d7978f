/* What brainenc/guard/glances.py does in Python, at half of its price: most of a glance is waking up, and after a sleep
   an interpreter finds nothing of itself in the processor's caches. Optional: without it, Python does it. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define MOST 64 /* of one call; the caller calls again */

static double monotonic(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static PyObject *listed(const double *times, const long long *numbers, int n) {
    PyObject *list = PyList_New(n);
    for (int i = 0; list != NULL && i < n; i++) {
        PyObject *glance = Py_BuildValue("(dL)", times[i], numbers[i]);
        if (glance == NULL || PyList_SetItem(list, i, glance) < 0) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

static PyObject *glances(PyObject *Py_UNUSED(module), PyObject *args) {
    int inbox, fd, n = 0, failed = 0, garbled = 0;
    double nap_s, until, times[MOST];
    long long low, high, numbers[MOST];
    if (!PyArg_ParseTuple(args, "ididLL", &inbox, &nap_s, &fd, &until, &low, &high)) return NULL;
    const struct timespec nap = {(time_t)nap_s, (long)(1e9 * (nap_s - (double)(time_t)nap_s))};
    struct pollfd said = {.fd = inbox, .events = POLLIN}; /* poll passes over a negative one */

    Py_BEGIN_ALLOW_THREADS
    int spoken = poll(&said, 1, 0); /* once: to sleep in poll costs a tenth more than to sleep */
    while (!spoken && n < MOST) {
        nanosleep(&nap, NULL);
        const double now = monotonic();
        if (now >= until) break;
        char text[32], *end;
        const ssize_t length = pread(fd, text, sizeof text - 1, 0);
        if (length < 0) {
            failed = errno;
            break;
        }
        text[length] = 0;
        const long long number = strtoll(text, &end, 10);
        if (end == text) {
            garbled = 1;
            break;
        }
        if (number < low || number > high) break;
        times[n] = now;
        numbers[n++] = number;
    }
    Py_END_ALLOW_THREADS

    if (failed) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (garbled) {
        PyErr_SetString(PyExc_ValueError, "the file that is glanced at holds no number");
        return NULL;
    }
    return listed(times, numbers, n);
}

static PyMethodDef methods[] = {
    {"glances", glances, METH_VARARGS, "As brainenc.guard.glances.in_python."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_glances", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__glances(void) { return PyModule_Create(&definition); }
