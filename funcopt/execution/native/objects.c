// Python's objects read in C: the leaves of trees, the addresses of tensors; a kernel
// called, and what it wrote to marked. In Python each costs more than the arithmetic of a
// small leaf.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>

// torch's functions; and where an object of the class Tensor holds its at::Tensor.
static int32_t (*data_ptr)(void *tensor, void **found);
static int32_t (*get_dtype)(void *tensor, int32_t *found);
static int32_t (*get_device)(void *tensor, int32_t *found);
static int32_t (*get_device_index)(void *tensor, int32_t *found);
static int32_t (*get_dim)(void *tensor, int64_t *found);
static int32_t (*get_sizes)(void *tensor, const int64_t **found);
static int32_t (*get_strides)(void *tensor, const int64_t **found);
static bool (*is_inference)(const void *tensor);
static void (*bump_version)(const void *tensor);
static bool (*requires_grad)(const void *impl);  // what an at::Tensor is a pointer to
static PyTypeObject *class, *parameter;
static Py_ssize_t behind;
// Where in what a tensor is in C++ lie the pointer to its memory, and its dispatch keys.
static Py_ssize_t storage, keys;

static PyObject *bind(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    void **functions[] = {
        (void **)&data_ptr, (void **)&get_dtype, (void **)&get_device,
        (void **)&get_device_index, (void **)&get_dim, (void **)&get_sizes,
        (void **)&get_strides, (void **)&is_inference, (void **)&bump_version,
        (void **)&requires_grad,
    };
    class = (PyTypeObject *)Py_NewRef(args[0]);
    parameter = (PyTypeObject *)Py_NewRef(args[1]);
    behind = PyLong_AsSsize_t(args[2]);
    storage = PyLong_AsSsize_t(args[3]);
    keys = PyLong_AsSsize_t(args[4]);
    for (int i = 0; i < 10; i++) *functions[i] = PyLong_AsVoidPtr(args[5 + i]);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static int address(PyObject *x, void **found) {
    if (!PyObject_TypeCheck(x, class))
        PyErr_Format(PyExc_TypeError, "a %s has no address", Py_TYPE(x)->tp_name);
    else if (data_ptr((char *)x + behind, found))
        PyErr_SetString(PyExc_RuntimeError, "a tensor without memory has no address");
    return !PyErr_Occurred();
}

// Appends the leaves of `tree` to `found`: 1; 0 if it is not of this form; -1: an error.
static int gather(PyObject *form, PyObject *tree, PyObject *found) {
    if (form == Py_Ellipsis) return tree == Py_None;
    if (form == Py_None)
        return !PyObject_TypeCheck(tree, class) ? 0 : PyList_Append(found, tree) ? -1 : 1;
    if (PyCallable_Check(form)) {  // a container that optree takes apart
        PyObject *parts = PyObject_CallOneArg(form, tree);
        int failed = !parts || PyList_SetSlice(found, PY_SSIZE_T_MAX, PY_SSIZE_T_MAX, parts);
        Py_XDECREF(parts);
        if (!failed) return 1;
        if (!PyErr_ExceptionMatches(PyExc_ValueError)) return -1;
        PyErr_Clear();
        return 0;
    }
    if (Py_TYPE(form) != Py_TYPE(tree)) return 0;
    int alike = 1;
    if (PyDict_CheckExact(form)) {
        if (PyDict_GET_SIZE(form) != PyDict_GET_SIZE(tree)) return 0;
        PyObject *key, *part;
        for (Py_ssize_t at = 0; alike == 1 && PyDict_Next(form, &at, &key, &part);) {
            PyObject *child = PyDict_GetItemWithError(tree, key);
            if (!child) return PyErr_Occurred() ? -1 : 0;
            Py_INCREF(child);  // a key's own __eq__ may run, and change the tree
            alike = gather(part, child, found);
            Py_DECREF(child);
        }
        return alike;
    }
    Py_ssize_t size = Py_SIZE(form);  // a list, or a tuple
    if (size != Py_SIZE(tree)) return 0;
    for (Py_ssize_t i = 0; alike == 1 && i < size; i++) {
        if (i >= Py_SIZE(tree)) return 0;
        PyObject *child = PySequence_Fast_GET_ITEM(tree, i);
        Py_INCREF(child);
        alike = gather(PySequence_Fast_GET_ITEM(form, i), child, found);
        Py_DECREF(child);
    }
    return alike;
}

static PyObject *leaves(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    PyObject *found = PyList_New(0);
    int alike = found ? gather(args[0], args[1], found) : -1;
    if (alike == 1) return found;
    Py_XDECREF(found);
    if (alike < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *addresses(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t total = 0;
    for (Py_ssize_t k = 0; k < count; k++) {
        if (!PyList_Check(args[k]) && !PyTuple_Check(args[k]))
            return PyErr_Format(PyExc_TypeError, "addresses takes lists of tensors");
        total += Py_SIZE(args[k]);
    }
    PyObject *made = PyBytes_FromStringAndSize(NULL, total * sizeof(void *));
    void **next = made ? (void **)PyBytes_AS_STRING(made) : NULL;
    for (Py_ssize_t k = 0; made && k < count; k++)
        for (Py_ssize_t i = 0; made && i < Py_SIZE(args[k]); i++)
            if (!address(PySequence_Fast_GET_ITEM(args[k], i), next++)) Py_CLEAR(made);
    return made;
}

typedef struct {
    uint64_t begin, end;
} Span;

static int earlier(const void *a, const void *b) {
    uint64_t x = ((const Span *)a)->begin, y = ((const Span *)b)->begin;
    return (x > y) - (x < y);
}

// apart(addresses, extents): whether no two of the spans share a byte. There may be more
// addresses than extents; what has no bytes lies nowhere.
static PyObject *apart(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    if (!PyBytes_Check(args[0]) || !PyBytes_Check(args[1]) ||
        PyBytes_GET_SIZE(args[0]) < PyBytes_GET_SIZE(args[1]))
        return PyErr_Format(PyExc_TypeError, "apart takes addresses and extents");
    const uint64_t *addresses = (const uint64_t *)PyBytes_AS_STRING(args[0]);
    const uint64_t *extents = (const uint64_t *)PyBytes_AS_STRING(args[1]);
    Py_ssize_t size = PyBytes_GET_SIZE(args[1]) / sizeof *extents, some = 0;
    Span *spans = PyMem_New(Span, size);
    if (!spans) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < size; i++)
        if (extents[i]) spans[some++] = (Span){addresses[i], addresses[i] + extents[i]};
    qsort(spans, some, sizeof *spans, earlier);
    Py_ssize_t i = 1;
    while (i < some && spans[i - 1].end <= spans[i].begin) i++;
    PyMem_Free(spans);
    return PyBool_FromLong(i >= some);
}

// Of what is in some lists: whether there are tensors alone, of no other subclass than
// Parameter; whether these are then of one dtype and device; whether one requires grad.
static PyObject *look(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    bool plain = true, alike = true, asked = false;
    int32_t first[3], found[3], seen = 0;
    for (Py_ssize_t k = 0; k < count; k++) {
        if (!PyList_Check(args[k]) && !PyTuple_Check(args[k]))
            return PyErr_Format(PyExc_TypeError, "look takes lists of tensors");
        for (Py_ssize_t i = 0; i < Py_SIZE(args[k]); i++) {
            PyObject *x = PySequence_Fast_GET_ITEM(args[k], i);
            plain &= Py_TYPE(x) == class || Py_TYPE(x) == parameter;
            if (!PyObject_TypeCheck(x, class)) continue;
            void *tensor = (char *)x + behind;
            asked |= requires_grad(*(void **)tensor);
            if (!plain || !alike) continue;
            int32_t *of = seen++ ? found : first;
            if (get_dtype(tensor, of) || get_device(tensor, of + 1) ||
                get_device_index(tensor, of + 2))
                return PyErr_Format(PyExc_RuntimeError, "a tensor without a device");
            alike = of == first || !memcmp(first, found, sizeof first);
        }
    }
    return Py_BuildValue("NNN", PyBool_FromLong(plain), PyBool_FromLong(plain && alike),
                         PyBool_FromLong(asked));
}

// What tensors are like, and their axes: sizes and strides.
typedef struct {
    uint64_t keys;  // of its dispatch: whether it is lazy, a wrapper, one of inference mode
    int64_t axes;
    int32_t dtype, device, index;
    bool is_parameter, requires_grad;
} Looks;

// Of one of these two classes, strided. 0 if it has no looks.
static int look_at(PyObject *x, Looks *found) {
    if (Py_TYPE(x) != class && Py_TYPE(x) != parameter) return 0;
    void *tensor = (char *)x + behind;
    const char *impl = *(const char **)tensor;
    memset(found, 0, sizeof *found);
    memcpy(&found->keys, impl + keys, sizeof found->keys);
    found->is_parameter = Py_TYPE(x) == parameter;
    found->requires_grad = requires_grad(impl);
    return !get_dtype(tensor, &found->dtype) && !get_device(tensor, &found->device) &&
           !get_device_index(tensor, &found->index) && !get_dim(tensor, &found->axes);
}

// likeness(tensors): what `like` compares strided tensors with; None of what it cannot.
static PyObject *likeness(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t size = PyList_GET_SIZE(args[0]), total = 0;
    Looks of;
    for (Py_ssize_t i = 0; i < size; i++) {
        if (!look_at(PyList_GET_ITEM(args[0], i), &of)) Py_RETURN_NONE;
        total += sizeof of + 2 * of.axes * sizeof(int64_t);
    }
    PyObject *made = PyBytes_FromStringAndSize(NULL, total);
    char *next = made ? PyBytes_AS_STRING(made) : NULL;
    for (Py_ssize_t i = 0; made && i < size; i++) {
        PyObject *x = PyList_GET_ITEM(args[0], i);
        const int64_t *sizes, *strides;
        void *tensor = (char *)x + behind;
        look_at(x, &of);
        if (get_sizes(tensor, &sizes) || get_strides(tensor, &strides)) {
            Py_DECREF(made);
            Py_RETURN_NONE;
        }
        next = (char *)memcpy(next, &of, sizeof of) + sizeof of;
        next = (char *)memcpy(next, sizes, of.axes * sizeof *sizes) + of.axes * 8;
        next = (char *)memcpy(next, strides, of.axes * sizeof *strides) + of.axes * 8;
    }
    return made;
}

// like(tensors, likeness): whether each is like its own of those, as many.
static PyObject *like(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    const char *next = PyBytes_AS_STRING(args[1]), *end = next + PyBytes_GET_SIZE(args[1]);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); i++) {
        PyObject *x = PyList_GET_ITEM(args[0], i);
        Looks of;
        if (next == end || !look_at(x, &of) || memcmp(next, &of, sizeof of)) Py_RETURN_FALSE;
        next += sizeof of;
        void *tensor = (char *)x + behind;
        const int64_t *sizes, *strides, bytes = of.axes * sizeof *sizes;
        if (get_sizes(tensor, &sizes) || memcmp(next, sizes, bytes)) Py_RETURN_FALSE;
        if (get_strides(tensor, &strides) || memcmp(next + bytes, strides, bytes))
            Py_RETURN_FALSE;
        next += 2 * bytes;
    }
    return PyBool_FromLong(next == end);
}

