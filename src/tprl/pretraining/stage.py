"""Stage `pretrain`: train the embedded LVLM from nothing.

First the vision tower: every patch must tell, through the projector, which object it shows and
where that object's box is, and CLS must match a caption (contrastive, as in CLIP). Then, on the
frozen tower, the projector and the language model: captions that name every object with its box
teach reading, questions follow. On most steps a random 8-100 % of the visual tokens is all the
language model gets (at their original positions), because a model that never saw tokens missing
punishes every pruner for its own brittleness.
"""

from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tprl.build import build
from tprl.data import scenes
from tprl.errors import UserError
from tprl.lvlm.loading import find_model
from tprl.pretraining import tiny_llava
from tprl.pretraining.looking import Looking, cls_look, next_look
from tprl.pretraining.losses import outside_loss, soft_cross_entropy
from tprl.pretraining.optimizing import two_phase_optimizer
from tprl.pretraining.packing import IGNORE, Pack, PackStream
from tprl.pretraining.reading import read_packed
from tprl.pretraining.tiny_llava import TinyLlava
from tprl.runtime import distributed, signals
from tprl.stages.base import Next, Settings, Stage

# Classes of color, shape and size of a patch, each with one for the background.
PATCH_CLASSES = [1 + len(scenes.COLORS), 1 + len(scenes.SHAPES), 1 + len(scenes.SIZES)]


