"""Hugging Face Accelerate around our classes: the numbers of torch.optim's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_optim import assert_like
from test_torch_optim_around import LIBRARIES, network, weights
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from funcopt import torch_optim

accelerate: Any = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: pip install funcopt[integrations]"
)

pytestmark = pytest.mark.slow

RULES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD": {"momentum": 0.9},
}
EPOCHS, BATCHES, SIZE = 2, 4, 3


def train(
    library: Any,
    name: str,
    precision: str = "no",
    saved: Path | None = None,
    resumed: Path | None = None,
) -> Any:
    """Losses and weights of Accelerate's loop: two micro-batches a step, clipping."""
    state = accelerate.state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision
    )
    model: Any = network(torch.float64 if precision == "no" else torch.float32)
    dtype = next(model.parameters()).dtype
    optimizer: Any = getattr(library, name)(model.parameters(), lr=0.02, **RULES[name])
    scheduler: Any = OneCycleLR(optimizer, 0.02, total_steps=EPOCHS * BATCHES)
    x = torch.randn(BATCHES * SIZE, 3, generator=torch.Generator().manual_seed(2))
    loader: Any = DataLoader(x.to(dtype), batch_size=SIZE)  # pyright: ignore
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, loader, scheduler
    )
    epochs = range(EPOCHS)
    if resumed is not None:
        accelerator.load_state(str(resumed))
        epochs = range(1, EPOCHS)
    losses = []
    for _ in epochs:
        for x in loader:
            with accelerator.accumulate(model):
                loss = (model(x) - x[:, :2].sin()).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        if saved is not None:
            accelerator.save_state(str(saved))
            saved = None
    return losses, weights(model), [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", RULES)
def test_a_loop_is_torchs(name: str):
    (ours, *rest), (theirs, *others) = (train(library, name) for library in LIBRARIES)
    assert ours[-1] != ours[0]
    assert_like([ours, *rest], [theirs, *others])


def test_a_loop_in_bfloat16_is_torchs():
    """Weights stay float32; the forward pass casts them."""
    found, expected = (train(library, "AdamW", "bf16") for library in LIBRARIES)
    assert_like(found, expected)


@pytest.mark.parametrize(
    "saver, loader",
    [(0, 0), (0, 1), (1, 0)],
    ids=["ours", "by torch from ours", "ours from torchs"],
)
def test_a_saved_state_goes_on(saver: int, loader: int, tmp_path: Path):
    straight = train(torch.optim, "AdamW")
    train(LIBRARIES[saver], "AdamW", saved=tmp_path)
    losses, *rest = train(LIBRARIES[loader], "AdamW", resumed=tmp_path)
    assert_like([losses, *rest], [straight[0][BATCHES:], *straight[1:]])


def test_the_prepared_optimizer_wraps_ours():
    optimizer = torch_optim.AdamW(network().parameters())
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert prepared.optimizer is optimizer