// written(list, begin, end): one more in the version counters of these tensors. One made in
// inference mode has none, and to count there would throw an exception of C++'s.
static PyObject *written(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t i = PyLong_AsSsize_t(args[1]), end = PyLong_AsSsize_t(args[2]);
    if (end > PyList_GET_SIZE(args[0])) end = PyList_GET_SIZE(args[0]);
    for (; i < end; i++) {
        PyObject *x = PyList_GET_ITEM(args[0], i);
        if (!PyObject_TypeCheck(x, class))
            return PyErr_Format(PyExc_TypeError, "a %s has no version", Py_TYPE(x)->tp_name);
        const void *tensor = (char *)x + behind;
        if (!is_inference(tensor)) bump_version(tensor);
    }
    Py_RETURN_NONE;
}

enum { CPU = 0, INT64 = 4, FLOAT32 = 6 };  // as torch numbers devices and dtypes

// counted(steps): with one more in each entry of a vector on the CPU, and in its version.
// Another tensor counts by itself.
static PyObject *counted(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Looks of;
    void *tensor = (char *)args[0] + behind, *numbers;
    const int64_t *size, *stride;
    if (!look_at(args[0], &of) || (of.dtype != INT64 && of.dtype != FLOAT32) ||
        of.device != CPU || of.axes != 1 || get_sizes(tensor, &size) || get_strides(tensor, &stride) ||
        !address(args[0], &numbers))
        return PyErr_Occurred() ? NULL : PyObject_CallMethod(args[0], "add_", "i", 1);
    for (int64_t i = 0; i < *size; i++)
        if (of.dtype == INT64) ((int64_t *)numbers)[i * *stride]++;
        else ((float *)numbers)[i * *stride]++;
    if (!is_inference(tensor)) bump_version(tensor);
    return Py_NewRef(args[0]);
}

