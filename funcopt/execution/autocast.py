"""torch.autocast: what it chooses here, and how to run as it is elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

_accelerator = torch.accelerator.current_accelerator()
_KINDS = ("cpu", *([_accelerator.type] if _accelerator else ()))

#: for each kind of device the dtype of matrix products, None where it is off
Chosen = Mapping[str, torch.dtype | None]

OFF: Chosen = dict.fromkeys(_KINDS)


def is_on() -> bool:
    """Whether it is, for some kind of device."""
    return any(map(torch.is_autocast_enabled, _KINDS))


def chosen() -> Chosen:
    """What is chosen here."""
    if not is_on():
        return OFF
    return {
        kind: torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in _KINDS
    }


def choosing(wanted: Chosen) -> AbstractContextManager[None]:
    """Run as where these were `chosen`."""
    return _other(wanted) if is_on() or wanted is not OFF else nullcontext()


@contextmanager
def _other(wanted: Chosen) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype in chosen().items():
            if dtype is not wanted[kind]:
                on = wanted[kind] is not None
                stack.enter_context(torch.autocast(kind, wanted[kind], enabled=on))
        yield
