"""Lightning around our classes: the numbers of torch.optim's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_optim import assert_like
from test_torch_optim_around import LIBRARIES, network, weights
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR
from torch.utils.data import DataLoader

lightning: Any = pytest.importorskip(
    "lightning", reason="lightning is not installed: pip install funcopt[integrations]"
)

pytestmark = [
    pytest.mark.slow,
    # of its use of torch's trees, which torch has since renamed
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

RULES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD": {"momentum": 0.9},
    "LBFGS": {"max_iter": 3},
}
EPOCHS, BATCHES, SIZE = 2, 4, 3


class Automatic(lightning.LightningModule):
    """Lightning steps: it hands the optimizer a closure, and a scheduler's turn."""

    def __init__(self, library: Any, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.library, self.name = network(dtype), library, name
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = (self.model(batch) - batch[:, :2].sin()).square().mean()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        cls, kwargs = getattr(self.library, self.name), RULES[self.name]
        optimizer = cls(self.model.parameters(), lr=0.02, **kwargs)
        if self.name == "LBFGS":
            return {"optimizer": optimizer, "lr_scheduler": ExponentialLR(optimizer, 0.9)}
        scheduler = OneCycleLR(optimizer, 0.02, total_steps=EPOCHS * BATCHES)
        by_step = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}


class Adversarial(lightning.LightningModule):
    """Two optimizers, which the module steps itself."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.generator = nn.Linear(3, 2).double()
        self.discriminator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.discriminator.double()
        self.library = library
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> None:
        first: Any
        second: Any
        first, second = self.optimizers()
        signs: tuple[float, float] = (1.0, -1.0)
        for optimizer, sign in zip((first, second), signs):
            self.toggle_optimizer(optimizer)
            made = self.discriminator(self.generator(batch)).square()
            real = self.discriminator(batch[:, :2].sin()).square()
            loss = sign * (made - real).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.losses.append(loss.detach())
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [
            self.library.AdamW(self.generator.parameters(), lr=0.02),
            self.library.SGD(self.discriminator.parameters(), lr=0.05, momentum=0.9),
        ]
        return optimizers, [ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


def fit(module: Any, resumed: Path | None = None, **kwargs: Any) -> Any:
    """The trainer, after it has trained."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS, **kwargs},
    )
    dtype = next(module.parameters()).dtype
    x = torch.randn(BATCHES * SIZE, 3, generator=torch.Generator().manual_seed(2))
    loader: Any = DataLoader(x.to(dtype), batch_size=SIZE)  # pyright: ignore
    trainer.fit(module, loader, ckpt_path=resumed)
    return trainer


def outcome(module: Any, trainer: Any) -> Any:
    rates = [group["lr"] for o in trainer.optimizers for group in o.param_groups]
    return module.losses, weights(module), rates


@pytest.mark.parametrize(
    "name, precision", [*((name, "64-true") for name in RULES), ("AdamW", "bf16-mixed")]
)
def test_automatic_optimization_is_torchs(name: str, precision: str):
    both = []
    for library in LIBRARIES:
        dtype = torch.float64 if precision == "64-true" else torch.float32
        module = Automatic(library, name, dtype)
        more: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        if name == "LBFGS":  # whose steps ask for one batch's loss again and again
            more = {}
        trainer = fit(module, precision=precision, **more)
        both.append(outcome(module, trainer))
    assert both[0][0][-1] != both[0][0][0]
    assert_like(both[0], both[1])


def test_two_optimizers_in_manual_optimization_are_torchs():
    both = []
    for library in LIBRARIES:
        module = Adversarial(library)
        both.append(outcome(module, fit(module, precision="64-true")))
    assert_like(both[0], both[1])


@pytest.mark.parametrize(
    "saver, loader",
    [(0, 0), (0, 1), (1, 0)],
    ids=["ours", "by torch from ours", "ours from torchs"],
)
def test_a_checkpoint_goes_on(saver: int, loader: int, tmp_path: Path):
    straight = Automatic(torch.optim, "AdamW", torch.float64)
    expected = outcome(straight, fit(straight, gradient_clip_val=1.0))
    first = Automatic(LIBRARIES[saver], "AdamW", torch.float64)
    file = tmp_path / "half.ckpt"
    fit(first, max_epochs=1, gradient_clip_val=1.0).save_checkpoint(file)
    second = Automatic(LIBRARIES[loader], "AdamW", torch.float64)
    found = outcome(second, fit(second, file, gradient_clip_val=1.0))
    assert_like(found, (expected[0][BATCHES:], *expected[1:]))
