"""One batch of tasks split over the processes of a group, which fail together."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from funcopt import tree
from funcopt.errors import HyperparameterTypeError, RemoteTaskError, StructureError
from funcopt.execution.outside import outside
from funcopt.types import Tree

#: the sums over this rank's tasks, the dtypes of what was summed, how many tasks there
#: are, and their aux, which stays here
Part = tuple[Tree, Tree, int, Tree]


def over_ranks(part: Callable[[], Part], group: Any) -> Part:
    """The sums over the tasks of all ranks, and so on, with this rank's own aux.

    The ranks first tell each other in a few numbers how it went, so that no rank waits
    for sums that another will never send; then one buffer of each dtype goes round.

    Raises:
        HyperparameterTypeError: ``group`` is none, or this process is not in it.
        RemoteTaskError: another rank has failed; or did not answer within the timeout
            that the group was made with.
        StructureError: the ranks sum what differs in structure, shape or dtype.
        Whatever ``part`` raises here: it is raised after the others have been told.
    """
    ranks = _ranks(group)
    failure: Exception | None = None
    sums, dtypes, count, aux = None, None, 0, None
    try:
        sums, dtypes, count, aux = part()
    except Exception as error:
        failure = error
    form = _form(sums, dtypes)
    said = f"{type(failure).__name__}: {failure}" if failure else None
    words: list[str | None] = []
    with _answered(), outside():  # what is told is of no transform that failed here
        told = _gathered([failure is None, count, _digest(form)], group)
        failed = not all(fine for fine, *_ in told)
        differ = len({digest for *_, digest in told}) > 1
        if failed or differ:
            words = _all_words(said if failed else "\n".join(form), group)
        else:
            sums = _all_sums(sums, group)
    if failure is not None:
        raise failure
    if failed:
        raise RemoteTaskError(
            "; ".join(f"rank {rank} failed: {w}" for rank, w in zip(ranks, words) if w)
        )
    if differ:
        raise StructureError(_differences(words, ranks))
    return sums, dtypes, sum(n for _, n, _ in told), aux


def _ranks(group: Any) -> list[int]:
    """The ranks that the group's processes have in the whole job, as its log has them."""
    import torch.distributed as dist

    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise HyperparameterTypeError(
            "process_group is a group that this process is not in; call the meta-loss on "
            "the group's own ranks"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise HyperparameterTypeError(
            "process_group is a group of torch.distributed, as "
            f"torch.distributed.group.WORLD or new_group(...), not {group!r}"
        )
    return dist.get_process_group_ranks(group)


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RemoteTaskError(
            f"another rank did not answer: {error}. Its process has ended, or is slower "
            "than the group's timeout allows (init_process_group(timeout=...))"
        ) from error


def _form(sums: Tree, dtypes: Tree) -> list[str]:
    """What must be the same on all ranks."""
    leaves, structure = tree.flatten(sums)
    return [
        f"{path} None" if x is None else f"{path} {dtype} {tuple(x.shape)}"
        for path, x, dtype in zip(tree.paths(structure), leaves, tree.leaves(dtypes))
    ]


def _digest(form: Sequence[str]) -> int:
    """The same in every process, as ``hash`` is not; 63 bits."""
    found = hashlib.sha256("\n".join(form).encode()).digest()
    return int.from_bytes(found[:8], "big") >> 1


def _gathered(numbers: Sequence[int], group: Any) -> list[list[int]]:
    import torch.distributed as dist

    on = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    own = torch.tensor(numbers, dtype=torch.int64, device=on)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return torch.stack(every).tolist()


def _all_words(words: str | None, group: Any) -> list[str | None]:
    import torch.distributed as dist

    every: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, words, group=group)
    return every


def _differences(forms: Sequence[str | None], ranks: Sequence[int]) -> str:
    """The first leaf that a rank has otherwise than the first rank."""
    first = (forms[0] or "").splitlines()
    words = []
    for rank, form in zip(ranks, forms):
        theirs = (form or "").splitlines()
        odd = [(a, b) for a, b in zip(first, theirs) if a != b]
        one, other = odd[0] if odd else (f"{len(first)} leaves", f"{len(theirs)} leaves")
        if theirs != first:
            words.append(f"rank {ranks[0]} has {one}, rank {rank} {other}")
    return (
        "the loss and theta must have the same structure, shapes and dtypes on all "
        f"ranks, but {'; '.join(words)}"
    )


def _all_sums(sums: Tree, group: Any) -> Tree:
    """Each tensor's sum over the ranks: one buffer for each dtype and device."""
    import torch.distributed as dist

    present, rebuild = tree.without_none(sums)
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(present):
        alike.setdefault((x.dtype, x.device), []).append(i)
    for which in alike.values():
        buffer = torch.cat([present[i].reshape(-1) for i in which])
        dist.all_reduce(buffer, group=group)
        pieces = buffer.split([present[i].numel() for i in which])
        for i, piece in zip(which, pieces):
            present[i] = piece.reshape(present[i].shape)
    return rebuild(present)
