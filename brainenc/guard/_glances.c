/* What brainenc/guard/glances.py does in Python, at half of its price or less: after a sleep an interpreter finds
   nothing of itself in the processor's caches. Optional: without it, Python does it. */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef __linux__
#error "there are no such texts to read elsewhere"
#endif

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define CONTRACT 2 /* of glances(): raised together with the one in glances.py when arguments or results change */
#define LISTEN_EVERY_S 0.1
#define LONG_NAP_S 0.05
#define MOST_GLANCES 128 /* of one call; the caller calls again */
#define MOST_TEXTS 16
#define MOST_FIELDS 16

struct field {
    const char *name;
    size_t length;
    long long weight;
};

struct text {
    int fd, n_fields;
    long long low, high, offset;
    struct field fields[MOST_FIELDS];
};

static double monotonic(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int read_fields(PyObject *names, struct text *text) {
    const Py_ssize_t n = PyTuple_Size(names);
    if (n < 0) return -1;
    if (n > MOST_FIELDS) {
        PyErr_Format(PyExc_ValueError, "%zd numbers of one text; at most %d can be added", n, MOST_FIELDS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        Py_ssize_t length;
        struct field *field = &text->fields[i];
        if (!PyArg_ParseTuple(PyTuple_GetItem(names, i), "y#L", &field->name, &length, &field->weight)) return -1;
        field->length = (size_t)length;
    }
    text->n_fields = (int)n;
    return 0;
}

/* The names' bytes belong to the arguments, which outlive the call. */
static int read_texts(PyObject *given, struct text *texts) {
    const Py_ssize_t n = PyTuple_Size(given);
    if (n < 1 || n > MOST_TEXTS) {
        if (n >= 0) PyErr_Format(PyExc_ValueError, "%zd texts; from 1 to %d can be read", n, MOST_TEXTS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        struct text *text = &texts[i];
        PyObject *names, *one = PyTuple_GetItem(given, i);
        if (!PyTuple_Check(one)) {
            PyErr_SetString(PyExc_TypeError, "a text is a tuple");
            return -1;
        }
        if (!PyArg_ParseTuple(one, "iLLLO", &text->fd, &text->low, &text->high, &text->offset, &names)) return -1;
        if (read_fields(names, text) < 0) return -1;
    }
    return (int)n;
}

/* 0, or an errno; an empty text is ENODATA. */
static int sum(const struct text *text, long long *used) {
    char buffer[16384];
    ssize_t length;
    do length = pread(text->fd, buffer, sizeof buffer - 1, 0);
    while (length < 0 && errno == EINTR);
    if (length <= 0) return length < 0 ? errno : ENODATA;
    buffer[length] = 0;
    *used = text->offset;
    for (char *line = buffer, *end; *line; line = end + 1) {
        end = strchrnul(line, '\n');
        for (int i = 0; i < text->n_fields; i++) {
            const struct field *field = &text->fields[i];
            if ((size_t)(end - line) > field->length && memcmp(line, field->name, field->length) == 0) {
                *used += field->weight * strtoll(line + field->length, NULL, 10);
                break;
            }
        }
        if (!*end) break;
    }
    return 0;
}

static PyObject *listed(const double *times, long long (*used)[MOST_TEXTS], int n, int n_texts) {
    PyObject *list = PyList_New(n);
    for (int i = 0; list != NULL && i < n; i++) {
        PyObject *glance = PyTuple_New(n_texts + 1);
        int wrong = glance == NULL;
        for (int j = 0; !wrong && j <= n_texts; j++) {
            PyObject *value = j == 0 ? PyFloat_FromDouble(times[i]) : PyLong_FromLongLong(used[i][j - 1]);
            wrong = value == NULL || PyTuple_SetItem(glance, j, value) < 0;
        }
        if (wrong) Py_CLEAR(glance);
        if (glance == NULL || PyList_SetItem(list, i, glance) < 0) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

static PyObject *glances(PyObject *Py_UNUSED(module), PyObject *args) {
    int inbox, n_texts, n = 0, failed = 0, ended = 0;
    double nap_s, until, listened = -LISTEN_EVERY_S, times[MOST_GLANCES];
    long long used[MOST_GLANCES][MOST_TEXTS];
    struct text texts[MOST_TEXTS];
    PyObject *given;
    if (!PyArg_ParseTuple(args, "iddO!", &inbox, &nap_s, &until, &PyTuple_Type, &given)) return NULL;
    if (!(nap_s >= 0 && nap_s < 3600)) {
        PyErr_SetString(PyExc_ValueError, "a nap takes from 0 to 3600 seconds");
        return NULL;
    }
    if ((n_texts = read_texts(given, texts)) < 0) return NULL;

    Py_BEGIN_ALLOW_THREADS
    struct pollfd said = {.fd = inbox, .events = POLLIN}; /* poll passes over a negative one */
    double now = monotonic();
    while (!ended && n < MOST_GLANCES) {
        const double nap = now + nap_s <= until ? nap_s : now < until ? until - now : 0;
        struct timespec rest = {(time_t)nap, (long)(1e9 * (nap - (double)(time_t)nap))};
        if (nap >= LONG_NAP_S || now >= listened + LISTEN_EVERY_S) { /* a tenth dearer than to sleep */
            const int spoken = ppoll(&said, 1, &rest, NULL);
            if (spoken < 0 && errno != EINTR) failed = errno;
            if (spoken > 0 || failed) break;
            listened = now;
        } else {
            while (nanosleep(&rest, &rest) < 0 && errno == EINTR) continue;
        }
        now = monotonic();
        if (now >= until) break;
        for (int i = 0; i < n_texts && !ended; i++) {
            failed = sum(&texts[i], &used[n][i]);
            ended = failed || used[n][i] < texts[i].low || used[n][i] > texts[i].high;
        }
        if (!ended) times[n++] = now;
    }
    Py_END_ALLOW_THREADS

    if (failed) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return listed(times, used, n, n_texts);
}

static PyMethodDef methods[] = {
    {"glances", glances, METH_VARARGS, "As brainenc.guard.glances.in_python."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_glances", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__glances(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "CONTRACT", CONTRACT) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