// What a tensor is in C++, but for its first pointer: who holds it, its shape, dtype and so
// on, and whether autograd knows it, up to the dispatch keys, which are the last; and of its
// memory who holds it, where and how large it is.
enum { OF_MEMORY = 56 - 8 };
#define OF_BOTH (keys + OF_MEMORY)

static void portray(PyObject *x, char *portrait) {
    const char *tensor = *(const char **)((char *)x + behind);
    memcpy(portrait, tensor + 8, keys);
    memcpy(portrait + keys, *(const char **)(tensor + storage) + 8, OF_MEMORY);
}

// snapshot(tensors): what `unheld` compares with; None of what it cannot tell of.
static PyObject *snapshot(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t size = PyList_GET_SIZE(args[0]);
    for (Py_ssize_t i = 0; i < size; i++)
        if (Py_TYPE(PyList_GET_ITEM(args[0], i)) != class) Py_RETURN_NONE;
    PyObject *made = PyBytes_FromStringAndSize(NULL, size * OF_BOTH);
    for (Py_ssize_t i = 0; made && i < size; i++)
        portray(PyList_GET_ITEM(args[0], i), PyBytes_AS_STRING(made) + i * OF_BOTH);
    return made;
}

// unheld(tensors, snapshot): whether the list alone holds them, and they are as they were.
// Views and NumPy arrays hold the memory, graphs and DLPack capsules the tensor in C++,
// everybody else the object of Python.
static PyObject *unheld(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    const char *before = PyBytes_AS_STRING(args[1]);
    char now[OF_BOTH];
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); i++, before += OF_BOTH) {
        PyObject *x = PyList_GET_ITEM(args[0], i);
        if (Py_REFCNT(x) != 1 || Py_TYPE(x) != class) Py_RETURN_FALSE;
        if (*PyObject_GET_WEAKREFS_LISTPTR(x)) Py_RETURN_FALSE;
        PyObject **marks = _PyObject_GetDictPtr(x);
        if (marks && *marks && PyDict_GET_SIZE(*marks)) Py_RETURN_FALSE;
        portray(x, now);
        if (memcmp(now, before, OF_BOTH)) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

// Whether two lists hold the very same objects.
static PyObject *same(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t size = PyList_GET_SIZE(args[0]), i = 0;
    if (size != PyList_GET_SIZE(args[1])) Py_RETURN_FALSE;
    while (i < size && PyList_GET_ITEM(args[0], i) == PyList_GET_ITEM(args[1], i)) i++;
    return PyBool_FromLong(i == size);
}

// Whether these are the keys of a dict of dicts, each with the values of its dict.
static PyObject *holds(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    PyObject *known = args[1], *key, *entry, *name, *value;
    Py_ssize_t size = PyList_GET_SIZE(known), i = 0;
    if (!PyDict_Check(args[0])) Py_RETURN_FALSE;
    for (Py_ssize_t at = 0; PyDict_Next(args[0], &at, &key, &entry);) {
        if (i == size || PyList_GET_ITEM(known, i++) != key) Py_RETURN_FALSE;
        if (!PyDict_Check(entry)) Py_RETURN_FALSE;
        for (Py_ssize_t to = 0; PyDict_Next(entry, &to, &name, &value);)
            if (i == size || PyList_GET_ITEM(known, i++) != value) Py_RETURN_FALSE;
    }
    return PyBool_FromLong(i == size);
}

typedef int (*Kernel)(int64_t, int64_t, const int64_t *, const int64_t *, const double *,
                      char *const *, double *, int, int, int64_t);

// run(kernel, leaves, tasks, sizes, rows, scalars, pointers, sums, streaming, threads,
//     spread)
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    Py_buffer parts[5];
    int taken = 0, failed = 0;
    for (; taken < 5; taken++)
        if (PyObject_GetBuffer(args[3 + taken], parts + taken,
                               taken < 4 ? PyBUF_SIMPLE : PyBUF_WRITABLE))
            break;
    if (taken == 5) {
        Kernel kernel = (Kernel)PyLong_AsVoidPtr(args[0]);
        int64_t number = PyLong_AsLongLong(args[1]), tasks = PyLong_AsLongLong(args[2]);
        int streaming = PyObject_IsTrue(args[8]), threads = PyLong_AsLong(args[9]);
        int64_t spread = PyLong_AsLongLong(args[10]);
        if (!PyErr_Occurred()) {
            Py_BEGIN_ALLOW_THREADS;
            failed = kernel(number, tasks, parts[0].buf, parts[1].buf, parts[2].buf,
                            parts[3].buf, parts[4].buf, streaming, threads, spread);
            Py_END_ALLOW_THREADS;
        }
    }
    while (taken) PyBuffer_Release(parts + --taken);
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromLong(failed);
}

