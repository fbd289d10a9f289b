"""LBFGS: torch.optim's own step, with what the adapter adds around it."""

from typing import Any

import torch

from funcopt import tree
from funcopt.errors import CheckpointError
from funcopt.optimizer import Optimizer
from funcopt.optimizers import lbfgs
from funcopt.torch_optim.adapter import Adapter
from funcopt.torch_optim.checkpoint import check_parts, copied
from funcopt.types import State, Tree

_step_of_torch: Any = torch.optim.LBFGS.step
if hasattr(_step_of_torch, "hooked"):  # one was made, and torch has wrapped its step
    _step_of_torch = _step_of_torch.__wrapped__

_HISTORY = ("old_dirs", "old_stps", "ro")  # the newest last
_VALUES = ("d", "t", "H_diag", "prev_flat_grad", "prev_loss")
_COUNTS = ("func_evals", "n_iter")
_NUMBERS = ("max_iter", "tolerance_grad", "tolerance_change", "history_size")


class LBFGS(Adapter, torch.optim.LBFGS):
    """L-BFGS as ``torch.optim.LBFGS`` steps it; `funcopt.lbfgs` is its functional form.

    A step asks for the loss again and again, through a closure that works on the
    parameters in place: there is nothing for a kernel to fuse.
    """

    def _step(self, closure: Any) -> Any:
        return _step_of_torch(self, closure)

    def _fitted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        check_parts(state_dict, "LBFGS")
        (own,) = self.param_groups
        for found in state_dict["param_groups"]:
            missing = [key for key in _NUMBERS if key not in found]
            if missing:
                raise CheckpointError(
                    "the checkpoint is another optimizer's: LBFGS steps by "
                    f"{tree.some(missing)}, which it has not"
                )
            theirs, ours = (group.get("param_names") for group in (found, own))
            if theirs and ours and [*theirs] != [*ours]:
                raise CheckpointError(
                    "LBFGS keeps vectors of all parameters one after the other: it is to "
                    f"have them in the checkpoint's order, {tree.some([*theirs])}"
                )
        count = sum(p.numel() * (1 + p.is_complex()) for p in own["params"])
        for entry in state_dict["state"].values():
            if "d" in entry and entry["d"].numel() != count:
                raise CheckpointError(
                    f"the checkpoint is of {entry['d'].numel()} numbers, and the "
                    f"parameters of this LBFGS are {count}"
                )
        return {**state_dict, "state": copied(state_dict["state"])}

    def _check_group(self, group: dict[str, Any]) -> None:
        pass

    def functional(self) -> tuple[Optimizer, Tree, State]:
        return functional(self)

    def load(self, params: Tree, state: State) -> None:
        """Go on from what steps made of `functional`."""
        group = self.param_groups[0]
        entry = self.state[group["params"][0]]
        count = int((state["ro"] > 0).sum())
        entry.update({key: int(state[key]) for key in _COUNTS})
        entry.update({key: state[key].detach().clone() for key in _VALUES})
        entry["prev_loss"] = float(entry["prev_loss"])
        for key in _HISTORY:
            rows = state[key].detach()[len(state[key]) - count :]
            entry[key] = [row.clone() for row in rows]
        entry["al"] = [None] * group["history_size"]
        with torch.no_grad():
            for p, value in zip(group["params"], tree.leaves(params), strict=True):
                p.copy_(value)


def functional(optimizer: torch.optim.Optimizer) -> tuple[Optimizer, Tree, State]:
    """`funcopt.lbfgs` with the optimizer's numbers, parameters and history."""
    (group,) = optimizer.param_groups
    numbers = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    opt = lbfgs(**numbers)
    params = [[p.detach().clone() for p in group["params"]]]
    state = opt.init(params)
    entry = optimizer.state.get(group["params"][0])
    if entry:
        state["step"].fill_(1)
        for key in (*_COUNTS, *_VALUES):
            state[key] = torch.as_tensor(entry[key]).detach().clone().to(state[key])
        for key in _HISTORY:
            for i, row in enumerate(reversed(entry[key]), 1):
                state[key][-i] = row
    return opt, params, state
