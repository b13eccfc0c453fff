"""Draws the batch of a step from sheets and rendered pages; needs no model, so that processes
beside the training can do it."""

from pathlib import Path

import torch
from torch import Tensor

from .pace import When
from .packs import Pack, Packer
from .pages import Folder, Item, draw
from .pages import views as views_of
from .readings import Reading, kept_tokens, reading
from .run import Plan
from .targets import Targets, captions, targets

FEW = 50  # rendered pages; with fewer only sheets are shown, and no questions can be asked
PLENTY = 2000  # with fewer, their share is smaller than planned: they would be learned by heart
CONTRAST = 8  # steps between two in which CLIP's text tower learns


class Source:
    """What a step shows.

    Args:
        plan: of the run.
        pages: the folder of rendered pages; None: sheets only.
        packer: of questions.
    """

    def __init__(self, plan: Plan, pages: Path | None, packer: Packer) -> None:
        self.plan, self.packer = plan, packer
        self.folder = None if pages is None else Folder(pages)

    def __len__(self) -> int:
        return 0 if self.folder is None else len(self.folder)

    def grow(self) -> int:
        """Look for pages rendered since; how many there are."""
        return 0 if self.folder is None else self.folder.grow()

    def __call__(self, when: When) -> Targets | Reading:
        if when.count > len(self):  # found since by the training, of which this is a copy
            self.grow()
        return self._tower(when) if when.tower else self._reader(when)

    def items(self, when: When, batch: int, share: float, kind: str = "things") -> list[Item]:
        """Pages of a step, and sheets of a kind in the place of 1 - `share` of them."""
        plan = self.plan
        used = when.count if when.count >= FEW else 0
        loose = min(1.0, when.at / max(1.0, plan.aligned * when.steps))
        return [
            draw(self.folder, used, share, loose, plan.seed, when.step, at, kind)
            for at in range(batch)
        ]

    def _tower(self, when: When) -> Targets:
        plan, batch = self.plan, self.plan.tower_batch
        if letters(plan, when.at, when.steps):
            return targets(views_of(self.items(when, batch, 0.0, "words")), letters=True)
        planned = 1 - plan.sheets * (1 - 0.9 * when.at / when.steps)
        share = planned * min(1.0, 0.2 + when.count / PLENTY)
        views = views_of(self.items(when, batch, share))
        return targets(
            views, self.captions(views.name, when.step) if when.step % CONTRAST == 0 else None
        )

    def captions(self, names: Tensor, step: int) -> Tensor:
        tokenizer = self.packer.tokenizer
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return captions(names, step, marks)

    def _reader(self, when: When) -> Reading:
        plan = self.plan
        pack = self.packer.pack(self.items(when, plan.reader_batch, 1.0), plan.seed, when.step)
        return reading(pack, self._kept(pack, when))

    def _kept(self, pack: Pack, when: When) -> Tensor:
        visible = (pack.views.owner > 0) | (pack.views.word > 0)
        return kept_tokens(visible, when.at / when.steps, self.plan.seed, when.step)


def letters(plan: Plan, at: float, steps: float) -> bool:
    """Whether the first phase is still about letters and words alone."""
    return at < plan.letters * steps


def every_token(pack: Pack) -> Tensor:
    """Indices of all visual tokens."""
    return torch.arange(pack.views.owner.shape[1]).expand(len(pack.text), -1)
