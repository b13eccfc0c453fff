"""What a policy in training keeps of a few validation images, drawn for W&B."""

from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image

from tprl.evaluation.pictures import last_seen, panels
from tprl.evaluation.statistics import image_key
from tprl.report import rasters
from tprl.runtime.tracking import SEEN, Tracker
from tprl.scoring.validation import ServedScore
from tprl.splice import keep_all, splice
from tprl.types import Pruner

SIDE = 256  # pixels


class Overlays(pl.Callback):
    """Logs pictures of the same validation questions before training and every `overlay_every`
    iterations: pruned patches are darkened; the caption holds the question, both answers and the
    number of tokens kept, at the smallest keep ratio that validation serves. The stage has
    `served`, `pruner`, `iteration` and `samples_seen`.

    Args:
        stage: the metric is `<stage>/overlays`.
        tracker: what says how often and how many; each picture shows another image.
    """

    def __init__(self, stage: str, tracker: Tracker) -> None:
        self.name, self.tracker = f"{stage}/overlays", tracker

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.iteration == 0:
            self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.iteration % self.tracker.overlay_every == 0:
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, stage: Any) -> None:
        if not trainer.is_global_zero:
            return
        import wandb

        drawn = pictures(stage.served, stage.pruner, self.tracker.overlays)
        images = [wandb.Image(picture, caption=caption) for picture, caption in drawn]
        self.tracker.log_row({SEEN: stage.samples_seen, self.name: images})


@torch.no_grad()
def pictures(served: ServedScore, pruner: Pruner, count: int) -> list[tuple[Image.Image, str]]:
    """(picture, caption) of the first questions about `count` different images."""
    samples, encoded = served.batches[0]
    first = {
        image_key(sample.uid): i
        for i, sample in reversed(list(enumerate(samples)))
        if sample.images
    }
    chosen = sorted(first.values())[:count]
    picked, part = [samples[i] for i in chosen], encoded.rows(chosen)
    full = served.scorer.lvlm.answer(splice(part, keep_all(part)))
    out = []
    ratio = min(served.keep_ratios)
    drawn = panels(served.scorer, picked, part, "", pruner, ratio)
    for i, (sample, answer, panel) in enumerate(zip(picked, full, drawn, strict=True)):
        if panel.keep is None:
            continue
        note = f"all tokens: {answer!r}, {panel.keep.sum()} of {panel.keep.size}: {panel.answer!r}"
        picture = rasters.mask_picture(sample.images[-1], panel.keep, SIDE, last_seen(part, i))
        out.append((picture, f"{sample.question} ({note})"))
    return out
