"""What is done with Python's objects around a kernel: in C, and the same in Python.

A step of a small network is spent on looking at its tensors, a Python call for each.
"""

import ctypes
import os
import sys
import sysconfig
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import Parameter

from funcopt.execution.executor import BuildError
from funcopt.execution.native.build import library
from funcopt.execution.native.objects_in_python import InPython
from funcopt.execution.outside import undisturbed
from funcopt.types import Tensor, Tree

_pointer = ctypes.c_void_p


#: of torch, as C calls them: its C interface, and of its C++ what takes one tensor
_FUNCTIONS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "_ZN2at6native12is_inferenceERKNS_6TensorE",  # at::native::is_inference
    "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",  # impl::bump_version
    "_ZNK3c1010TensorImpl13requires_gradEv",  # c10::TensorImpl::requires_grad
)


class Objects(Protocol):
    """What there is in C, and in Python where that cannot be built."""

    @property
    def leaves(self) -> Callable[[Any, Tree], list[Any] | None]:
        """The tensors of a tree of this form, in the form's order; None for another's.

        A form is a tree of dicts, lists and tuples, with None for each tensor, and with
        ``...`` for each None. What else stands in it is called with what stands there in
        the tree: it gives a list of leaves, or raises ValueError.
        """
        ...

    @property
    def addresses(self) -> Callable[..., bytes]:
        """Of the tensors in some lists, one after the other, eight bytes each."""
        ...

    @property
    def apart(self) -> Callable[[bytes, bytes], bool]:
        """Whether no two share memory, of tensors at these addresses, of so many bytes.

        Eight bytes for each, too. There may be more addresses; they do not count.
        """
        ...

    @property
    def look(self) -> Callable[..., tuple[bool, bool, bool]]:
        """What is in some lists, at a glance.

        Whether they are tensors alone, of no other subclass than Parameter; whether
        these are then of one dtype and device; whether a tensor requires grad.
        """
        ...

    @property
    def likeness(self) -> Callable[[list[Tensor]], bytes | None]:
        """What strided tensors are like; None where that is unknown.

        The class (Tensor or Parameter), shape, strides, dtype, device, requires_grad and
        dispatch keys of each.
        """
        ...

    @property
    def like(self) -> Callable[[list[Any], bytes], bool]:
        """Whether there are as many tensors as in a likeness, each like its own."""
        ...

    @property
    def written(self) -> Callable[[list[Tensor], int, int], None]:
        """Count in the versions of the tensors from one place of a list up to another."""
        ...

    @property
    def counted(self) -> Callable[[Tensor], Tensor]:
        """The same vector, with one more in each entry."""
        ...

    @property
    def snapshot(self) -> Callable[[list[Tensor]], bytes | None]:
        """What tensors that a list alone holds are like; None where that is unknown.

        Of those with memory on the CPU, and with no more than five axes.
        """
        ...

    @property
    def unheld(self) -> Callable[[list[Tensor], bytes], bool]:
        """Whether the list alone holds these again, and nobody left a mark on them."""
        ...

    @property
    def same(self) -> Callable[[list[Any], list[Any]], bool]:
        """Whether two lists hold the very same objects."""
        ...

    @property
    def holds(self) -> Callable[[Any, list[Any]], bool]:
        """Whether these are a dict's keys, each with the values of the dict it is for."""
        ...

    @property
    def run(self) -> Callable[..., int]:
        """A kernel by its address, and what ``run`` of kernel.h takes: buffers."""
        ...


@cache
def load() -> Objects:
    """In C, where there are a compiler, Python's headers and torch as it is known."""
    try:
        with undisturbed():
            return _in_c()
    except (BuildError, OSError, AttributeError, RuntimeError):
        return InPython()


