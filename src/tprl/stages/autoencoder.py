"""Stage `autoencoder`: compact codes of visual tokens, learned token by token without labels."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from tprl.data.base import BaseDataset
from tprl.data.taking import nothing_left, taken
from tprl.errors import UserError
from tprl.pruners.learned import LearnedPruner
from tprl.runtime import distributed
from tprl.runtime.finite import check_finite, compact
from tprl.scoring.ahead import Ready, ahead, in_parts, questions_at_once
from tprl.stages.base import Next, RowStage, Unread
from tprl.stages.token_file import TokenFile
from tprl.types import LVLM, Sample

AT_ONCE = 64  # images that are encoded together, where memory holds as many


class AutoencoderStage(RowStage):
    """Trains `pruner.autoencoder` on the projected tokens of training images (TPRL, stage 1).

    Args:
        pruner: whose autoencoder is trained.
        lvlm, dataset: where tokens come from.
        images: images to encode; a tenth of them is held out for `autoencoder/val_mse`. epochs,
        batch_size (tokens), lr, weight_decay: AdamW; the reference code has 10 epochs, 256, 1e-4,
        0.01.
        seed: order of the tokens.
    """

    rows = "tokens"
    folder = "autoencoder"
    needs_codes = False
    curve_titles: ClassVar = {"autoencoder/mse": "autoencoder, share of variance lost: training"}
    held_out_titles: ClassVar = {
        "autoencoder/val_mse": "autoencoder, share of variance lost: held out"
    }
    unread = (
        Unread(
            "",
            lambda s: s["policy"].get("code_width") == 0,
            "policy.code_width=0 has no autoencoder",
        ),
    )
    next = Next("train", "stage.init_from", words=("stage=lfd",), carries=True)

    def __init__(
        self,
        pruner: LearnedPruner,
        lvlm: LVLM,
        dataset: BaseDataset,
        images: int,
        epochs: int,
        batch_size: int,
        lr: float,
        weight_decay: float,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["pruner", "lvlm", "dataset"])
        self.pruner, self.lvlm, self.dataset, self.epochs = pruner, lvlm, dataset, epochs
        self.samples_seen = 0

    @classmethod
    def applies_to(cls, pruner: LearnedPruner | type[LearnedPruner]) -> bool:
        return isinstance(pruner, type) or pruner.autoencoder is not None

    @property
    def result(self) -> float | None:
        """Minus the share of variance lost on images that are held out."""
        return -float(self.trainer.callback_metrics["autoencoder/val_mse"])

    def setup(self, stage: str) -> None:
        if self.pruner.autoencoder is None:
            raise UserError(
                "policy.code_width=0 has no autoencoder to train: skip stage=autoencoder."
            )
        self.pruner.train_only("autoencoder.")
        # Whole images are held out: tokens of one image are too much alike.
        self.file, sizes = TokenFile(self.lvlm.width), list[int]()
        for tokens in self._tokens():
            self.file.add(tokens)
            sizes.append(len(tokens))
        # The first tenth of the images, one at least, as a number of tokens in the file.
        first = sum(sizes[: max(1, len(sizes) // 10)])
        whole = self.file.mapped()
        self.held_out, self.tokens = whole[:first], whole[first:]
        # Mean and variance by a stream over the file: codes are those of standardized tokens.
        self.pruner.autoencoder.fit_statistics(self.tokens)

    def _tokens(self) -> Iterator[Float[Tensor, "N D"]]:
        """Projected tokens of each of the first `images` questions about distinct images, in fp16
        where they fit.

        Raises:
            UserError: the dataset shows fewer than two images.
        """
        samples = list(islice(self._distinct(), self.hparams["images"]))
        # Where every row was damaged, the rows are the reason, not the number of images.
        if not samples and self.dataset.damage:
            raise nothing_left(self.dataset, len(self.dataset), "to take images from")
        if len(samples) < 2:
            raise UserError(
                f"stage=autoencoder needs at least 2 images, and dataset {self.dataset.name} shows "
                f"{len(samples)}: use a larger one."
            )

        # Some images at a time; on the host and without padding, because all of them are written.
        def work(batch: Ready) -> list[Float[Tensor, "N D"]]:
            encoded = batch.encode(self.lvlm)
            visual = compact(encoded.visual)
            # One bad image would spoil the statistics of all: it is named here.
            check_finite({"visual tokens": visual}, encoded.uids, "stage=autoencoder")
            pairs = zip(visual.cpu(), encoded.visual_mask.cpu(), strict=True)
            return [visual[mask] for visual, mask in pairs]

        size = questions_at_once(self.lvlm, self.dataset, AT_ONCE)
        starts = range(0, len(samples), size)
        stream = (Ready(samples[start : start + size]) for start in starts)
        for batch in ahead(self.lvlm, stream):
            for part in in_parts(work, batch, self.lvlm.name):
                yield from part

    def _distinct(self) -> Iterator[Sample]:
        """The first question about every image. Pixels decide, because an object's id is soon used
        again."""
        seen = set[bytes]()
        for sample in taken(self.dataset, range(len(self.dataset))):
            pixels = hashlib.blake2b(b"".join(image.tobytes() for image in sample.images)).digest()
            if sample.images and pixels not in seen:
                seen.add(pixels)
                yield sample

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # A generator of its own: the order follows from the seed alone, whatever else draws.
        order = torch.Generator().manual_seed(self.hparams["seed"])
        data = TensorDataset(self.tokens)
        sampler = RandomSampler(data, generator=order)
        batches = BatchSampler(sampler, self.hparams["batch_size"], drop_last=False)
        return DataLoader(data, batch_sampler=distributed.Shares(batches), generator=order)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # Without gradients far more tokens fit than in a training batch.
        return DataLoader(TensorDataset(self.held_out), 8192)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.pruner.autoencoder is not None
        h = self.hparams
        return torch.optim.AdamW(
            self.pruner.autoencoder.parameters(), lr=h["lr"], weight_decay=h["weight_decay"]
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        assert self.pruner.autoencoder is not None
        error = self.pruner.autoencoder.relative_mse(batch[0].float())
        return self.counted("autoencoder/mse", error, index, len(self.tokens))

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        assert self.pruner.autoencoder is not None
        error = self.pruner.autoencoder.relative_mse(batch[0].float())
        self.log("autoencoder/val_mse", error, batch_size=len(batch[0]), prog_bar=True)
        self.log("samples_seen", float(self.samples_seen))
