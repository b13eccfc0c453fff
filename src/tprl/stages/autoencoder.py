"""Stage `autoencoder`: compact codes of visual tokens, learnt token by token without labels."""

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tprl.pruners.learned import LearnedPruner
from tprl.types import LVLM, Dataset


class AutoencoderStage(pl.LightningModule):
    """Trains `pruner.autoencoder` on the projected tokens of training images (TPRL, stage 1).

    Args:
        pruner: whose autoencoder is trained.
        lvlm, dataset: where tokens come from.
        images: images to encode; a tenth of them is held out for `autoencoder/val_mse`.
        epochs, batch_size (tokens), lr, weight_decay: AdamW; defaults are the reference code's.
        seed: order of the tokens.
    """

    def __init__(
        self,
        pruner: LearnedPruner,
        lvlm: LVLM,
        dataset: Dataset,
        images: int = 512,
        epochs: int = 10,
        batch_size: int = 256,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pruner", "lvlm", "dataset"])
        self.pruner, self.lvlm, self.dataset, self.epochs = pruner, lvlm, dataset, epochs

    def setup(self, stage: str) -> None:
        if self.pruner.autoencoder is None:
            raise ValueError("policy.code_width=0 has no autoencoder: skip this stage.")
        tokens = self._tokens()
        held_out = len(tokens) // 10
        self.held_out, self.tokens = tokens[:held_out].flatten(0, 1), tokens[held_out:].flatten(0, 1)
        self.pruner.autoencoder.fit_statistics(self.tokens.float())

    def _tokens(self) -> Float[Tensor, "I V D"]:
        """Projected tokens of the first `images` distinct images, fp16."""
        wanted, seen, parts, batch = self.hparams["images"], set[int](), [], []
        for index in range(len(self.dataset)):
            sample = self.dataset[index]
            if id(sample.images[0]) in seen:
                continue
            seen.add(id(sample.images[0]))
            batch.append(sample)
            if len(batch) == 64 or len(seen) == wanted:
                parts.append(self.lvlm.encode(batch).visual.half().cpu())
                batch = []
            if len(seen) == wanted:
                break
        return torch.cat(parts)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        order = torch.Generator().manual_seed(self.hparams["seed"])
        data = TensorDataset(self.tokens)
        return DataLoader(data, self.hparams["batch_size"], shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.held_out), 8192)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.pruner.autoencoder is not None
        h = self.hparams
        return torch.optim.AdamW(self.pruner.autoencoder.parameters(), lr=h["lr"], weight_decay=h["weight_decay"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        assert self.pruner.autoencoder is not None
        loss = self.pruner.autoencoder.relative_mse(batch[0].float())
        self.log("autoencoder/mse", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        assert self.pruner.autoencoder is not None
        error = self.pruner.autoencoder.relative_mse(batch[0].float())
        self.log("autoencoder/val_mse", error, batch_size=len(batch[0]), prog_bar=True)
