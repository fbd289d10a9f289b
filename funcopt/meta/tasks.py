"""The mean of a task loss over a batch of tasks, and its gradient."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import torch

from funcopt import tree
from funcopt.checks import check_count, check_floats, check_function, check_no_graph
from funcopt.derivatives import widened
from funcopt.errors import ExecutionError, HyperparameterError, StructureError
from funcopt.execution import levels
from funcopt.flat_function import FlatFunction
from funcopt.func.norms import exact_norms
from funcopt.inner.loss import loss_and_aux
from funcopt.list_vmap import Randomness, list_vmap
from funcopt.meta.compiled import Compiled, Maker, kernels
from funcopt.meta.flat_graph import replay
from funcopt.meta.ranks import Part, over_ranks
from funcopt.types import Tensor, Tree

#: ``compile`` → what runs the graph
_MAKERS: dict[Any, Maker] = {True: kernels, "trace": replay}
#: theta and a batch of tasks → the means of losses and gradients, and each task's aux
Ways: TypeAlias = Mapping[str, Callable[[Tree, Tree], tuple[Tensor, Tree, Tree]]]


def value_and_grad(
    task_loss: Callable[[Tree, Tree], Any],
    *,
    tasks: Literal["vmap", "loop", "auto"] = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    randomness: Randomness = "error",
    compile: bool | Literal["trace"] = False,
    process_group: Any = None,
) -> Callable[[Tree, Tree], tuple[Any, Tree]]:
    r"""The meta-loss and the meta-gradient over a batch of tasks.

    .. math::
        V(\theta) = \frac1T \sum_{i=1}^T \text{task\_loss}(\theta, \text{task}_i),
        \qquad \nabla V(\theta) = \frac1T \sum_{i=1}^T
        \nabla_\theta \text{task\_loss}(\theta, \text{task}_i)

    The gradient is taken inside vmap, task by task, and then averaged. The other order,
    ``grad`` of ``vmap``, is silently wrong where an affine batch, layer or instance norm
    follows an adapted layer (pytorch/functorch#534).

    Args:
        task_loss: ``task_loss(theta, task)`` → a 0-d loss, or ``(loss, aux)`` with
            ``has_aux``; a pure function of one task (no task axis).
        tasks: "vmap" runs all tasks as one batch, "loop" one after another; "auto"
            chooses by the rule of `choose`.
        chunk_size: how many tasks to batch at once under vmap; None for all. The sum is
            accumulated, so memory is that of one chunk.
        has_aux: ``task_loss`` returns ``(loss, aux)``.
        randomness: what random operations do across tasks: "different" numbers for each,
            the "same" for all, or an "error" (under vmap), as in ``torch.func.vmap``.
            In a loop and in chunks "same" rewinds the CPU's generator only.
        compile: run the whole of it (inner gradients, updates, meta-gradient) as one
            graph; of "loop", one task's, and of chunks, one chunk's. True has torch's
            compiler make kernels of it: the first call with a structure, shapes, strides
            and dtypes takes up to a minute. "trace" leaves out the compiler, and runs
            the graph by torch's own operations: without Python, autograd and vmap around
            them, after a second or two. The guide says when it pays.
            ``task_loss`` may then ask for no value (``.item()``, ``if`` on a tensor);
            Python numbers that it closes over are frozen, tensors are read at each
            call; the results have no graph, so call it under ``torch.no_grad()`` where
            an input requires grad. Random numbers are other ones than without.
        process_group: a group of ``torch.distributed`` (such as
            ``torch.distributed.group.WORLD``, once initialized): ``tasks`` are those of
            this rank, as many as it likes but one at least, and ``loss`` and ``grads``
            are the means over the tasks of all ranks, the same on each. ``aux`` stays
            that of this rank's tasks, random numbers are each rank's own. All ranks call
            ``f`` equally often; where one fails, all raise. Under ``torch.no_grad()``,
            where theta requires grad.

    Returns:
        ``f(theta, tasks) -> (loss, grads)``, with ``has_aux`` ``((loss, aux), grads)``.
        ``theta``: a tree of floating-point tensors. ``tasks``: a tree of tensors
        [T, ...]. ``loss`` is 0-d, ``grads`` like ``theta``, ``aux`` has a leading [T].

    Raises:
        StructureError: by ``f``, for tasks whose leading axes differ, or are empty; for
            a theta without leaves; for a loss that is not 0-d, or no pair of ``has_aux``.
        LeafError: by ``f``, for a leaf of theta that is no floating-point tensor, or one
            of aux that is no tensor.
        HyperparameterError: an unknown ``tasks`` or ``randomness``, a chunk size below 1.
        CompileError: by ``f``, with ``compile``: ``task_loss`` asks for a value, or the
            compiler fails; the message says where.
        ExecutionError: by ``f``, under vmap, where ``task_loss`` calls ``torch.cond``.
        GradientLostError: by ``f``, with ``compile`` or ``process_group``, where a
            derivative of its result would be asked for.
        HyperparameterTypeError: a ``task_loss`` that is no function; by ``f``, for a
            ``process_group`` that is none, or that this process is not in.
        RemoteTaskError: by ``f``, with ``process_group``: another rank has failed (its
            number and message are told), or has not answered within the group's timeout.

    Source:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning", 2017, algorithm 1.

    Example:
        >>> import torch, funcopt as fo
        >>> def loss(p, target):
        ...     return ((p - target) ** 2).sum()
        >>> def task_loss(theta, target):
        ...     run = fo.unroll(fo.sgd(lr=0.25), loss, theta, target, steps=1)
        ...     return loss(run.params, target)
        >>> targets = torch.tensor([[1.0], [3.0]])
        >>> fo.meta.value_and_grad(task_loss)(torch.zeros(1), targets)
        (tensor(1.2500), tensor([-1.]))
    """
    check_function("task_loss (of a family: family.task_loss)", task_loss)
    if tasks not in ("vmap", "loop", "auto"):
        raise HyperparameterError(f"tasks is 'vmap', 'loop' or 'auto', not {tasks!r}")
    if randomness not in ("error", "different", "same"):
        raise HyperparameterError(
            f"randomness is 'error', 'different' or 'same', not {randomness!r}"
        )
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if compile not in (False, *_MAKERS):
        raise HyperparameterError(f"compile is True, False or 'trace', not {compile!r}")

    mean = _Mean(task_loss, tasks, chunk_size, has_aux, randomness, process_group)
    ways: Ways = {"loop": mean.alone, "vmap": mean.together}
    plain = partial(mean, ways)
    if not compile:
        return plain
    compiled_as = partial(Compiled, name="meta-step", make=_MAKERS[compile])
    whole = compiled_as(plain)
    by_parts = partial(mean, {name: compiled_as(way) for name, way in ways.items()})

    def compiled(theta: Tree, batch: Tree) -> tuple[Any, Tree]:
        if process_group is not None:
            return by_parts(theta, batch)
        done = whole.again(theta, batch)
        if done is not None:
            return done
        _, size, count = mean.at_once(theta, batch)
        return (by_parts if size < count else whole)(theta, batch)

    return compiled


@dataclass(frozen=True, eq=False)
class _Mean:
    """The mean loss of a batch of tasks, and its gradient; see `value_and_grad`."""

    task_loss: Callable[[Tree, Tree], Any]
    tasks: Literal["vmap", "loop", "auto"]
    chunk_size: int | None
    has_aux: bool
    randomness: Randomness
    process_group: Any

    def __call__(self, ways: Ways, theta: Tree, batch: Tree) -> tuple[Any, Tree]:
        part, group = partial(self.total, ways, theta, batch), self.process_group
        added, dtypes, count, aux = part() if group is None else over_ranks(part, group)
        found = tree.map(lambda x, dtype: (x / count).to(dtype), added, dtypes)
        loss, grads = found["loss"], found["theta"]
        return ((loss, aux) if self.has_aux else loss), grads

    def total(self, ways: Ways, theta: Tree, batch: Tree) -> Part:
        """The sums over these tasks, their dtypes, the number of tasks, and their aux.

        The sums of half precision are wider: so many numbers would not be there in it.
        """
        path, size, count = self.at_once(theta, batch)
        several = size < count
        seed = torch.get_rng_state() if several and self.randomness == "same" else None
        # A derivative of the meta-gradient is one that torch has wrong of norm layers.
        given = [*tree.leaves(theta), *tree.leaves(batch)]
        exact = exact_norms if levels.derivative_outside(given) else nullcontext
        one, added, auxes = None, None, []
        for start in range(0, count, size):
            if seed is not None:
                torch.set_rng_state(seed)
            some = itemgetter(slice(start, start + size))
            with exact():
                chunk = tree.map(some, batch) if several else batch
                loss, grads, aux = ways[path](theta, chunk)
            one = {"loss": loss, "theta": grads}
            weight = min(size, count - start)
            parts = tree.map(lambda x, n=weight: widened(x) * n, one)
            added = tree.map(torch.add, added, parts) if start else parts
            auxes.append(aux)
        if self.process_group is not None:
            check_no_graph(tree.leaves(added), "a sum over ranks", "theta or a task")
        aux = tree.map(lambda *rows: torch.cat(rows), *auxes) if several else auxes[0]
        return added, tree.map(lambda x: x.dtype, one), count, aux

    def at_once(self, theta: Tree, batch: Tree) -> tuple[str, int, int]:
        """How the tasks are run, how many of them at once, and how many there are."""
        check_floats(theta, "theta")
        count = tree.leading_axis(batch, "tasks")
        if not count:
            raise StructureError(
                "tasks has 0 entries in its leading axis; give one or more"
            )
        path = choose(theta, count) if self.tasks == "auto" else self.tasks
        return path, 1 if path == "loop" else self.chunk_size or count, count

    def alone(self, theta: Tree, batch: Tree) -> tuple[Tensor, Tree, Tree]:
        """Of the one task that the batch holds."""
        flat = FlatFunction(self._one, theta, tree.map(itemgetter(0), batch))
        grads, out = flat.grad(*flat.inputs)
        loss, aux = flat.rebuild(out)
        return loss, flat.like_first(grads), tree.map(lambda x: x.unsqueeze(0), aux)

    def together(self, theta: Tree, batch: Tree) -> tuple[Tensor, Tree, Tree]:
        """Of all the batch's tasks, under vmap."""
        flat = FlatFunction(self._one, theta, batch)
        many = list_vmap(flat.grad, (None, 0), randomness=self.randomness)
        with _explained():
            grads, out = many(*flat.inputs)
        loss, aux = flat.rebuild(out)
        return loss.mean(0), flat.like_first([g.mean(0) for g in grads]), aux

    def _one(self, theta: Tree, task: Tree) -> tuple[Tensor, Tree]:
        return loss_and_aux(self.task_loss(theta, task), self.has_aux, "task_loss")


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to do where the loss calls an operator of functions, as torch.cond."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any("_higher_order_ops" in frame.filename for frame in frames):
            raise
        raise ExecutionError(
            "torch cannot differentiate torch.cond, nor its other operators that take "
            "functions, for a batch of tasks: write the choice with torch.where, or give "
            "tasks='loop'"
        ) from error


def choose(theta: Tree, count: int) -> Literal["vmap", "loop"]:
    """Whether ``count`` tasks run faster batched or one by one, from shapes alone.

    On a CPU one or two tasks are looped, and so is any number where theta holds a
    convolution of 32 x 32 channels or more: batched weights make grouped convolutions,
    which are slow there. Everything else is batched. The table of benchmarks/README.md
    shows where the rule is right; where it is not, say ``tasks=`` yourself.
    """
    leaves = tree.present(theta)
    if any(leaf.device.type != "cpu" for leaf in leaves):
        return "loop" if count == 1 else "vmap"
    wide = any(
        leaf.ndim >= 4 and leaf.shape[0] * leaf.shape[1] >= 32**2 for leaf in leaves
    )
    return "loop" if count <= 2 or wide else "vmap"
