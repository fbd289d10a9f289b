"""Hugging Face's Trainer around our classes: the numbers of torch.optim's."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_optim import assert_like
from test_torch_optim_around import LIBRARIES, weights
from torch.optim.lr_scheduler import LambdaLR

transformers: Any = pytest.importorskip(
    "transformers",
    reason="transformers is not installed: pip install funcopt[integrations]",
)

pytestmark = pytest.mark.slow

STEPS, HALF = 6, 3


def model() -> Any:
    """A few hundred weights, drawn here: nothing is fetched."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
    )
    return transformers.LlamaForCausalLM(config)


def data() -> Any:
    tokens = torch.randint(11, (16, 6), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@cache  # a run takes seconds, and several tests look at it
def train(
    folder: Path, library: Any, resumed: Path | None = None, by_class: bool = False
) -> Any:
    """The trainer's history of losses and rates, and the weights."""
    net = model()
    args = transformers.TrainingArguments(
        output_dir=str(folder / library.__name__),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=0.02,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=HALF,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": (library.AdamW, {"lr": 0.02})}
    if not by_class:
        optimizer = library.AdamW(net.parameters(), lr=0.02)
        given = {"optimizers": (optimizer, LambdaLR(optimizer, lambda t: 0.9**t))}
    trainer = transformers.Trainer(net, args, train_dataset=data(), **given)
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    history = [
        torch.tensor([row["loss"], row["grad_norm"], row["learning_rate"]])
        for row in trainer.state.log_history
        if "loss" in row
    ]
    assert len(history) == STEPS
    return history, weights(net)


@pytest.mark.parametrize("by_class", [False, True], ids=["object", "class"])
def test_a_trainer_is_torchs(by_class: bool, folder: Path):
    found, expected = (
        train(folder / "by class" if by_class else folder, library, by_class=by_class)
        for library in LIBRARIES
    )
    assert found[0][-1][0] < found[0][0][0]
    assert_like(found, expected)


@pytest.mark.parametrize(
    "saver, loader",
    [(0, 0), (0, 1), (1, 0)],
    ids=["ours", "by torch from ours", "ours from torchs"],
)
def test_a_checkpoint_goes_on(saver: int, loader: int, folder: Path, tmp_path: Path):
    expected = train(folder, LIBRARIES[saver])
    saved = folder / LIBRARIES[saver].__name__ / f"checkpoint-{HALF}"
    found = train(tmp_path, LIBRARIES[loader], saved)
    assert_like(found, expected)
