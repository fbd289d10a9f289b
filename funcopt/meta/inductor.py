"""How torch's compiler, Inductor, makes kernels of a flat graph."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch._inductor
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

from funcopt.types import Tensor


def kernels(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """The graph compiled, for inputs like these."""
    on_cuda = any(x.is_cuda for x in inputs)
    patched = config.patch(_ON_CUDA if on_cuda else _on_cpu())
    with torch.no_grad(), patched, V.set_choices_handler(_InOrder()):
        run = torch._inductor.standalone_compile(
            graph,
            [x.detach() for x in inputs],
            dynamic_shapes="from_example_inputs",
            **_taken(torch._inductor.standalone_compile, donate_graph_module=True),
        )
    return partial(_replayed, run) if on_cuda else run


def _replayed(run: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> list[Tensor]:
    """Copies of the results of a CUDA graph: its next replay writes over them."""
    torch.compiler.cudagraph_mark_step_begin()
    return [x.clone() for x in run(*inputs)]


def _taken(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of the options that this torch has; 2.11 copies the graph first, always."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


class _InOrder(InductorChoices):
    """Inductor's own choices, but that what reads a buffer waits for who writes into it.

    To fuse nodes of unlike loops on a CPU, torch 2.13 makes the loops of one anew, and
    forgets in that whom it waits for: what a scatter, or the derivative of a max-pooling,
    had yet to sum up was read as zeros (https://github.com/pytorch/pytorch/issues/185509).
    """

    @staticmethod
    def can_fuse(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        nodes = *node1.get_nodes(), *node2.get_nodes()
        waiting = any(node.mutation_renames for node in nodes)
        if waiting and node1.group != node2.group:
            return False
        return InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score)


def _on_cpu() -> dict[str, Any]:
    """One file of C++ for all kernels, and one for what calls them.

    Where each kernel has its own, reading torch's headers takes longer than all else. So
    few files are compiled neither by processes started for them, nor with headers that
    were compiled before, which takes ten seconds and saves two. And where torch itself
    runs by AVX512, Inductor need not build programs to find out that torch and this
    machine can, and could by AVX2 as well.
    """
    options = {
        "cpp_wrapper": True,
        "cpp_wrapper_build_separate": True,
        "cpp_cache_precompile_headers": False,
        "compile_threads": 1,
    }
    checked = config.cpp.vec_isa_ok is not None
    if not checked and torch.backends.cpu.get_cpu_capability() == "AVX512":
        options["cpp.vec_isa_ok"] = True
    return options


_ON_CUDA = {"triton.cudagraphs": True}  # as mode="reduce-overhead"; not run on a GPU yet
