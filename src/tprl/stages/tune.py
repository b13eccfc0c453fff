"""Stage `tune`: low-rank adapters (LoRA) on the language model, which learns to read what a pruner
keeps. The pruner stays as it is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Float64
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tprl.budget import check_keep_ratio
from tprl.build import target_at
from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.kinds import LARGEST, Number
from tprl.lvlm.adapters import (
    FOLDER,
    Adapter,
    Pair,
    check_adapter,
    read_adapter,
    write_adapter,
)
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPruner
from tprl.lvlm.recognition import model_print
from tprl.pruners.chunks import select_in_chunks
from tprl.pruners.keep_all import KeepAll
from tprl.pruners.learned import LearnedPruner, check_family, check_width
from tprl.runtime import distributed, memory
from tprl.runtime.finite import check_finite
from tprl.runtime.packages import need_package
from tprl.scoring.ahead import Ready
from tprl.scoring.scorer import LIKELIHOOD, Scorer
from tprl.scoring.validation import ServedScore
from tprl.splice import splice
from tprl.stages.base import Next, Points, Settings, Stage
from tprl.stages.lora import check_form, injected, no_stock, parameters_of
from tprl.stages.prompts import drawn_ratios, prompt_loader, stepwise
from tprl.types import LVLM, Encoded, Prompt, Sample

COUNT = Number(1, LARGEST, whole=True, example="8")


class Tune(Stage):
    """Minimizes -log p(answer | pruned prompt) in the adapters of a frozen LVLM.

    What the language model learns beside reading gaps is the task: the control is the same stage
    with pruner=keep_all, at the same iterations. Validation scores the model pruned and with all
    tokens, because a tuned model also answers whole prompts.

    Args:
        lvlm, dataset: the model and the training split.
        selector: the pruner, learned or not; it chooses before the language model.
        served: the validation score.
        iterations, prompts: training steps, and fresh questions in each.
        keep_ratio: kept fraction, or several (each question draws one).
        answers: "reference", the first one of each question, in the words of the model without
            adapters where the official score calls those right (`Scorer.targets`); "own", what that
            model answers with all tokens (no labels are read).
        rank, alpha: R of the adapters; what they add is scaled by alpha / R.
        projector: whether the modules between tower and language model get adapters too.
        lr: Adam, annealed linearly to 0.
        warmup: share of the iterations in which the rate rises from 0, in [0, 1].
        grad_clip: largest norm of a gradient.
        validate_every: iterations between served scores.
        seed: questions, ratios, and what the adapters start from.
        adapter: what they start from in place of that: one of the same layers, rank and scale.

    Raises:
        UserError: peft is missing, the LVLM has no such layers, the pruner is another model's or
            drops tokens between layers, or the adapter has another form or model.
    """

    curve_titles: ClassVar = {"tune/loss": "tune, nats per answer token"}
    next = Next("eval", "run", words=("pruners=[random]",))
    remembers = ("iteration", "curve")
    keeps_serving = True  # the pruner stays as it is

    def __init__(
        self,
        lvlm: LVLM,
        dataset: BaseDataset,
        selector: Any,
        served: ServedScore,
        iterations: int,
        prompts: int,
        keep_ratio: float | Sequence[float],
        answers: Literal["reference", "own"],
        rank: Annotated[int, COUNT],
        alpha: Annotated[float, Number(0, above=True, example="16")],
        projector: bool,
        lr: float,
        warmup: Annotated[float, Number(0, 1, example="0.05")],
        grad_clip: float,
        validate_every: int,
        seed: int = 0,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["lvlm", "dataset", "selector", "served", "adapter"])
        if not isinstance(lvlm, FrozenLVLM):
            raise no_stock(lvlm.name)
        if isinstance(selector, LayerPruner):
            raise UserError(
                f"stage=tune reads prompts that are pruned before the language model, and "
                f"pruner={selector.name} drops tokens between its layers: use another pruner."
            )
        check_family(selector, lvlm)
        check_width(selector, lvlm.width)
        ratios = [keep_ratio] if isinstance(keep_ratio, float | int) else keep_ratio
        self.lvlm, self.dataset, self.served = lvlm, dataset, served
        self.ratios = [check_keep_ratio(ratio) for ratio in ratios]
        self.max_grad_norm, self.iteration = grad_clip, 0
        self.curve: list[tuple[float, float]] = []
        # Before adapters are in: an adapter belongs to the weights that it was trained on.
        self.base_print = model_print(lvlm.model)
        self.iterations_before = 0
        if adapter is not None:
            check_adapter(adapter, lvlm.model)
            check_form(adapter, "stage", self.hparams)
            self.iterations_before = int(adapter.about.get("iterations", 0))
        self.extras = frozenset(selector.extras)
        if projector:
            lvlm.check_extras(frozenset({"vision_features"}), lvlm.known_extras)
            self.extras |= {"vision_features"}
        # In a tuple, so that neither is registered: of the modules only adapters are trained and
        # kept in checkpoints. These are a list, since names of modules have dots.
        self._held = (injected(lvlm.model, rank, alpha, projector, seed), selector)
        self.names, parameters = zip(*parameters_of(lvlm.model), strict=True)
        self.adapters = nn.ParameterList(parameters)
        if adapter is not None:
            self._go_on_from(adapter)

    @classmethod
    def check(cls, key: str, settings: Settings, plain: Settings) -> None:
        # Said before anything is loaded: in a chain hours of another stage come first.
        model = plain["model"]
        if not issubclass(cast(type, target_at(model["_target_"])), FrozenLVLM):
            raise no_stock(model.get("name"))
        need_package("peft", "tune", "stage=tune")
        # A second adapter over merged weights would be of use to nobody who loads one.
        if adapter := model.get("adapter"):
            raise UserError(
                f"stage=tune trains one adapter, and model.adapter={adapter} is another below it: "
                f"leave model.adapter out, and give stage.init_from={adapter} to go on from it."
            )
        source = plain["stage"].get("init_from")
        if source and (key == "stage" or (Path(source) / FOLDER).is_dir()):
            check_form(read_adapter(source), key, settings)

    @classmethod
    def reads_answers(cls, reward: Any, settings: Settings) -> bool:
        return settings["answers"] == "reference"

    def _go_on_from(self, adapter: Adapter) -> None:
        """Start from these weights."""
        missing = {name.rpartition(".lora_")[0] for name in self.names} ^ set(adapter.pairs)
        if missing:
            self.take_off()
            raise UserError(
                f"{adapter.folder} adapts other layers than stage=tune ({min(missing)}): go on "
                "from a run of stage=tune, or leave stage.init_from out."
            )
        with torch.no_grad():
            for name, parameter in zip(self.names, self.adapters, strict=True):
                module, _, side = name.removesuffix(".default.weight").rpartition(".lora_")
                parameter.copy_(adapter.pairs[module]["AB".index(side)])

    @property
    def lora(self) -> Any:
        """What peft has made of the model."""
        return self._held[0]

    @property
    def selector(self) -> Any:
        """The pruner."""
        return self._held[1]

    @property
    def samples_seen(self) -> int:
        """Questions read so far, on all ranks."""
        return self.iteration * self.hparams["prompts"]

    @property
    def result(self) -> float | None:
        """Accuracy on validation after the last step, pruned."""
        return self.curve[-1][1] if self.curve else None

    @property
    def curves_of_report(self) -> dict[str, Points]:
        return {"tune, accuracy: served": self.curve}

    def train_dataloader(self) -> DataLoader[Ready]:
        return prompt_loader(self.lvlm, self.dataset, self.hparams, self.iteration)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        h = self.hparams
        optimizer = torch.optim.Adam(self.adapters, lr=h["lr"])
        # Up over the warm-up and down to 0 at the end: the smaller of two lines.
        total = h["iterations"]
        warm = max(1, round(h["warmup"] * total))

        def rate(step: int) -> float:
            return min((step + 1) / warm, max(0.0, 1 - step / total))

        return stepwise(optimizer, rate)

    def training_step(self, batch: Ready, index: int) -> Tensor:
        h, samples = self.hparams, batch.samples
        if self.iteration % h["validate_every"] == 0:
            self._validate()
        encoded = batch.encode_in_parts(self.lvlm, self.extras)
        ratio = drawn_ratios(self.ratios, samples, h["seed"], self.iteration)
        answers = self._answers(samples, encoded)
        # One sum over all ratios, divided once: a ratio weighs as much as its questions.
        total = encoded.embeds.new_zeros(())
        for rows, prompt in self._prompts(encoded, ratio):
            log_prob = self._log_prob(prompt, [answers[row] for row in rows])
            uids = [encoded.uids[row] for row in rows]
            check_finite({"tune/loss": -log_prob}, uids, f"iteration {self.iteration}")
            total = total - log_prob.sum()
        loss = total / len(samples)
        self.log("tune/loss", loss, sync_dist=True)
        self.iteration += 1
        self.log("samples_seen", float(self.samples_seen))
        return loss

    def _answers(self, samples: Sequence[Sample], encoded: Encoded) -> list[str]:
        """What the model is to say."""
        # By the model without adapters: otherwise it would imitate its own drift.
        self.lora.disable_adapter_layers()
        try:
            # Without memory of earlier ones: every question of the stream is new.
            scorer = Scorer(self.lvlm, self.dataset, LIKELIHOOD)
            if self.hparams["answers"] == "reference":
                return scorer.targets(samples, encoded)
            return list(scorer.texts(encoded))
        finally:
            self.lora.enable_adapter_layers()

    def _prompts(
        self, encoded: Encoded, ratio: Float64[Tensor, " B"]
    ) -> Iterator[tuple[list[int], Prompt]]:
        """The rows of each ratio, and their pruned prompts."""
        for value in sorted(set(ratio.tolist())):
            rows = (ratio == value).nonzero().squeeze(1).tolist()
            part = encoded.rows(rows)
            # The choice is not trained; gradients reach the tokens that it keeps.
            with torch.no_grad():
                selection = select_in_chunks(
                    self.selector, part, value, memory.working_bytes(self.lvlm)
                )
            yield rows, splice(self._projected(part), selection)

    def _projected(self, part: Encoded) -> Encoded:
        """The batch with visual tokens that carry the projector's gradient, if it has adapters."""
        if not self.hparams["projector"]:
            return part
        tokens = self.lvlm.project(part.extras["vision_features"])
        row, token = part.visual_mask.nonzero(as_tuple=True)
        # Padded tokens name column 0: they are left out, or they would overwrite a word.
        at = (row, part.visual_at[row, token])
        embeds = part.embeds.index_put(at, tokens[row, token].to(part.embeds.dtype))
        return replace(part, embeds=embeds)

    def _log_prob(self, prompt: Prompt, answers: Sequence[str]) -> Float[Tensor, " R"]:
        """Of the answers. Beyond the LVLM's micro-batch only one part's graph is in memory at a
        time: each is computed again in the backward pass."""
        size = self.lvlm.micro_batch
        if len(answers) <= size:
            return self.lvlm.taught_log_prob(prompt, answers)
        parts: list[Tensor] = []
        for rows in torch.arange(len(answers), device=prompt.embeds.device).split(size):
            texts = [answers[row] for row in rows.tolist()]
            read: Callable[..., Any] = self.lvlm.taught_log_prob
            parts.append(checkpoint(read, prompt.rows(rows), texts, use_reentrant=False))
        return torch.cat(parts)

    # --- validation -------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """A run that was stopped between its last step and the last score makes up for the
        score."""
        if self.iteration == self.hparams["iterations"]:
            self._validate()

    def on_train_epoch_end(self) -> None:
        self._validate()

    def _validate(self) -> None:
        if self.hparams["projector"]:  # what was encoded before has another projector's tokens
            self.served.encode_again()
        # Whole prompts too: an adapter that only helps pruned ones would show here.
        scores = {"served": self.served(self.selector), "full": self.served(KeepAll(), [1.0])}
        for name, score in scores.items():
            self.log_dict({f"tune/{name}/{key}": value for key, value in score.items()})
        self.log("tune/served", scores["served"]["accuracy"], prog_bar=True)
        self.log("samples_seen", float(self.samples_seen))
        self.curve.append((float(self.samples_seen), scores["served"]["accuracy"]))

    # --- what it leaves ---------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """The adapter, in `adapter/`, and a copy of a learned pruner beside it, by rank 0; when it
        returns they are there for all."""
        if distributed.rank() == 0:
            self._write(directory)
        distributed.barrier()

    def _write(self, directory: Path) -> None:
        h = self.hparams
        pairs: dict[str, dict[str, Tensor]] = {}
        for name, parameter in zip(self.names, self.adapters, strict=True):
            # peft's <module>.lora_A.default.weight, and B: one pair of each module
            module, _, side = name.removesuffix(".default.weight").rpartition(".lora_")
            pairs.setdefault(module, {})[side] = parameter
        about = {
            "print": self.base_print,
            "model": self.lvlm.name,
            "family": self.lvlm.model_type,
            "dataset": self.dataset.name,
            "pruner": self.selector.name,
            "keep_ratio": self.ratios,
            "answers": h["answers"],
            "iterations": self.iterations_before + h["iterations"],
            "seed": h["seed"],
        }
        both = {name: Pair(sides["A"], sides["B"]) for name, sides in pairs.items()}
        write_adapter(directory / FOLDER, both, self._peft_config(), about)
        if isinstance(self.selector, LearnedPruner):
            self.selector.save_pretrained(directory / "pruner")

    def _peft_config(self) -> dict[str, Any]:
        """As peft writes it, with sets in order."""
        config = self.lora.peft_config["default"].to_dict()
        plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
        return {**plain, "inference_mode": True}

    def take_off(self) -> None:
        """Give the model back as it was before this stage."""
        self.lora.unload()