def _in_c() -> Objects:
    if os.environ.get("FUNCOPT_NATIVE") == "0":
        raise BuildError("native kernels are turned off: FUNCOPT_NATIVE=0")
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise BuildError("without a lock lists may change while they are read")
    # Right behind what every object begins with lies the pointer that _cdata tells.
    tensor = torch.ones(3, device="cpu")
    tensors = [tensor, tensor[1:], tensor.new_zeros(0), Parameter(tensor)]
    behind = object.__basicsize__
    for x in tensors:
        if _pointer.from_address(id(x) + behind).value != x._cdata:
            raise BuildError("this torch keeps its tensors elsewhere")
    memory = _offset(tensors, lambda x: x.untyped_storage()._cdata)
    several = [*tensors, tensor.to("meta"), torch.inference_mode()(tensor.clone)()]
    keys = _offset(several, lambda x: torch._C._dispatch_keys(x).raw_repr())
    folder = Path(torch.__file__).parent / "lib"
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    torch_cpu = ctypes.CDLL(str(folder / name))
    functions = [ctypes.cast(torch_cpu[x], _pointer).value for x in _FUNCTIONS]
    source = Path(__file__).with_suffix(".c").read_text()
    built = library(
        f"// {sysconfig.get_config_var('SOABI')}\n{source}",
        [f"-I{sysconfig.get_path('include')}"]
        + ["-undefined", "dynamic_lookup"] * (sys.platform == "darwin"),
    )
    try:
        make = ctypes.PyDLL("", handle=built.loaded._handle).make
        make.restype = ctypes.py_object
        objects: Any = make()
        objects.bind(Tensor, Parameter, behind, memory, keys, *functions)
        if objects.addresses(tensors) != InPython().addresses(tensors):
            raise BuildError("C finds tensors elsewhere than torch")
        for some in ([tensor, tensor[1:]], tensors, [tensor, tensor.double()]):
            if objects.look(some) != InPython().look(some):
                raise BuildError("C sees tensors otherwise than torch")
        objects.written(tensors, 2, 3)
        if [x._version for x in tensors] != [0, 0, 1, 0]:
            raise BuildError("C counts versions elsewhere than torch")
        if not _sees_holders(objects):
            raise BuildError("C does not see who holds a tensor")
        if not _sees_likeness(objects):
            raise BuildError("C does not see what a tensor is like")
        built.keep()
    finally:
        built.discard()
    return objects


def _offset(tensors: Sequence[Tensor], of: Callable[[Tensor], int]) -> int:
    """Where in what a tensor is in C++ lies this number of it."""
    for at in range(8, 192, 8):
        found = [ctypes.c_uint64.from_address(x._cdata + at).value for x in tensors]
        if found == [*map(of, tensors)]:
            return at
    raise BuildError("this torch keeps elsewhere what its tensors are")


def _sees_holders(objects: Objects) -> bool:
    """Whether `unheld` says so of a new tensor alone, of none that has a holder."""

    def seen(change: Callable[[Tensor], Any]) -> bool:
        tensors = [torch.empty(2, 3, device="cpu")]
        snapshot = objects.snapshot(tensors)
        held = change(tensors[0])
        unheld = snapshot is not None and objects.unheld(tensors, snapshot)
        return unheld is (held is None)

    return all(map(seen, (lambda x: None, *_HOLDERS)))


#: who holds a tensor, or what tells that it is no more as it was
_HOLDERS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x,
    lambda x: x[0],
    Tensor.__dlpack__,
    lambda x: x * torch.ones(3, device="cpu", requires_grad=True),
    weakref.ref,
    lambda x: setattr(x, "mark", 1) or 1,
    lambda x: x.requires_grad_() is x,
    lambda x: x.t_() is x,
    lambda x: x.untyped_storage().resize_(0).nbytes() + 1,
)


def _sees_likeness(objects: Objects) -> bool:
    """Whether `like` says so of another new tensor, and of none that is unlike it."""
    one, other = (torch.ones(2, 3, device="cpu") for _ in range(2))
    likeness = objects.likeness([one])
    others = [other, *(change(other) for change in _CHANGES)]
    return likeness is not None and all(
        objects.like([x], likeness) is (x is other) for x in others
    )


#: after which a tensor is no more like it was
_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x[:1],
    lambda x: x.t(),
    lambda x: x[None],
    lambda x: x.view(3, 2),
    lambda x: x.double(),
    lambda x: x.to("meta"),
    lambda x: x.detach().requires_grad_(),
    lambda x: Parameter(x, requires_grad=False),
    lambda x: torch.inference_mode()(x.clone)(),
)
