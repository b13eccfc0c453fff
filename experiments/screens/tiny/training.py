"""The two phases of a training and its state, on a CPU or a GPU."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tprl.errors import UserError
from tprl.pretraining import tiny_llava

from .attention import LIGHT
from .blueprint import build, silence
from .feed import Direct, Drawers, mapped, placed
from .optimizing import grown, optimizers, step
from .pace import Pace
from .packs import Packer
from .pages import Item, item, scaled, views
from .reader import Reader
from .readings import Reading, reading
from .run import Meter, Run
from .source import FEW, Source, every_token, letters
from .targets import Targets, targets
from .tower import (
    DenseHeads,
    cls_look,
    dense_terms,
    number_terms,
    present_loss,
    see,
    see_lines,
    text_terms,
    total,
)

TESTED = 32  # pages of a validation
LIMIT = 9_000_000  # parameters


class Training:
    """Both phases.

    Args:
        run: where they are kept.
        pages: the folder of rendered pages, still growing or not; None: sheets only.
        device: "cpu" or "cuda".
        workers: processes that draw pages; 0: the training draws them itself. The run is the same.
    """

    def __init__(self, run: Run, pages: Path | None, device: str = "cpu", workers: int = 0) -> None:
        self.run, self.plan, self.device = run, run.plan, torch.device(device)
        torch.manual_seed(self.plan.seed)
        self.parts = build(**(self.plan.sizes or {}), seed=self.plan.seed)
        _check_size(self.parts.llava)
        self.packer = Packer(self.parts.processor, self.plan.questions)
        self.source = Source(self.plan, pages, self.packer)
        # Before the first tensor is on a GPU: its driver does not survive a fork.
        self.feed = (
            Drawers(self.source, self.device, workers)
            if workers
            else Direct(self.source, self.device)
        )
        for model in (self.parts.llava, self.parts.clip):
            model.set_attn_implementation("sdpa")
            model.to(self.device)
        if self.plan.attention == LIGHT and self.device.type == "cpu":
            self.parts.llava.set_attn_implementation(LIGHT)
        self.heads = DenseHeads(self.parts).to(self.device)
        if self.plan.init:
            self._begin_with(Path(self.plan.init))
        if self.plan.letters:
            silence(self.parts.llava.model.vision_tower, self.heads.middle)
        self.reader = Reader(self.parts)
        self.pace, self.count, self.cpu = Pace(self.plan), len(self.source), 0.0
        self.modules = {"llava": self.parts.llava, "clip": self.parts.clip, "heads": self.heads}
        self.optimizers: list[Optimizer] = []
        self._enter()
        self._resume()
        self.clock = time.monotonic()

    @property
    def done(self) -> int:
        return self.pace.done

    def _begin_with(self, folder: Path) -> None:
        """Weights of a model that `export` wrote."""
        try:
            known = tiny_llava.load(folder)
            self.parts.llava.load_state_dict(known.llava.state_dict())
            self.parts.clip.load_state_dict(known.clip.state_dict())
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--init {folder} holds no model of these sizes ({error}): "
                "give a folder that --export wrote."
            ) from error

    # --- phases ---------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Fresh optimizers at the start of a phase."""
        llava, clip, plan = self.parts.llava, self.parts.clip, self.plan
        projector = llava.model.multi_modal_projector
        if self.pace.tower:
            inner = [llava.model.vision_tower, projector]
            outer = nn.ModuleList([self.heads, llava.get_input_embeddings(), *_clip_heads(clip)])
            extra = nn.ParameterList([clip.logit_scale])
            more = grown(plan.tower_batch)
            self.optimizers = optimizers(
                inner, nn.ModuleList([outer, extra]), more * plan.lr, more * plan.muon
            )
        else:
            inner = [projector, llava.model.language_model]
            more = grown(plan.reader_batch)
            self.optimizers = optimizers(
                inner, nn.ModuleList(), more * plan.reader_lr, more * plan.reader_muon
            )
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]

    def _resume(self) -> None:
        content = self.run.load()
        if content is None:
            return
        state = content["state"]
        self.pace.load(state)
        self.count, self.cpu = state["count"], state["cpu"]
        if self.count > len(self.source):
            raise UserError(
                f"the run used {self.count} pages and there are "
                f"{len(self.source)}: give the folder it used."
            )
        self._enter()
        for name, module in self.modules.items():
            module.load_state_dict(content["modules"][name])
        for optimizer, values in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.run.cut_log(self.done)

    def save(self) -> None:
        state = {**self.pace.state(), "count": self.count, "cpu": self.cpu}
        self.run.save(self.modules, self.optimizers, state)

    def grow(self) -> None:
        """Use pages rendered since; only where a checkpoint is about to be written."""
        count = self.source.grow()
        if count != self.count:
            self.feed.forget()
            self.count = count

    # --- steps ----------------------------------------------------------------------------------

    def advance(self) -> dict[str, Tensor | float]:
        """One step; its losses and rates."""
        if not self.pace.tower:
            self._check_pages()
        batch = self.feed.take(self.pace, self.count)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            if isinstance(batch, Targets):
                terms: dict[str, Tensor | float] = dict(self.tower_terms(batch))
                loss = total(terms)
            else:
                terms = self.read(batch)
                loss = terms["loss/answer"] + terms["loss/look"]
        loss.backward()
        norm = step(self.optimizers, self.pace.rate(), self.parameters)
        now = time.monotonic()
        if self.pace.advance(now - self.clock):
            self._enter()
            if self.plan.minutes:
                self.feed.forget()
        self.clock = now
        return terms | {"loss": loss.detach(), "norm": norm}

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

    def tower_terms(self, asked: Targets) -> dict[str, Tensor]:
        """Terms of the first phase, at first of letters and words alone."""
        return self.spell(asked) if asked.letters else self.look(asked)

    def spell(self, asked: Targets) -> dict[str, Tensor]:
        """Terms of text alone, read by the lower layers."""
        llava, heads = self.parts.llava, self.heads
        features = see_lines(llava.model.vision_tower, scaled(asked.pictures), heads.middle)
        tokens = llava.model.multi_modal_projector(features)
        embedding = llava.get_input_embeddings().weight
        flat = tokens.flatten(0, 1)
        terms = text_terms(heads, tokens, flat, features, embedding, asked)
        return terms | number_terms(heads, flat, asked.numbers)

    def look(self, asked: Targets) -> dict[str, Tensor]:
        """Terms of all that pages show."""
        llava = self.parts.llava
        tower = llava.model.vision_tower
        hidden, between, row = see(tower, scaled(asked.pictures), self.heads.middle)
        tokens = llava.model.multi_modal_projector(hidden[:, 1:])
        terms = dense_terms(self.heads, tokens, between, llava.get_input_embeddings().weight, asked)
        terms["loss/present"] = present_loss(self.heads, hidden[:, 0], asked.name)
        terms["loss/cls_look"] = cls_look(row, asked)
        if asked.captions is not None:
            terms |= self._contrast(hidden, asked.captions)
        return terms

    def _contrast(self, hidden: Tensor, captions: Tensor) -> dict[str, Tensor]:
        """CLIP: the page and a list of names on it belong together; only the last layer learns from
        it."""
        clip, tower = self.parts.clip, self.parts.llava.model.vision_tower
        out = tower.encoder.layers[-1](hidden.detach(), attention_mask=None)
        pooled = tower.post_layernorm((out[0] if isinstance(out, tuple) else out)[:, 0])
        image = nn.functional.normalize(clip.visual_projection(pooled).float(), dim=-1)
        text = clip.text_model(
            input_ids=captions, attention_mask=(captions > 0).long()
        ).pooler_output
        text = nn.functional.normalize(clip.text_projection(text).float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        truth = torch.arange(len(logits), device=logits.device)
        loss = nn.functional.cross_entropy(logits, truth) + nn.functional.cross_entropy(
            logits.T, truth
        )
        return {
            "loss/contrast": loss / 2,
            "contrast_accuracy": (logits.argmax(1) == truth).float().mean(),
        }

    def read(self, asked: Reading) -> dict[str, Tensor | float]:
        """Terms of the second phase; the tower does not learn."""
        with torch.no_grad():
            features = self.features(asked.pictures)
        return self.reader.terms(features, asked)

    def features(self, pictures: Tensor) -> Tensor:
        """What the projector gets of pictures."""
        tower = self.parts.llava.model.vision_tower
        return see(tower, scaled(pictures), self.heads.middle)[0][:, 1:]

    # --- validation -----------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The terms of pages that no step sees, without a shift; nothing where there are too
        few."""
        folder = self.source.folder
        if folder is None or self.count < FEW:
            return {}
        held = folder.held[:TESTED]
        meter = Meter()
        for start in range(0, len(held), 8):
            items = [
                item(*folder.page(at, held=True), 0, 0)
                for at in range(start, min(start + 8, len(held)))
            ]
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                meter.add(self._tested(items, start))
        taken = meter.take()
        return {f"val/{name}": taken[name] for name in taken if name not in ("cpu", "clock")}

    def _tested(self, items: list[Item], start: int) -> dict[str, Any]:
        if self.pace.tower:
            first = letters(self.plan, self.pace.at, self.pace.steps)
            return self.tower_terms(self._placed(targets(views(items), letters=first)))
        pack = self.packer.pack(items, self.plan.seed, start)
        return self.read(self._placed(reading(pack, every_token(pack))))

    def _placed(self, batch: Any) -> Any:
        return mapped(batch, lambda tensor: placed(tensor, self.device))


def _clip_heads(clip: Any) -> list[nn.Module]:
    return [clip.text_model, clip.visual_projection, clip.text_projection]


def _check_size(llava: nn.Module) -> None:
    count = sum(parameter.numel() for parameter in llava.parameters())
    if count > LIMIT:
        raise UserError(
            f"the model has {count:,} parameters, and {LIMIT:,} are allowed: make it smaller."
        )