static PyMethodDef methods[] = {
    {"bind", (PyCFunction)(void *)bind, METH_FASTCALL, NULL},
    {"leaves", (PyCFunction)(void *)leaves, METH_FASTCALL, NULL},
    {"addresses", (PyCFunction)(void *)addresses, METH_FASTCALL, NULL},
    {"apart", (PyCFunction)(void *)apart, METH_FASTCALL, NULL},
    {"look", (PyCFunction)(void *)look, METH_FASTCALL, NULL},
    {"likeness", (PyCFunction)(void *)likeness, METH_FASTCALL, NULL},
    {"like", (PyCFunction)(void *)like, METH_FASTCALL, NULL},
    {"written", (PyCFunction)(void *)written, METH_FASTCALL, NULL},
    {"counted", (PyCFunction)(void *)counted, METH_FASTCALL, NULL},
    {"snapshot", (PyCFunction)(void *)snapshot, METH_FASTCALL, NULL},
    {"unheld", (PyCFunction)(void *)unheld, METH_FASTCALL, NULL},
    {"same", (PyCFunction)(void *)same, METH_FASTCALL, NULL},
    {"holds", (PyCFunction)(void *)holds, METH_FASTCALL, NULL},
    {"run", (PyCFunction)(void *)run, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "objects", NULL, -1, methods};

PyObject *make(void) { return PyModule_Create(&definition); }