class Pretrain(Stage):
    """Trains a `TinyLlava`.

    Args:
        parts: freshly built models.
        vision_steps, language_steps: optimizer steps of the two phases.
        vision_batch, language_batch: images per step.
        caption_steps: the first steps of the language phase, in which every image is also
            described.
        lr_vision, lr_language: peak learning rates (AdamW, warm-up then cosine, per phase).
        cls_look_weight: of the term that makes CLS attention, where the features come from, see
            every object.
        look_weight: of the term that tells two layers of the language model where to look
            (`looking`).
        full_share: share of the language steps that see all visual tokens.
        keep_low: smallest kept fraction of the other steps, reached linearly over the first third
            of the phase.
        object_share: share of the samples whose dropout prefers object patches.
        prefer: what these samples keep rather: "objects", all of them, or "regions", those that
            decide a question of theirs. With 40 objects and 8 tokens hardly any question could be
            answered otherwise.
        next_weight: of the term that makes a patch look at the object nearest to its own, and tell
            its color and shape.
        conjunction: see `Looking`.
        caption_every: after `caption_steps`, one step in so many describes its images; 0: none.
        compile: the language model's layers but the two whose attention is read; needs a C++
            compiler, and on our CPU took a fifth off a step.
        workers: processes that make data; 0 makes it between steps, no slower where the cores are
            two.
        world: "scenes" or "crowd".
        seed: data and token dropout; with the step number it decides everything, so a resumed run
            is exact.
    """

    epochs = -1  # as many as `max_steps` need
    next = Next("train", "model.pretrained", folder="model")

    def __init__(
        self,
        parts: TinyLlava,
        vision_steps: int,
        language_steps: int,
        vision_batch: int,
        language_batch: int,
        questions: int,
        caption_steps: int,
        lr_vision: float,
        lr_language: float,
        cls_look_weight: float,
        look_weight: float,
        full_share: float,
        keep_low: float,
        object_share: float,
        prefer: Literal["objects", "regions"],
        next_weight: float,
        conjunction: bool,
        caption_every: int,
        compile: bool,
        workers: int,
        world: Literal["scenes", "crowd"],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["parts"])
        self.parts, self.max_steps = parts, vision_steps + language_steps
        self.llava, self.clip = parts.llava, parts.clip
        for model in (self.llava, self.clip):
            # on CPU the backward pass of SDPA takes twice the time of eager
            model.set_attn_implementation("eager")
        config: Any = parts.llava.config
        width, vision = config.text_config.hidden_size, config.vision_config
        self.patch, self.tower_width = vision.patch_size, vision.hidden_size
        # Linear readers of the tokens, of this stage only; class 0 of each label is background.
        self.patch_head = nn.Linear(width, sum(PATCH_CLASSES))
        self.side = vision.image_size
        self.next_head = nn.Linear(width, sum(PATCH_CLASSES[:2]))
        self.box_head = nn.Linear(width, 4 * (self.side + 1))
        self.edge_head = nn.Linear(width, 4)
        self.cls_head = nn.Linear(vision.hidden_size, len(scenes.COLORS) * len(scenes.SHAPES))
        layers = parts.llava.model.language_model.layers
        if len(layers) < 2 or config.text_config.num_attention_heads < 2:
            raise UserError(
                f"a language model needs two layers and two heads to learn where to look, got "
                f"{len(layers)} and {config.text_config.num_attention_heads}: use two or more."
            )
        self.looking = slice(len(layers) // 2 - 1, len(layers) // 2 + 1)
        if compile:
            for layer in {*layers} - {*layers[self.looking]}:
                layer.compile(dynamic=True)
        self.consumed = 0
        self.numbers: Tensor
        digits = [str(i) for i in range(self.side + 1)]
        numbers = parts.processor.tokenizer.convert_tokens_to_ids(digits)
        self.register_buffer("numbers", torch.tensor(numbers), persistent=False)
        self.world = tiny_llava.WORLDS[world]
        self.look = Looking(parts.processor.tokenizer, self.world.families, conjunction)

    # --- what its runner does around it -----------------------------------------------------------

    @classmethod
    def check(cls, key: str, settings: Settings, plain: Settings) -> None:
        model = plain["model"].get("name")
        if model != "tiny_llava":
            raise UserError(
                f"stage=pretrain trains the embedded LVLM, not {model}: use model=tiny_llava."
            )

    @classmethod
    def own_arguments(cls, settings: Settings, seed: int) -> dict[str, Any]:
        """The models: those of `init_from`, or new ones by `blueprint`."""
        source = settings["init_from"]
        # One process: the stage shares out neither packs nor losses.
        if distributed.count() > 1:
            raise UserError(
                "stage=pretrain runs in one process, not in "
                f"{distributed.count()}: leave trainer=ddp out."
            )
        fresh = build(settings["blueprint"], world=settings["world"], seed=seed)
        if not source:
            return {"parts": fresh}
        folder = find_model(source)
        if not (folder / "clip").is_dir():
            raise UserError(
                f"stage.init_from={source} holds no model written by stage=pretrain (no clip/ in "
                "it): give the model/ of such a run."
            )
        loaded = tiny_llava.load(folder)
        # A model of another world has other words: its weights are carried over by word.
        same = loaded.processor.tokenizer.get_vocab() == fresh.processor.tokenizer.get_vocab()
        return {"parts": loaded if same else tiny_llava.carried_over(loaded, fresh)}

    def save(self, directory: Path) -> None:
        """The model, in `model/`."""
        tiny_llava.save(directory / "model", self.parts)

    # --- data -------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Pack]:
        h = self.hparams
        stream = PackStream(
            self.parts.processor,
            start=self.consumed,
            stop=h["vision_steps"] + h["language_steps"],
            patch=self.patch,
            text_from=h["vision_steps"],
            caption_until=h["vision_steps"] + h["caption_steps"],
            vision_batch=h["vision_batch"],
            language_batch=h["language_batch"],
            questions=h["questions"],
            seed=h["seed"],
            world=self.world,
            caption_every=h["caption_every"],
        )
        workers = {"num_workers": h["workers"], "worker_init_fn": signals.ignore}
        ahead = 4 if h["workers"] else None
        return DataLoader(stream, batch_size=None, prefetch_factor=ahead, **workers)

    # --- optimization -----------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        h, llava, clip = self.hparams, self.llava, self.clip
        first = [llava.model.vision_tower, clip.text_model]
        first += [clip.visual_projection, clip.text_projection]
        # Everything that reads the tower learns with it; the contrastive scale is a bare parameter.
        tower = list(chain.from_iterable(module.parameters() for module in first))
        tower.append(clip.logit_scale)
        for head in (self.cls_head, self.box_head, self.edge_head, self.patch_head, self.next_head):
            tower += head.parameters()
        return two_phase_optimizer(
            tower,
            list(llava.model.multi_modal_projector.parameters()),
            [*llava.model.language_model.parameters(), *llava.lm_head.parameters()],
            (h["lr_vision"], h["lr_language"]),
            (h["vision_steps"], h["language_steps"]),
        )

    @property
    def samples_seen(self) -> int:
        """Images shown so far."""
        h, vision = self.hparams, min(self.consumed, self.hparams["vision_steps"])
        return vision * h["vision_batch"] + (self.consumed - vision) * h["language_batch"]

    def training_step(self, pack: Pack, index: int) -> Tensor:
        self.consumed = pack.step + 1
        first_phase = pack.step < self.hparams["vision_steps"]
        terms = self._vision_terms(pack) if first_phase else self._language_terms(pack)
        # Terms named loss/... are trained on; the others are only logged.
        losses = [value for name, value in terms.items() if name.startswith("loss/")]
        loss = torch.stack(losses).sum()
        metrics = {f"pretrain/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(metrics, batch_size=len(pack.pixels))
        self.log("samples_seen", float(self.samples_seen))
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["consumed"] = self.consumed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.consumed = checkpoint["consumed"]

    # --- phase 1: the vision tower ----------------------------------------------------------------

    def _vision_terms(self, pack: Pack) -> dict[str, Tensor]:
        tower = self.llava.model.vision_tower
        # CLS attention of the layer that makes the features, where baselines read it.
        weights: list[Tensor] = []
        hook = tower.encoder.layers[-2].self_attn.register_forward_hook(
            lambda m, i, output: weights.append(output[1])
        )
        out = tower(pack.pixels, output_hidden_states=True)
        hook.remove()
        features = out.hidden_states[-2]
        tokens = self.llava.model.multi_modal_projector(features[:, 1:])
        # What every patch shows, what CLS looks at, and what it sees.
        terms = self._patch_terms(tokens.float(), pack)
        present = self.cls_head(features[:, 0]).float()
        terms["loss/cls_look"] = self.hparams["cls_look_weight"] * cls_look(weights[0], pack.owner)
        if self.hparams["next_weight"]:
            look, terms["next_mass"] = next_look(weights[0], pack.owner, pack.next)
            terms["loss/next_look"] = self.hparams["next_weight"] * look
        terms["loss/cls"] = F.binary_cross_entropy_with_logits(present, pack.present)
        # Contrastive, as in CLIP: images and captions of the batch find each other.
        image = F.normalize(self.clip.visual_projection(out.pooler_output).float(), dim=-1)
        out = self.clip.text_model(input_ids=pack.caption, attention_mask=pack.caption > 0)
        text = F.normalize(self.clip.text_projection(out.pooler_output).float(), dim=-1)
        logits = self.clip.logit_scale.exp().clamp(max=100) * image @ text.T
        truth = torch.arange(len(logits), device=logits.device)
        both = F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
        terms["loss/contrastive"] = 0.1 * both / 2
        terms["contrastive_accuracy"] = (logits.argmax(1) == truth).float().mean()
        return terms

    def _patch_terms(self, tokens: Float[Tensor, "B N D"], pack: Pack) -> dict[str, Tensor]:
        """What and where every patch shows, read linearly off the projected tokens."""
        terms: dict[str, Tensor] = {}
        right = torch.ones_like(pack.owner, dtype=torch.bool)
        # Most patches are background: each counts a fifth of a patch on an object.
        front = pack.owner > 0
        weight = torch.where(front, 1.0, 0.2)
        labels = {"color": pack.color, "shape": pack.shape, "size": pack.size}
        heads = self.patch_head(tokens).float().split(PATCH_CLASSES, -1)
        for (name, label), logits in zip(labels.items(), heads, strict=True):
            loss = F.cross_entropy(logits.mT, label, reduction="none")
            terms[f"loss/{name}"] = (loss * weight).sum() / weight.sum()
            right &= logits.argmax(-1) == label
        if self.hparams["next_weight"]:
            beside = self._next_term(tokens[front], pack, front)
            terms["loss/next"] = self.hparams["next_weight"] * beside
        edges = self.box_head(tokens[front]).float().unflatten(-1, (4, -1))
        terms["loss/box"] = 0.5 * soft_cross_entropy(edges, pack.box[front])
        # Regression finds where things are within a hundred steps; the 97 classes alone had not
        # after 250.
        corners = self.edge_head(tokens[front]).float()
        distance = F.smooth_l1_loss(corners, pack.box[front] / self.side, beta=0.05)
        terms["loss/edge"] = 5 * distance
        terms["patch_accuracy"] = right[front].float().mean()
        terms["box_error"] = (edges.argmax(-1) - pack.box[front]).abs().float().mean()
        return terms

    def _next_term(
        self, tokens: Float[Tensor, "M D"], pack: Pack, front: Bool[Tensor, "B N"]
    ) -> Tensor:
        """What stands next to a patch's object, read linearly off its projected token."""
        color, shape = self.next_head(tokens).float().split(PATCH_CLASSES[:2], -1)
        color_loss = F.cross_entropy(color, pack.next_color[front])
        return color_loss + F.cross_entropy(shape, pack.next_shape[front])

    # --- phase 2: the language model --------------------------------------------------------------

    def _language_terms(self, pack: Pack) -> dict[str, Tensor]:
        with torch.no_grad():
            out = self.llava.model.vision_tower(pack.pixels, output_hidden_states=True)
        features = out.hidden_states[-2][:, 1:]  # [B N C] without CLS
        # [B K] the tokens that the language model gets in this step.
        front = pack.region.any(1) if self.hparams["prefer"] == "regions" else pack.owner > 0
        kept = self.kept_tokens(pack.step, front)
        total, width = features.shape[1:]
        left = features.gather(1, kept.unsqueeze(-1).expand(-1, -1, width))
        tokens = self.llava.model.multi_modal_projector(left)
        hidden, attention = read_packed(self.parts, self.looking, tokens, kept, pack, total)
        # [M] all columns of the batch that predict a token of an answer.
        rows = pack.target != IGNORE
        logits = self.llava.lm_head(hidden[rows]).float()
        target, boxed = pack.target[rows], pack.is_box[rows]
        loss = F.cross_entropy(logits, target, reduction="none")
        # Coordinates: any number at all, and among the numbers one that is near.
        index = torch.searchsorted(self.numbers, target[boxed])
        near = soft_cross_entropy(logits[boxed][:, self.numbers], index, reduction="none")
        loss = loss.masked_scatter(boxed, near + outside_loss(logits[boxed], self.numbers))
        right = logits.argmax(-1) == target
        # Every question weighs the same: a box has five tokens to predict, a number two.
        length = loss.new_zeros(pack.region.shape[:2])
        length = length.scatter_add(1, pack.segment, rows.to(loss.dtype))
        weight = 1 / length.gather(1, pack.segment)[rows]
        terms = {
            "loss/answer": (weight * loss).sum() / weight.sum(),
            "kept": torch.tensor(kept.shape[1] / total),
        }
        look, terms["attention_mass"] = self.look(*attention, kept, pack)
        terms["loss/look"] = self.hparams["look_weight"] * look
        # Accuracy by family, without the end token, which says nothing of the answer.
        name = "full_accuracy" if kept.shape[1] == total else "pruned_accuracy"
        word = target != self.llava.generation_config.eos_token_id
        for number, family in enumerate((*self.world.families, "caption")):
            chosen = (pack.family[rows] == number) & word
            if bool(chosen.any()):
                terms[f"{name}/{family}"] = right[chosen].float().mean()
        return terms

    def kept_tokens(self, step: int, front: Bool[Tensor, "B N"]) -> Int[Tensor, "B K"]:
        """Raster-ordered indices of the visual tokens that this step's language model gets.

        A share of `object_share` of the samples prefers object patches (`front`), each by a
        strength of its own: under uniform dropout alone the share of object tokens tells their
        number, and the model learns to count by it.
        """
        h = self.hparams
        # From (seed, step) alone: a resumed run drops the same tokens.
        generator = torch.Generator().manual_seed(h["seed"] * 1_000_003 + step)
        done = (step - h["vision_steps"]) / max(1, h["language_steps"])
        low = 0.4 + (h["keep_low"] - 0.4) * min(1.0, 3 * done)
        full = torch.rand((), generator=generator) < h["full_share"]
        # Log-uniform: drawn uniformly, a ninth or less came so rarely that the model miscounted
        # objects it was shown.
        share = low ** float(torch.rand((), generator=generator))
        count = front.shape[1] if full else max(1, round(share * front.shape[1]))
        chance = torch.rand(front.shape, generator=generator)
        strength, prefers = torch.rand(2, len(front), 1, generator=generator)
        # Object patches sort earlier by up to their sample's strength.
        chance = chance - strength * (prefers < h["object_share"]) * front.cpu()
        return chance.argsort(1)[:, :count].sort(1).values.to(self.device)
