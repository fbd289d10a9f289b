"""The compiled meta-step: equal to the eager one, traced once for each kind of inputs."""

import re
import time
from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import funcopt as fo
from funcopt import tree
from funcopt.meta import compiled
from funcopt.meta.flat_graph import replay
from funcopt.meta.tasks import _MAKERS

TASKS = 5


def f64(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def theta() -> dict[str, Any]:
    return {
        "init": {"w": f64(3, 2, seed=1), "b": f64(2, seed=2), "gap": None},
        "lr": torch.tensor(0.1, dtype=torch.float64),
    }


def tasks(count: int = TASKS, seed: int = 3) -> dict[str, Tensor]:
    return {"x": f64(count, 4, 3, seed=seed), "y": f64(count, 4, 2, seed=seed + 1)}


def loss(p: Any, batch: Any) -> Tensor:
    return (torch.tanh(batch["x"] @ p["w"] + p["b"]) - batch["y"]).square().mean()


def adapted(opt: fo.Optimizer) -> Callable[..., Any]:
    """A task loss: two inner steps with a learned rate; aux has a gap, too."""

    def task_loss(theta: Any, task: Any) -> Any:
        hyper = {"lr": theta["lr"]}
        end = fo.unroll(opt, loss, theta["init"], task, steps=2, hyper=hyper)
        return loss(end.params, task), {"losses": end.losses, "gap": None}

    return task_loss


OPTIMIZERS = {
    "sgd, momentum": fo.sgd(momentum=0.9),
    "adam": fo.adam(),
    "lamb": fo.lamb(),
    "chain": fo.chain(fo.clip_by_global_norm(0.1), fo.adamw()),
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The flat graphs that ``compile="trace"`` runs."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return replay(graph, inputs)

    monkeypatch.setitem(_MAKERS, "trace", keep)
    return graphs


QUICK = {("vmap", None): "adam", ("vmap", 2): "sgd, momentum", ("loop", None): "adam"}
CASES = [
    pytest.param(*way, name, marks=() if name == QUICK[way] else pytest.mark.slow)
    for name in OPTIMIZERS
    for way in QUICK
]


@pytest.mark.parametrize("path, chunk, name", CASES)
def test_the_graph_is_the_eager_meta_step(
    traced: Any, path: Any, chunk: int | None, name: str
):
    settings: Any = {"tasks": path, "chunk_size": chunk, "has_aux": True}
    task_loss = adapted(OPTIMIZERS[name])
    eager = fo.meta.value_and_grad(task_loss, **settings)
    compiled = fo.meta.value_and_grad(task_loss, **settings, compile="trace")
    for seed in (3, 30):  # the second time without a trace
        expected = eager(theta(), tasks(seed=seed))
        assert expected[1]["lr"].abs() > 1e-4 and expected[1]["init"]["gap"] is None
        assert_close(
            compiled(theta(), tasks(seed=seed)), expected, rtol=1e-12, atol=1e-12
        )
    assert len(traced) == (2 if chunk else 1)  # of chunks the last is smaller


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("path, name", [("vmap", "sgd, momentum"), ("loop", "adam")])
def test_kernels_give_the_same_numbers_and_are_made_once(path: Any, name: str):
    task_loss = adapted(OPTIMIZERS[name])
    eager = fo.meta.value_and_grad(task_loss, has_aux=True, tasks=path)
    compiled = fo.meta.value_and_grad(task_loss, has_aux=True, tasks=path, compile=True)
    compiled(theta(), tasks())
    with torch.compiler.set_stance("fail_on_recompile"):
        found = compiled(theta(), tasks(seed=30))
    assert_close(found, eager(theta(), tasks(seed=30)), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("path", ["vmap", "loop"])
def test_a_cuda_graph_gives_the_same_numbers_at_each_replay(path: Any):
    scale = torch.tensor(0.5, dtype=torch.float64, device="cuda")  # is closed over
    plain = adapted(fo.adam())

    def task_loss(theta: Any, task: Any) -> Any:
        value, aux = plain(theta, task)
        return scale * value, aux

    eager, compiled = (
        fo.meta.value_and_grad(task_loss, has_aux=True, tasks=path, compile=compile)
        for compile in (False, True)
    )
    given = tree.map(lambda x: x.cuda(), theta())
    found, expected = [], []
    for seed in range(3, 9):  # warm up, record, replay
        scale.fill_(seed)
        batch = {name: x.cuda() for name, x in tasks(seed=seed).items()}
        found.append(compiled(given, batch))
        expected.append(eager(given, batch))
    # A replay writes over the memory of the last: what was given stays as it was.
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_graph_for_each_kind_of_inputs(traced: Any):
    calls = []

    def task_loss(theta: Tensor, task: Tensor) -> Tensor:
        calls.append(task.shape)
        return (theta * task).square().sum()

    meta = fo.meta.value_and_grad(task_loss, tasks="vmap", compile="trace")
    kinds = [
        f64(3, 2, seed=1),
        f64(4, 2, seed=1),
        f64(2, 4, seed=1).mT,
        f64(4, 2, seed=2),
    ]
    for kind in [*kinds, *kinds, kinds[0].float()]:
        value, grad = meta(torch.ones(2, dtype=kind.dtype), kind)
        assert_close(value, kind.square().sum(1).mean(), rtol=1e-6, atol=0)
        assert grad.dtype == kind.dtype
    assert len(calls) == len(traced) == 4


def test_one_graph_for_each_structure_device_and_default_dtype(traced: Any):
    def task_loss(theta: Any, task: Tensor) -> Tensor:
        (only,) = theta.values()
        return (only * task * torch.ones(2)).sum()

    meta = fo.meta.value_and_grad(task_loss, tasks="vmap", compile="trace")
    for _ in range(2):
        for name in ("a", "b"):
            assert meta({name: ONE}, TABLE)[1] == {name: 2.0}
    assert compiled._kind(TABLE) != compiled._kind(TABLE.to("meta"))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        meta({"a": ONE}, TABLE)
    finally:
        torch.set_default_dtype(default)
    assert len(traced) == 3


def test_threads_compile_one_after_another(traced: Any):
    """What traces, and the compiler, change what is the process's; each shape once."""
    inside, most, found = [], [], {}

    def slow(theta: Any, batch: Any) -> Tensor:
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.1)
        inside.pop()
        return adapted(fo.sgd())(theta, batch)[0]

    meta_loss = fo.meta.value_and_grad(slow, tasks="vmap", compile="trace")

    def call(count: int) -> None:
        found[count] = meta_loss(theta(), tasks(count))

    threads = [Thread(target=call, args=(count,)) for count in (3, 4, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(traced) == 2
    plain = fo.meta.value_and_grad(slow, tasks="vmap")
    for count in (3, 4):
        assert_close(found[count], plain(theta(), tasks(count)), rtol=1e-10, atol=1e-12)


def test_the_oldest_graph_makes_room(traced: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "_MOST_GRAPHS", 2)
    meta = fo.meta.value_and_grad(
        lambda t, x: (t * x).sum(), tasks="vmap", compile="trace"
    )
    for count in (3, 4, 3, 5, 3, 4):  # of the last two used, one is 3
        meta(torch.ones(()), torch.ones(count))
    assert len(traced) == 4


def test_closed_over_tensors_are_read_at_each_call(traced: Any):
    scale = torch.tensor(2.0)  # a number: as a constant it would be frozen
    meta = fo.meta.value_and_grad(
        lambda t, x: (t * x * scale * torch.tensor(1.0)).sum(),
        tasks="vmap",
        compile="trace",
    )
    for value in (2.0, 3.0):
        scale.fill_(value)
        assert meta(torch.ones(()), torch.ones(4))[1].item() == value
    assert len(traced) == 1


def test_closed_over_numbers_are_written_as_often_as_without_a_trace(traced: Any):
    count = torch.tensor(0.0)

    def task_loss(t: Tensor, x: Tensor) -> Tensor:
        count.add_(1)
        return (t * x).sum() * count

    meta = fo.meta.value_and_grad(task_loss, tasks="loop", compile="trace")
    assert meta(torch.ones(()), torch.ones(4))[0] == 2.5 and count == 4


def test_closed_over_tensors_that_are_cast_are_compiled_for_anew(traced: Any):
    module = torch.nn.Linear(2, 1, bias=False).requires_grad_(False)
    eager, meta = (
        fo.meta.value_and_grad(
            lambda t, x: (t * x * module.weight).sum(), tasks="vmap", compile=compile
        )
        for compile in (False, "trace")
    )
    given = torch.ones(2), f64(3, 2, seed=1)
    for _ in range(2):  # single, then double
        for _ in range(2):
            assert_close(meta(*given), eager(*given), rtol=0, atol=0)
        module.double()
    assert len(traced) == 2


def test_autocast_is_part_of_what_is_compiled(traced: Any):
    def task_loss(t: Tensor, x: Tensor) -> Tensor:
        return (x @ t).square().sum()

    eager, meta = (
        fo.meta.value_and_grad(task_loss, tasks="vmap", compile=compile)
        for compile in (False, "trace")
    )
    given = f64(2, 2, seed=1).float(), f64(3, 4, 2, seed=2).float()
    for dtype in (None, torch.bfloat16, None):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found, expected = meta(*given), eager(*given)
        assert found[0].dtype == expected[0].dtype == (dtype or torch.float32)
        assert_close(found, expected, rtol=0, atol=0)
    assert len(traced) == 2


def test_what_autocast_is_off_for_stays_so_in_a_graph(traced: Any):
    """The products of a step, which is made in its leaves' own dtype."""
    opt = fo.soap(lr=0.1, eps=0.1)

    def task_loss(t: Tensor, x: Tensor) -> Tensor:
        return fo.unroll(
            opt, lambda p, _: (p - x).square().sum(), t, steps=2
        ).params.sum()

    eager, meta = (
        fo.meta.value_and_grad(task_loss, tasks="vmap", compile=compile)
        for compile in (False, "trace")
    )
    given = f64(3, 2, seed=1).float(), f64(2, 3, 2, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(meta(*given), eager(*given), rtol=1e-5, atol=0)


def test_kernels_are_given_numbers_as_they_are_in_memory(
    monkeypatch: pytest.MonkeyPatch,
):
    """A kernel knows nothing of the bits of a lazy minus or conjugate."""

    def plain(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*given: Tensor) -> Any:
            assert not any(x.is_neg() or x.is_conj() for x in given)
            return graph(*given)

        return run

    monkeypatch.setitem(_MAKERS, True, plain)
    z = torch.complex(f64(4, 3, seed=1), f64(4, 3, seed=2))
    held = z[0].conj().imag
    meta = fo.meta.value_and_grad(
        lambda t, x: (t * x.imag * held).sum(), tasks="vmap", compile=True
    )
    assert held.is_neg()
    for sign, tasks in ((-1, z), (1, z.conj())):
        _, grad = meta(torch.ones(3, dtype=torch.float64), tasks)
        assert_close(grad, sign * (z.imag * z[0].imag).mean(0))


def sums_of_groups(theta: Tensor, task: Tensor) -> Tensor:
    groups = torch.tensor([0, 2, 2])
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, groups, theta * task)
    return sums.square().sum()


def test_what_writes_into_a_copy_is_given_one_of_each_task(traced: Any):
    """Not what all share, expanded: kernels would write in one place for all of them."""
    meta = fo.meta.value_and_grad(sums_of_groups, tasks="vmap", compile="trace")
    meta(f64(3, seed=1), f64(5, 3, seed=2))
    (graph,) = traced
    (node,) = (
        n for n in graph.graph.nodes if n.target is torch.ops.aten.index_add.default
    )
    written = node.args[0].meta["val"]
    assert written.shape == (5, 4) and 0 not in written.stride()


def many_ways(p: Any, batch: Any) -> Tensor:
    """A loss of operations that gather, scatter and normalize the same numbers."""
    h = torch.tanh(batch["x"] @ p["body"]["w"] + p["body"]["b"] + p["context"])
    i, zeros = batch["i"], torch.zeros(4, 2, dtype=h.dtype)
    terms = [
        (h @ p["head"]["w"] + p["head"]["b"] - batch["y"]).square().mean(),
        F.cross_entropy(h, i),
        F.embedding(i, p["body"]["w"].mT).square().mean(),
        h.gather(1, i[:, None]).square().sum(),
        zeros[:, 0].index_add(0, i, h.sum(1)).square().sum(),
        zeros.scatter_reduce(0, i[:, None].expand(-1, 2), h[:, :2], "sum").cos().sum(),
        p["head"]["w"][i].square().sum() + h[:, i].sin().mean(),
        F.layer_norm(h, (4,), p["body"]["b"], p["context"]).square().mean(),
    ]
    return torch.stack(terms).sum()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_kernels_of_many_operations_on_the_same_numbers():
    """What reads sums at places is not fused to run before they are made."""
    body = {"w": f64(3, 4, seed=1), "b": f64(4, seed=2)}
    head = {"w": f64(4, 2, seed=4), "b": f64(2, seed=5)}
    start = {"body": body, "context": 0.1 * f64(4, seed=3), "head": head}
    numbers = torch.Generator().manual_seed(10)
    support, query = (
        {
            "x": f64(5, 3, 3, seed=seed),
            "y": f64(5, 3, 2, seed=seed + 1),
            "i": torch.randint(0, 4, (5, 3), generator=numbers),
        }
        for seed in (10, 12)
    )
    task_loss = fo.meta.maml(many_ways, fo.sgd(lr=0.05), steps=1).task_loss
    wanted = fo.meta.value_and_grad(task_loss)(start, (support, query))
    found = fo.meta.value_and_grad(task_loss, compile=True)(start, (support, query))
    assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_kernels_write_into_a_copy_of_each_task():
    given = f64(3, seed=1), f64(5, 3, seed=2)
    found, expected = (
        fo.meta.value_and_grad(sums_of_groups, tasks="vmap", compile=compile)(*given)
        for compile in (True, False)
    )
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


AT = torch.tensor([2, 0, 2, 1])

# What the numbers of a task are written into, at places.
WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "index_add": lambda x: torch.zeros_like(x).index_add(0, AT, x),
    "scatter": lambda x: torch.zeros_like(x).scatter(0, AT[None], x),
    "index_put": lambda x: torch.zeros_like(x).index_put((AT,), x, accumulate=True),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", WRITTEN)
def test_kernels_wait_for_what_is_written_at_places(name: str):
    """The sum has one loop, the product in it two: Inductor fuses them, too early."""

    def task_loss(theta: Tensor, task: Tensor) -> Tensor:
        product = theta[:, None] * theta
        return ((product + WRITTEN[name](task)) @ product).sum()

    given = f64(4, seed=1), f64(TASKS, 4, 4, seed=2)
    found, expected = (
        fo.meta.value_and_grad(task_loss, tasks="loop", compile=compile)(*given)
        for compile in (True, False)
    )
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["vmap", "loop"])
def test_the_second_derivative_of_a_distance(traced: Any, path: Any):
    """Zeros without memory to torch: a kernel that read them ended the process."""

    def distances(p: Any, batch: Any) -> Tensor:
        apart = batch["x"] @ p["w"] + p["b"] - batch["y"]
        return apart.abs().mean() + apart.mean().abs()

    def task_loss(theta: Any, task: Any) -> Tensor:
        end = fo.unroll(fo.adam(), distances, theta["init"], task, steps=2)
        return distances(end.params, task)

    found, expected = (
        fo.meta.value_and_grad(task_loss, tasks=path, compile=compile)(theta(), tasks())
        for compile in ("trace", False)
    )
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (graph,) = traced
    zeros = torch.ops.aten._efficientzerotensor.default
    assert zeros not in {node.target for node in graph.graph.nodes}


def test_numbers_drawn_anew_at_each_call(traced: Any):
    def task_loss(theta: Tensor, task: Tensor) -> Tensor:
        return (theta * task * torch.rand(3)).sum()

    meta = fo.meta.value_and_grad(
        task_loss, tasks="vmap", randomness="different", compile="trace"
    )
    first, second = (meta(torch.ones(3), torch.ones(4, 3))[1] for _ in range(2))
    assert (first != second).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
def test_torch_cond(traced: Any):
    def wave(p: Tensor, target: Tensor) -> Tensor:
        made = torch.cond(p.sum() > 0, torch.sin, torch.cos, (p,))
        return (made - target).square().sum()

    def task_loss(theta: Tensor, task: Tensor) -> Tensor:
        return wave(fo.unroll(fo.adam(lr=0.5), wave, theta, task, steps=2).params, task)

    eager, meta = (
        fo.meta.value_and_grad(task_loss, tasks="loop", compile=c)
        for c in (False, "trace")
    )
    for start in (1.0, -1.0):
        given = torch.full((3,), start, dtype=torch.float64), f64(TASKS, 3, seed=9)
        assert_close(meta(*given), eager(*given))
    assert len(traced) == 1  # of both branches


# What cannot be compiled ---------------------------------------------------------------


def asks_for_a_value(t: Tensor, x: Tensor) -> Tensor:
    return (t * x).sum() * t.detach().item()


def branches(t: Tensor, x: Tensor) -> Tensor:
    return (t * x).sum() if t.detach() > 0 else t.sum()


def chooses(t: Tensor, x: Tensor) -> Tensor:
    return torch.cond(t.sum() > 0, torch.sin, torch.cos, (t * x,)).sum()


def broken(t: Tensor, x: Tensor) -> Tensor:
    raise KeyError("of the user's own")


def times(t: Tensor, x: Tensor) -> Tensor:
    return (t * x).sum()


class Odd(torch.Tensor):
    """A subclass."""


CLOSED = torch.ones((), requires_grad=True)


def with_loop(task_loss: Callable[..., Any]) -> Callable[..., Any]:
    return fo.meta.value_and_grad(task_loss, tasks="loop", compile="trace")


ONE, TWO, TABLE = torch.tensor(1.0), torch.ones(2), torch.ones(3, 2)
SCALE = torch.tensor(3.0)

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a value": (
        lambda: with_loop(asks_for_a_value)(ONE, TWO),
        fo.CompileError,
        r"meta-step cannot be compiled: .*, at .*test_compiled_meta.py:\d+ \(return "
        r"\(t \* x\)\.sum\(\) \* t\.detach\(\)\.item\(\)\).*torch\.where.*leave out comp",
    ),
    "a branch": (
        lambda: with_loop(branches)(ONE, TWO),
        fo.CompileError,
        r"cannot be compiled: .*if t\.detach\(\) > 0",
    ),
    "a value that is closed over": (
        lambda: with_loop(lambda t, x: times(t, x) * TWO[0].item())(ONE, TWO),
        fo.CompileError,
        r"cannot be compiled: .*TWO\[0\]\.item\(\)",
    ),
    "the value of a number that is closed over": (
        lambda: with_loop(lambda t, x: times(t, x) * SCALE.item())(ONE, TWO),
        fo.CompileError,
        r"cannot be compiled: .*SCALE\.item\(\)",
    ),
    "a value that torch asks for": (
        lambda: with_loop(partial(F.gaussian_nll_loss, var=TWO))(TWO, TABLE),
        fo.CompileError,
        r"cannot be compiled: [^,]*\. A compiled function sees no values",
    ),
    "an error of one's own": (
        lambda: with_loop(broken)(ONE, TWO),
        KeyError,
        "of the user's own",
    ),
    "a choice for a batch of tasks": (
        lambda: fo.meta.value_and_grad(chooses, tasks="vmap", compile="trace")(
            TWO, TABLE
        ),
        fo.ExecutionError,
        r"cannot differentiate torch\.cond.*torch\.where, or give tasks='loop'",
    ),
    "a graph of theta": (
        lambda: with_loop(times)(torch.ones((), requires_grad=True), TWO),
        fo.GradientLostError,
        r"without a graph, but an input requires grad.*no_grad",
    ),
    "a graph of a closed-over tensor": (
        lambda: with_loop(lambda t, x: times(t, x) * CLOSED)(ONE, TWO),
        fo.GradientLostError,
        r"but a tensor that it closes over requires grad",
    ),
    "a graph of theta, whose value is asked for": (
        lambda: with_loop(asks_for_a_value)(CLOSED, TWO),
        fo.GradientLostError,
        "an input requires grad",
    ),
    "a transform": (
        lambda: torch.func.grad(lambda t: with_loop(times)(t, TWO)[0])(ONE),
        fo.GradientLostError,
        r"a transform of torch\.func or a forward-mode level is open",
    ),
    "a subclass": (
        lambda: with_loop(times)(ONE.as_subclass(Odd), TWO),
        fo.LeafError,
        r"plain tensors, but was given a Odd",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, traced: Any):
    call, kind, words = REFUSED[name]
    with pytest.raises(kind) as caught:
        call()
    assert re.search(words, str(caught.value)), str(caught.value)


def test_what_is_refused_is_so_after_a_graph_was_made(traced: Any):
    held = torch.ones(())
    meta = fo.meta.value_and_grad(
        lambda t, x: held * times(t, x), tasks="vmap", compile="trace"
    )
    meta(ONE, TWO)
    for theta, kind in ((ONE.as_subclass(Odd), fo.LeafError), (1.0, fo.LeafError)):
        with pytest.raises(kind):
            meta(theta, TWO)
    for given in ((ONE.clone().requires_grad_(), TWO), (ONE, TWO * CLOSED)):
        with pytest.raises(fo.GradientLostError, match="an input requires grad"):
            meta(*given)
    held.requires_grad_()
    with pytest.raises(fo.GradientLostError, match="a tensor that it closes over"):
        meta(ONE, TWO)
    held.requires_grad_(False)
    with pytest.raises(fo.GradientLostError, match="a transform"):
        torch.func.grad(lambda t: meta(t, TWO)[0])(ONE)
    assert meta(ONE, TWO) == (1.0, 1.0) and len(traced) == 1


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> None:
        raise RuntimeError("\n  no g++\n a long trace")

    words = "failed on the graph of meta-step: RuntimeError: no g.*compile='trace'"
    for kernels in (fails, lambda *_: fails):  # at once, or when they are run
        monkeypatch.setitem(_MAKERS, "trace", kernels)
        with pytest.raises(fo.CompileError, match=words):
            with_loop(times)(ONE, TWO)
        with torch.no_grad(), pytest.raises(fo.CompileError):
            with_loop(lambda t, x: times(t, x) * CLOSED)(ONE, TWO)
        with pytest.raises(fo.GradientLostError):  # before anything is compiled
            with_loop(lambda t, x: times(t, x) * CLOSED)(ONE, TWO)


def test_detached_by_no_grad(traced: Any):
    """Parameters of a module are used as they are."""
    with torch.no_grad():
        value, grad = with_loop(times)(torch.ones((), requires_grad=True), TWO)
    assert (value, grad) == (1.0, 1.0) and not grad.requires_grad
