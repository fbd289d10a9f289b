"""exact_norms: torch's values, and derivatives right where torch's are not.

What torch has wrong is held to be wrong here, so that the day is noticed when it is not.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from torch.nn import functional as F

import funcopt as fo
from funcopt import func, list_vmap, tree
from funcopt.execution import levels

Params = dict[str, Tensor]
Norm = Callable[[Tensor, Params], Tensor]

# Trees with gaps ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_vmap_of_states_with_gaps(chunk_size: int | None):
    """Steps of a partition, for each of three sets of parameters and rates."""
    opt = fo.partition({"w": fo.muon(), "b": fo.adam()}, {"w": "w", "b": "b"})
    made = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=made).double()  # noqa: E731
    params = {"w": draw(3, 4, 2), "b": draw(3, 2)}
    grads = {"w": draw(4, 2), "b": None}
    rates = torch.tensor([0.1, 0.2, 0.3])

    def step(p: Any, state: Any, g: Any, lr: Tensor) -> Any:
        return opt.update(g, state, p, lr=lr)

    state = func.vmap(opt.init, chunk_size=chunk_size)(params)
    many = func.vmap(step, (0, 0, None, 0), chunk_size=chunk_size)
    whole = many(params, state, grads, rates)
    for i in range(3):
        own = tree.map(lambda p, i=i: p[i], params)
        alone = step(own, opt.init(own), grads, rates[i])
        torch.testing.assert_close(
            tree.leaves(tree.map(lambda x, i=i: x[i], whole)), tree.leaves(alone)
        )
    assert whole[1]["b"]["exp_avg"]["w"] is None


@pytest.mark.parametrize(
    "axes",
    [{"w": 1, "b": None, "gap": 0}, fo.by_name({"w": 1}, default=None)],
    ids=["tree", "name"],
)
def test_vmap_with_an_axis_for_each_leaf(axes: Any):
    opt = fo.freeze(fo.adam(lr=0.1), {"w": False, "b": False, "gap": True})
    params = {"w": torch.randn(2, 3), "b": torch.randn(2), "gap": None}
    grads = {"w": torch.randn(3, 2), "b": torch.randn(2), "gap": None}

    def step(p: Any, g: Any) -> Any:
        return opt.update(g, opt.init(p), p)[0]

    found = func.vmap(step, (axes, {"w": 0, "b": None, "gap": 0}))(params, grads)
    for i in range(3):
        wanted = step({**params, "w": params["w"][:, i]}, {**grads, "w": grads["w"][i]})
        assert torch.equal(found["w"][i], wanted["w"])
        assert torch.equal(found["b"][i], wanted["b"])
    with pytest.raises(fo.StructureError, match="in_dims"):
        func.vmap(step, ({"x": 1}, 0))(params, grads)


# torch's vmap, of lists -----------------------------------------------------------------

#: what is done to lists of matrices [2, 4, 5] and vectors [4]
LISTS: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
    "a list": lambda x, y: [x[0] @ x[1].mT, y[0].exp()],
    "lists of lists": lambda x, y: ([*x, x[0] * y[0]], [[y[0]]]),
    "what has no batch": lambda x, y: [torch.ones(3, device="cpu"), *x],
    "an input as it is": lambda x, y: [x[0], x[0], *y],
    "noise": lambda x, y: [torch.randn_like(x[0]), torch.rand(3, device="cpu")],
    "a gradient": lambda x, y: grad(lambda x: (x[0] ** 3).sum() * x[1].sum())(x),
    "tangents": lambda x, y: jvp(lambda z: [z * y[0].sum(), z.sin()], (x[0],), (x[1],)),
    "another vmap": lambda x, y: [vmap(lambda row: row @ row)(x[0].flatten(0, -2))],
}
DIMS: dict[str, Any] = {
    "the first": 0,
    "the last": -1,
    "of each": (0, -1),
    "of one alone": (None, 0),
    "of each tensor": ([1, -2], [None]),
}


def lists() -> tuple[list[Tensor], list[Tensor]]:
    made = torch.Generator().manual_seed(2)
    x = [torch.randn(4, 4, 4, generator=made, dtype=torch.float64) for _ in range(2)]
    return x, [torch.randn(4, 4, generator=made, dtype=torch.float64)]


@pytest.mark.parametrize("torch_has_it", [True, False], ids=["parts", "torch's own"])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("what", LISTS)
def test_vmap_of_lists_is_torchs(
    what: str, dims: str, torch_has_it: bool, monkeypatch: pytest.MonkeyPatch
):
    if not torch_has_it:
        monkeypatch.setattr(list_vmap, "_PARTS", None)
    for randomness in ("same", "different"):
        made: list[Any] = []
        for each in (vmap, list_vmap.list_vmap):
            torch.manual_seed(3)
            made.append(each(LISTS[what], DIMS[dims], randomness=randomness)(*lists()))
        wanted, found = made
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


#: what torch refuses: dimensions, and what there is in the lists and comes back
UNMAPPED: dict[str, tuple[Any, Any, Callable[..., Any]]] = {
    "no axis": (None, [torch.ones(3)], lambda x: x),
    "no such axis": (1, [torch.ones(3)], lambda x: x),
    "of several sizes": (0, [torch.ones(3), torch.ones(2)], lambda x: x),
    "a number": (0, [torch.ones(3), 2.0], lambda x: x),
    "no axis for some": (([0, 0],), [torch.ones(3)], lambda x: x),
    "for too many": ((0, 0), [torch.ones(3)], lambda x: x),
    "a number comes back": (0, [torch.ones(3)], lambda x: [2.0]),
    "noise": (0, [torch.ones(3)], lambda x: [torch.rand_like(x[0])]),
    "a number is read": (0, [torch.ones(3)], lambda x: [x[0] * x[0].item()]),
}


@pytest.mark.parametrize("what", UNMAPPED)
def test_vmap_of_lists_refuses_what_torch_does(what: str):
    dims, given, function = UNMAPPED[what]
    dims = (dims,) if dims is None else dims
    raised: list[Any] = []
    for each in (vmap, list_vmap.list_vmap):
        with pytest.raises((ValueError, RuntimeError)) as error:
            each(function, dims)(given)
        raised.append(error)
        assert not levels.inside()
    assert raised[0].type is raised[1].type
    if what != "a number comes back":  # which torch says with the function's name
        assert str(raised[0].value) == str(raised[1].value)


def test_vmap_of_lists_by_a_compiler():
    def both(x: list[Tensor], y: list[Tensor]) -> Any:
        return list_vmap.list_vmap(LISTS["lists of lists"], (0, -1))(x, y)

    wanted = both(*lists())
    found = torch.compile(both, backend="eager", fullgraph=True)(*lists())
    torch.testing.assert_close(found, wanted)


# The values -----------------------------------------------------------------------------

Call = Callable[[Tensor, Any], Tensor]  # of data [6, 3, 4], and what there is beside

FORWARD: dict[str, Call] = {
    "batch, training": lambda x, p: F.batch_norm(x, None, None, training=True),
    "batch, affine": lambda x, p: F.batch_norm(
        x, None, None, p["w3"], p["b3"], True, 0.1, 1e-3
    ),
    "batch, by keyword": lambda x, p: F.batch_norm(
        input=x, running_mean=p["b3"], running_var=p["w3"], weight=p["w3"]
    ),
    "batch, evaluation": lambda x, p: F.batch_norm(x, p["b3"], p["w3"], p["w3"]),
    "batch, of matrices": lambda x, p: F.batch_norm(
        x[..., 0], None, None, None, p["b3"], True
    ),
    "instance": lambda x, p: F.instance_norm(x),
    "instance, affine": lambda x, p: F.instance_norm(
        x, weight=p["w3"], bias=p["b3"], eps=1e-2
    ),
    "instance, evaluation": lambda x, p: F.instance_norm(
        x, p["b3"], p["w3"], use_input_stats=False
    ),
    "layer": lambda x, p: F.layer_norm(x, (4,)),
    "layer, affine": lambda x, p: F.layer_norm(x, (4,), p["w4"], p["b4"], 1e-3),
    "layer, two dimensions": lambda x, p: F.layer_norm(x, [3, 4], p["w34"], None),
}
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-8}


def beside(dtype: torch.dtype) -> Params:
    shapes = {"3": (3,), "4": (4,), "34": (3, 4)}
    weights = {"w" + n: 0.5 + torch.rand(shape) for n, shape in shapes.items()}
    biases = {"b" + n: torch.randn(shape) for n, shape in shapes.items()}
    return {name: x.to(dtype) for name, x in (weights | biases).items()}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_values_are_torchs(name: str, dtype: torch.dtype):
    x, p = (2 * torch.randn(6, 3, 4) + 5).to(dtype), beside(dtype)
    # Computed from half precision in float32, and rounded once: closer than the kernels.
    wide = torch.promote_types(dtype, torch.float32)
    wanted = FORWARD[name](x.to(wide), tree.map(lambda value: value.to(wide), p))
    with func.exact_norms():
        found = FORWARD[name](x, p)
    assert found.dtype == FORWARD[name](x, p).dtype == dtype
    near = ROUNDING[dtype]
    torch.testing.assert_close(found.to(wide), wanted, rtol=near, atol=near)


def test_half_precision_with_parameters_in_float32():
    x = torch.randn(6, 3, 4).bfloat16()
    weight, bias = 0.5 + torch.rand(3), torch.randn(3)
    wanted = F.batch_norm(x, None, None, weight, bias, True)
    with func.exact_norms():
        found = F.batch_norm(x, None, None, weight, bias, True)
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)


MODULES = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3, momentum=0.3),
    "BatchNorm1d, cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "BatchNorm1d, without statistics": lambda: nn.BatchNorm1d(
        3, track_running_stats=False
    ),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    "LayerNorm": lambda: nn.LayerNorm([3, 4]),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_their_running_statistics(name: str):
    """Three batches of training, then evaluation; the statistics bit for bit."""
    usual, exact = MODULES[name](), MODULES[name]()
    batches = torch.randn(4, 6, 3, 4) + 1
    for x in batches[:3]:
        wanted = usual(x)
        with func.exact_norms():
            torch.testing.assert_close(exact(x), wanted, rtol=1e-5, atol=1e-5)
        for a, b in zip(usual.buffers(), exact.buffers(), strict=True):
            assert torch.equal(a, b) and not b.requires_grad
    wanted = usual.eval()(batches[3])
    with func.exact_norms():
        torch.testing.assert_close(exact.eval()(batches[3]), wanted, rtol=1e-5, atol=1e-5)


def test_statistics_of_each_task_are_written_and_shared_ones_refused():
    tasks, mean, var = torch.randn(4, 6, 3), torch.zeros(4, 3), torch.ones(4, 3)

    def normed(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, training=True).sum()

    with func.exact_norms():
        vmap(grad(normed))(tasks, mean, var)
        torch.testing.assert_close(mean, 0.1 * tasks.mean(1))
        with pytest.raises(RuntimeError, match="running_mean"):
            vmap(normed, (0, None, None))(tasks, mean[0], var[0])


REFUSED: dict[str, Callable[[], Any]] = {
    "one value per channel": lambda: F.batch_norm(
        torch.ones(1, 3), None, None, training=True
    ),
    "no statistics": lambda: F.batch_norm(torch.ones(2, 3), None, None),
    "one of two statistics": lambda: F.batch_norm(torch.ones(2, 3), torch.ones(3), None),
    "a weight of another size": lambda: F.batch_norm(
        torch.ones(2, 3), None, None, torch.ones(1), training=True
    ),
    "one place": lambda: F.instance_norm(torch.ones(2, 3, 1)),
    "a bias of another size": lambda: F.instance_norm(
        torch.ones(2, 3, 4), bias=torch.ones(4)
    ),
    "another shape": lambda: F.layer_norm(torch.ones(2, 3), (2,)),
    "a weight of another shape": lambda: F.layer_norm(
        torch.ones(2, 3), (3,), torch.ones(1)
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_torch_refuses_it_refuses(what: str):
    with pytest.raises((ValueError, RuntimeError)) as usual:
        REFUSED[what]()
    with func.exact_norms(), pytest.raises(usual.type) as exact:
        REFUSED[what]()
    assert str(exact.value) == str(usual.value)


# The derivatives ------------------------------------------------------------------------

NORMS: dict[str, Norm] = {
    "batch": lambda x, p: F.batch_norm(x, None, None, p["scale"], p["shift"], True),
    "instance": lambda x, p: F.instance_norm(x, None, None, p["scale"], p["shift"]),
    "layer": lambda x, p: F.layer_norm(
        x.transpose(1, 2), (3,), p["scale"], p["shift"]
    ).transpose(1, 2),
}


class Problem:
    """A convolution with a norm after it, one step of adaptation, and three tasks."""

    def __init__(self, norm: str, step: Callable[..., Params] | None = None) -> None:
        self.norm, self.step = NORMS[norm], step or self.by_hand
        shapes = {"weight": (3, 2, 2), "scale": (3,), "shift": (3,)}
        self.params = {n: torch.randn(s).double() for n, s in shapes.items()}
        self.params["scale"] += 1
        self.tasks = torch.randn(3, 5, 2, 5).double()

    def loss(self, p: Params, x: Tensor, *_: Any) -> Tensor:
        y = torch.tanh(self.norm(F.conv1d(x, p["weight"]), p))
        return (y - x.mean(1, keepdim=True)[..., :4]).square().mean()

    def by_hand(self, p: Params, x: Tensor) -> Params:
        slope = grad(self.loss)(p, x)
        return {name: p[name] - 0.3 * slope[name] for name in p}

    def adapted(self, p: Params, x: Tensor) -> Tensor:
        return self.loss(self.step(p, x), x)

    def overall(self, p: Params) -> Tensor:
        return vmap(self.adapted, (None, 0))(p, self.tasks).mean()

    def truth(self) -> Params:
        """Task by task, gradients outside of everything, by plain arithmetic."""
        with func.exact_norms():
            each = [grad(self.adapted)(self.params, x) for x in self.tasks]
        return tree.map(lambda *g: torch.stack(g).mean(0), *each)


def func_over_vmap(problem: Problem) -> Params:
    return grad(problem.overall)(problem.params)


def autograd_over_vmap(problem: Problem) -> Params:
    p = {n: x.clone().requires_grad_() for n, x in problem.params.items()}
    return dict(zip(p, torch.autograd.grad(problem.overall(p), list(p.values()))))


def inside_vmap(problem: Problem) -> Params:
    each = vmap(grad(problem.adapted), (None, 0))(problem.params, problem.tasks)
    return tree.map(lambda g: g.mean(0), each)


def forward_inside_vmap(problem: Problem) -> Params:
    """Forward over reverse, for each task."""
    each = vmap(jacfwd(problem.adapted), (None, 0))(problem.params, problem.tasks)
    return tree.map(lambda g: g.mean(0), each)


def forward_mode_over_vmap(problem: Problem) -> Params:
    """Of torch.autograd, which no transform of torch.func shows, for each number."""

    def slope(name: str, way: Tensor) -> Any:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(problem.params[name], way)
            along = problem.overall({**problem.params, name: dual})
            return forward_ad.unpack_dual(along).tangent

    return {
        n: torch.stack([slope(n, w.view(x.shape)) for w in torch.eye(x.numel()).to(x)])
        .view(x.shape)
        for n, x in problem.params.items()
    }  # fmt: skip


ORDERS = {
    func_over_vmap: False,
    autograd_over_vmap: False,
    forward_mode_over_vmap: False,
    inside_vmap: True,
    forward_inside_vmap: True,
}  # → whether torch by itself has them right


def distance(a: Params, b: Params) -> float:
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in b)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "order, right", ORDERS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_meta_gradients_are_right_in_every_order(norm: str, order: Any, right: bool):
    problem = Problem(norm)
    truth, usual = problem.truth(), order(problem)
    assert distance(usual, truth) < 1e-12 if right else distance(usual, truth) > 1e-3
    with func.exact_norms():
        assert distance(order(problem), truth) < 1e-12
    assert distance(func.exact_norms()(order)(problem), truth) < 1e-12


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("way", [{}, {"grad_mode": "mixed"}, {"remat": "sqrt"}], ids=str)
def test_unroll_is_right_by_itself_in_every_order(norm: str, order: Any, way: Any):
    def step(p: Params, x: Tensor) -> Params:
        return fo.unroll(fo.sgd(lr=0.3), problem.loss, p, x, steps=2, **way).params

    problem = Problem(norm, step)
    assert distance(order(problem), problem.truth()) < 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_a_tangent_of_the_meta_gradient_is_right_in_either_forward_mode(norm: str):
    problem = Problem(norm)
    value_and_grad = fo.meta.value_and_grad(problem.adapted)
    way = {n: torch.randn_like(p) for n, p in problem.params.items()}

    def slopes(p: Params) -> Params:
        return value_and_grad(p, problem.tasks)[1]

    with forward_ad.dual_level():
        dual = {n: forward_ad.make_dual(p, way[n]) for n, p in problem.params.items()}
        found: Any = tree.map(lambda g: forward_ad.unpack_dual(g).tangent, slopes(dual))
    truth: Any = jvp(slopes, (problem.params,), (way,))[1]
    assert distance(found, truth) < 1e-12


def test_unroll_replaces_nothing_where_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("funcopt.inner.loss.exact_norms", None)
    problem = Problem("batch", lambda p, x: fo.unroll(
        fo.sgd(lr=0.3), problem.loss, p, x, steps=1).params)  # fmt: skip
    inside_vmap(problem)
    grad(problem.adapted)(problem.params, problem.tasks[0])
    vmap(problem.adapted, (None, 0))(problem.params, problem.tasks)
    with pytest.raises(TypeError):
        func_over_vmap(problem)


one = torch.ones(()).double()


def reverse(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return grad(f)


def forward(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: jvp(f, (t,), (one,))[1]


# outermost first → whether torch by itself has it right (pytorch/pytorch#196699, #175754)
NESTED = {
    (reverse, reverse): True,
    (forward, reverse): True,
    (reverse, forward): False,
    (forward, forward): False,
    (reverse, reverse, reverse): False,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "nest", NESTED, ids=lambda nest: "-".join(mode.__name__ for mode in nest)
)
def test_higher_derivatives_are_right(norm: str, nest: Any):
    problem = Problem(norm)
    way = {n: torch.randn_like(p) for n, p in problem.params.items()}

    def along(t: Tensor) -> Tensor:
        at = {n: p + t * way[n] for n, p in problem.params.items()}
        return problem.loss(at, problem.tasks[0])

    def nested() -> float:
        f = along
        for mode in reversed(nest):
            f = mode(f)
        return float(f(torch.zeros(()).double()))

    with func.exact_norms():
        slope = reverse(reverse(along)) if len(nest) == 3 else reverse(along)
        low, high = (slope(torch.tensor(t).double()) for t in (-1e-5, 1e-5))
        truth = float(high - low) / 2e-5
        assert nested() == pytest.approx(truth, rel=1e-5)
    assert (nested() == pytest.approx(truth, rel=1e-3)) == NESTED[nest]


@pytest.mark.parametrize("norm", NORMS)
def test_the_hessian_of_an_adapted_loss(norm: str):
    """A third derivative of the norm, wrong in torch; after the block it is again."""
    problem = Problem(norm)

    def second() -> Params:
        of = lambda scale: problem.adapted({**problem.params, "scale": scale}, x)  # noqa: E731
        return {"scale": torch.func.hessian(of)(problem.params["scale"])}

    x = problem.tasks[0]
    usual = second()
    with func.exact_norms():
        exact = second()
        low, high = (problem.params["scale"] + h * torch.eye(3)[0] for h in (-1e-5, 1e-5))
        slopes = [
            grad(problem.adapted)({**problem.params, "scale": scale}, x)["scale"]
            for scale in (low, high)
        ]
    difference = (slopes[1] - slopes[0]) / 2e-5
    torch.testing.assert_close(exact["scale"][0], difference, rtol=1e-5, atol=1e-7)
    assert distance(usual, exact) > 1e-3
    assert distance(second(), usual) < 1e-12


def test_a_whole_module_with_statistics_in_either_order():
    """nn modules, running statistics of each task, grad(vmap) beside vmap(grad)."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.LayerNorm(4))
    net.double()
    params = {n: p.detach() for n, p in net.named_parameters()}
    state = {n: b.expand(2, *b.shape).clone() for n, b in net.named_buffers()}
    tasks = torch.randn(2, 6, 3).double()

    def loss(p: Params, x: Tensor, buffers: Params) -> Tensor:
        return (functional_call(net, (p, buffers), (x,)) - x[:, :1]).square().mean()

    def adapted(p: Params, x: Tensor, buffers: Params) -> Tensor:
        slope = grad(loss)(p, x, buffers)
        return loss({n: p[n] - 0.1 * slope[n] for n in p}, x, buffers)

    def fresh() -> Params:
        return tree.map(Tensor.clone, state)

    each = vmap(grad(adapted), (None, 0, 0))(params, tasks, fresh())
    wanted = tree.map(lambda g: g.mean(0), each)
    whole = lambda p: vmap(adapted, (None, 0, 0))(p, tasks, fresh()).mean()  # noqa: E731
    with func.exact_norms():
        found = grad(whole)(params)
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)
