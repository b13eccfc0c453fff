"""python -m experiments.screens.tiny.train --pages <train folder> --out <run folder>: make
`tiny_screens`.

First the tower with dense supervision, on sheets and more and more on rendered pages, then
projector and language model on questions. The same command goes on where it was stopped. See
README.md.
"""

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tprl.errors import UserError
from tprl.pretraining import tiny_llava

from .blueprint import build
from .optimizing import optimizers, rate, step
from .packs import Packer
from .pages import Folder, Item, draw, item, views
from .reader import Reader
from .run import Meter, Plan, Run
from .tower import DenseHeads, cls_look, dense_terms, present_loss, see, total

FEW = 50  # rendered pages; with fewer only sheets are shown, and no questions can be asked
PLENTY = 2000  # with fewer, their share is smaller than planned: they would be learned by heart
TESTED = 32  # pages of a validation
CONTRAST = 8  # steps between two in which CLIP's text tower learns
REPORT = 20  # steps between two lines of the log
VALIDATE = 200  # steps between two validations
LIMIT = 9_000_000  # parameters


class Training:
    """Both phases.

    Args:
        run: where they are kept.
        pages: the folder of rendered pages, still growing or not; None: sheets only.
    """

    def __init__(self, run: Run, pages: Path | None) -> None:
        self.run, self.plan = run, run.plan
        torch.manual_seed(self.plan.seed)
        self.parts = build(**(self.plan.sizes or {}), seed=self.plan.seed)
        count = sum(parameter.numel() for parameter in self.parts.llava.parameters())
        if count > LIMIT:
            raise UserError(
                f"the model has {count:,} parameters, and {LIMIT:,} are allowed: make it smaller."
            )
        for model in (self.parts.llava, self.parts.clip):
            model.set_attn_implementation("sdpa")
        self.heads = DenseHeads(self.parts)
        self.reader = Reader(self.parts)
        self.packer = Packer(self.parts.processor, self.plan.questions)
        self.folder = None if pages is None else Folder(pages)
        self.done, self.count, self.cpu = 0, self._pages(), 0.0
        self.modules = {"llava": self.parts.llava, "clip": self.parts.clip, "heads": self.heads}
        self.optimizers: list[Optimizer] = []
        self._enter()
        self._resume()

    def _pages(self) -> int:
        return 0 if self.folder is None else len(self.folder)

    # --- phases ---------------------------------------------------------------------------------

    @property
    def in_tower(self) -> bool:
        return self.done < self.plan.tower_steps

    def _enter(self) -> None:
        """Fresh optimizers at the start of a phase."""
        llava, clip, plan = self.parts.llava, self.parts.clip, self.plan
        projector = llava.model.multi_modal_projector
        if self.in_tower:
            inner = [llava.model.vision_tower, projector]
            outer = nn.ModuleList([self.heads, llava.get_input_embeddings(), *_clip_heads(clip)])
            extra = nn.ParameterList([clip.logit_scale])
            self.optimizers = optimizers(inner, nn.ModuleList([outer, extra]), plan.lr, plan.muon)
        else:
            inner = [projector, llava.model.language_model]
            self.optimizers = optimizers(inner, nn.ModuleList(), plan.reader_lr, plan.reader_muon)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]

    def _resume(self) -> None:
        content = self.run.load()
        if content is None:
            return
        state = content["state"]
        self.done, self.count, self.cpu = state["done"], state["count"], state["cpu"]
        if self.count > self._pages():
            raise UserError(
                f"the run used {self.count} pages and there are "
                f"{self._pages()}: give the folder it used."
            )
        self._enter()
        for name, module in self.modules.items():
            module.load_state_dict(content["modules"][name])
        for optimizer, values in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.run.cut_log(self.done)

    def save(self) -> None:
        state = {"done": self.done, "count": self.count, "cpu": self.cpu}
        self.run.save(self.modules, self.optimizers, state)

    def grow(self) -> None:
        """Use pages rendered since; only where a checkpoint is about to be written."""
        if self.folder is not None:
            self.count = self.folder.grow()

    # --- steps ----------------------------------------------------------------------------------

    def advance(self) -> dict[str, Tensor]:
        """One step; its losses and rates."""
        if not self.in_tower:
            self._check_pages()
        terms = self._tower_step() if self.in_tower else self._reader_step()
        self.done += 1
        if self.done == self.plan.tower_steps:
            self._enter()
        return terms

    def _check_pages(self) -> None:
        """Questions are about rendered pages: sheets have none.

        Raises:
            UserError: there are too few; the first phase is saved.
        """
        if self.count >= FEW:
            return
        self.grow()
        self.save()
        if self.count < FEW:
            raise UserError(
                f"the second phase asks about {FEW} rendered pages or more, and "
                f"--pages holds {self.count}: render more (experiments/screens) "
                "and give the same command, or set --reader-steps 0."
            )

    def items(self, batch: int, share: float) -> list[Item]:
        """Pages of this step."""
        used = self.count if self.count >= FEW else 0
        loose = min(1.0, self.done / max(1.0, self.plan.aligned * self.plan.tower_steps))
        return [
            draw(self.folder, used, share, loose, self.plan.seed, self.done, at)
            for at in range(batch)
        ]

    def _tower_step(self) -> dict[str, Tensor]:
        plan = self.plan
        planned = 1 - plan.sheets * (1 - 0.9 * self.done / plan.tower_steps)
        share = planned * min(1.0, 0.2 + self.count / PLENTY)
        items = self.items(plan.tower_batch, share)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = self.look(items, contrast=self.done % CONTRAST == 0)
            loss = total(terms)
        loss.backward()
        norm = step(self.optimizers, rate(self.done, plan.tower_steps), self.parameters)
        return terms | {"loss": loss.detach(), "norm": torch.tensor(norm)}

    def look(self, items: list[Item], contrast: bool) -> dict[str, Tensor]:
        """Terms of the first phase."""
        batch, llava = views(items), self.parts.llava
        hidden, between, row = see(llava.model.vision_tower, batch.pixels, self.heads.middle)
        tokens = llava.model.multi_modal_projector(hidden[:, 1:])
        terms = dense_terms(self.heads, tokens, between, llava.get_input_embeddings().weight, batch)
        terms["loss/present"] = present_loss(self.heads, hidden[:, 0], batch)
        terms["loss/cls_look"] = cls_look(row, batch.owner)
        if contrast:
            terms |= self._contrast(hidden, batch.name)
        return terms

    def _contrast(self, hidden: Tensor, names: Tensor) -> dict[str, Tensor]:
        """CLIP: the page and a list of names on it belong together; only the last layer learns from
        it."""
        clip, tower = self.parts.clip, self.parts.llava.model.vision_tower
        out = tower.encoder.layers[-1](hidden.detach(), attention_mask=None)
        pooled = tower.post_layernorm((out[0] if isinstance(out, tuple) else out)[:, 0])
        image = nn.functional.normalize(clip.visual_projection(pooled).float(), dim=-1)
        captions = self._captions(names)
        text = clip.text_model(
            input_ids=captions, attention_mask=(captions > 0).long()
        ).pooler_output
        text = nn.functional.normalize(clip.text_projection(text).float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        truth = torch.arange(len(logits))
        loss = nn.functional.cross_entropy(logits, truth) + nn.functional.cross_entropy(
            logits.T, truth
        )
        return {
            "loss/contrast": loss / 2,
            "contrast_accuracy": (logits.argmax(1) == truth).float().mean(),
        }

    def _captions(self, names: Tensor) -> Tensor:
        """Up to twelve words of each page's elements, between <s> and </s>."""
        tokenizer = self.parts.processor.tokenizer
        rows = []
        for page in names:
            present = page[page >= 0].unique()
            order = torch.randperm(len(present), generator=torch.Generator().manual_seed(self.done))
            rows.append(
                [tokenizer.bos_token_id, *present[order[:12]].tolist(), tokenizer.eos_token_id]
            )
        width = max(map(len, rows))
        return torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])

    def _reader_step(self) -> dict[str, Tensor]:
        plan = self.plan
        at = self.done - plan.tower_steps
        pack = self.packer.pack(self.items(plan.reader_batch, 1.0), plan.seed, self.done)
        visible = (pack.views.owner > 0) | (pack.views.word > 0)
        kept = self.reader.kept_tokens(visible, at / plan.reader_steps, plan.seed, self.done)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                features = self.features(pack.views.pixels)
            terms = self.reader.terms(features, pack, kept)
            loss = terms["loss/answer"] + terms["loss/look"]
        loss.backward()
        norm = step(self.optimizers, rate(at, plan.reader_steps), self.parameters)
        return terms | {"loss": loss.detach(), "norm": torch.tensor(norm)}

    def features(self, pixels: Tensor) -> Tensor:
        return see(self.parts.llava.model.vision_tower, pixels, self.heads.middle)[0][:, 1:]

    # --- validation -----------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The terms of pages that no step sees, without a shift; nothing where there are too
        few."""
        if self.folder is None or self.count < FEW:
            return {}
        held = self.folder.held[:TESTED]
        meter = Meter()
        for start in range(0, len(held), 8):
            items = [
                item(*self.folder.page(at, held=True), 0, 0)
                for at in range(start, min(start + 8, len(held)))
            ]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                meter.add(
                    self.look(items, False) if self.in_tower else self._read_all(items, start)
                )
        return {f"val/{name}": value for name, value in meter.take().items() if name != "cpu"}

    def _read_all(self, items: list[Item], start: int) -> dict[str, Tensor]:
        pack = self.packer.pack(items, self.plan.seed, start)
        features = self.features(pack.views.pixels)
        every = torch.arange(features.shape[1]).expand(len(items), -1)
        return self.reader.terms(features, pack, every)


def _clip_heads(clip: Any) -> list[nn.Module]:
    return [clip.text_model, clip.visual_projection, clip.text_projection]


# --- the command ----------------------------------------------------------------------------------


def work(training: Training, minutes: float, until: int) -> None:
    """Steps up to `until`, a checkpoint every `minutes` of the clock, a last one at the end or at
    SIGTERM."""
    stop: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.append(number))
    meter, saved = Meter(), time.monotonic()
    while training.done < until and not stop:
        meter.add(training.advance())
        if training.done % REPORT == 0:
            row = meter.take()
            training.cpu += row["cpu"]
            training.run.write({"step": training.done, "pages": training.count, **row})
            left = (until - training.done) * row["cpu"] / REPORT / 3600
            _say(training, row, left)
        if training.done % VALIDATE == 0:
            validated(training)
        if time.monotonic() - saved > 60 * minutes:
            checkpoint(training)
            saved = time.monotonic()
    checkpoint(training)


def validated(training: Training) -> None:
    row = training.validate()
    if row:
        training.run.write({"step": training.done, **row})
        _say(training, row, None)


def checkpoint(training: Training) -> None:
    """Look for new pages and save."""
    training.grow()
    training.save()


def _say(training: Training, row: dict[str, float], left: float | None) -> None:
    metrics = {
        name: value
        for name, value in row.items()
        if "accuracy" in name or ("/" in name and "loss/" not in name)
    }
    words = " ".join(
        f"{name.replace('_accuracy', '')} {value:.3f}" for name, value in metrics.items()
    )
    hours = (
        ""
        if left is None
        else f", {left:.1f} CPU h left, loss {row['loss']:.3f}, {row['cpu'] / REPORT:.2f} s/step"
    )
    print(
        f"step {training.done} of {training.plan.steps}{hours}: {words}",
        file=sys.stderr,
        flush=True,
    )


def export(training: Training, folder: Path) -> None:
    """Write the stock folder that Auto classes load, in fp16; the run itself stays as it is."""
    training.parts.llava.set_attn_implementation("sdpa")
    tiny_llava.save(folder, training.parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pages",
        type=Path,
        help="folder of rendered pages, such as train-0; without it sheets only",
    )
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--minutes", type=float, default=10, help="between two checkpoints")
    parser.add_argument(
        "--until", type=int, help="stop at this step; the same command without it goes on"
    )
    parser.add_argument("--export", type=Path, help="write the model there and stop")
    for field in dataclasses.fields(Plan):
        kind = json.loads if field.name == "sizes" else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    options = arguments()
    plan = Plan(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Plan)})
    try:
        training = Training(Run(options.out, plan), options.pages)
        if options.export is not None:
            export(training, options.export)
            return
        work(training, options.minutes, min(plan.steps, options.until or plan.steps))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
