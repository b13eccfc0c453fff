"""What every trained pruner shares: codes of the tokens, logits from a network, a way to serve
them, and a folder."""

import inspect
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor, nn

from tprl import cost
from tprl.budget import check_keep_ratio, need_ratio
from tprl.build import target_at
from tprl.errors import UserError
from tprl.policy.action import Select, serve
from tprl.policy.autoencoder import Autoencoder
from tprl.policy.dpp import unit_features
from tprl.policy.networks import PolicyInput, places
from tprl.pruners.base import BasePruner
from tprl.pruners.card import model_card
from tprl.pruners.folder import (
    CARD,
    CONFIG,
    WEIGHTS,
    copy_calibrations,
    find_pruner,
    load_weights,
    read_config,
)
from tprl.pruners.serving import Serving, uniforms
from tprl.runtime import distributed, hub
from tprl.runtime.files import write_atomically, write_sealed
from tprl.runtime.finite import check_logits
from tprl.types import Encoded, TokenSelection

# What folders without `_target_` (0.1) name by `pruner`.
BEFORE_TARGETS = {"tprl": "tprl.pruners.tprl.TPRL", "mlp": "tprl.pruners.mlp.MLPPruner"}


class LearnedPruner(nn.Module, BasePruner, ABC):
    """A network over token codes that prunes in one forward pass.

    Subclasses set `name`, `config` (their constructor arguments, for `config.json`), `net_flops`
    and `net`, called as net(x, alive, step, keep_ratio) -> (logits [B V], value [B]). The codes
    feed the network only: the language model always reads the original tokens.

    Args:
        token_width: D, width of the LVLM's projected tokens.
        code_width: Z; 0 feeds the tokens themselves (no autoencoder).
        hidden: width of the autoencoder's hidden layer.
        select, tau, quality, trained_to, fade, prices, kernel: see `Serving`.
        trained_on: what the pruner belongs to (LVLM, dataset, budgets, ...); stored with the
            weights.
    """

    name = "learned"
    extras: frozenset[str] = frozenset()
    # whether stage=adapt can teach it how many tokens a question needs (`TPRL.learn_budgets`)
    learns_budgets = False
    reads_question = True  # whether its choice depends on the question
    folder: Path | None = None  # where it was loaded from; its calibrations lie there
    net: Any  # a module; subclasses say which
    config: dict[str, Any]

    def __init__(
        self,
        token_width: int,
        code_width: int = 64,
        hidden: int = 512,
        select: str = "dpp",
        tau: float | None = None,
        quality: float = 2.0,
        trained_to: float = 1.0,
        fade: float = 0.0,
        prices: Sequence[Sequence[float]] = (),
        kernel: str = "codes",
        trained_on: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.token_width = token_width
        self.autoencoder = Autoencoder(token_width, code_width, hidden) if code_width else None
        self.serving = Serving(select, tau, quality, trained_to, fade, prices, kernel)
        self.trained_on = dict(trained_on or {})

    def observe(self, encoded: Encoded) -> PolicyInput:
        """What the network sees of a batch.

        Raises:
            UserError: the LVLM's tokens are not as wide as those this pruner was trained on.
        """
        self.to(encoded.embeds.device)  # a pruner goes where its LVLM is
        check_width(self, encoded.embeds.shape[-1])
        tokens = encoded.visual.float()
        # Codes feed the network only; the language model reads the tokens themselves.
        codes = tokens if self.autoencoder is None else self.autoencoder.encode(tokens)
        query, query_mask = encoded.words
        x = PolicyInput(
            codes=codes.detach(),
            xy=places(encoded),
            mask=encoded.visual_mask,
            query=query.float(),
            query_mask=query_mask,
            image=encoded.image_of,
            sizes=tuple(sample.images for sample in encoded.counts),
        )
        return x._replace(features=self._features(x, tokens))

    def _features(
        self, x: PolicyInput, tokens: Float[Tensor, "B V D"]
    ) -> Float[Tensor, "B V Z"] | None:
        """What the diversity kernel is made of; None where no DPP selects."""
        if self.serving.select != "dpp":
            return None
        return unit_features(x.codes if self.serving.kernel == "codes" else tokens, x.mask)

    @property
    def decides_alone(self) -> bool:
        """Whether it has a threshold."""
        return self.serving.tau is not None

    @torch.no_grad()
    def logits(self, x: PolicyInput, keep_ratio: float) -> Float[Tensor, "B V"]:
        """One forward pass on the unpruned state."""
        ratio = torch.full((len(x.mask),), keep_ratio, dtype=torch.float64, device=x.mask.device)
        training = self.training
        self.eval()
        out = self.net(x, x.mask, 0, ratio)[0]
        self.train(training)
        return out

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image; with None, those above the calibrated
        threshold.

        Raises:
            UserError: wrong width, a ratio outside (0, 1], logits that are not finite, or no
                threshold calibrated.
        """
        x = self.observe(encoded)
        if keep_ratio is None:
            return TokenSelection(self._above_threshold(x, encoded.uids))
        ratio = check_keep_ratio(keep_ratio)
        return TokenSelection(self.serve(x, self.logits(x, ratio), ratio, encoded.uids))

    def complete(
        self, encoded: Encoded, keep_ratio: float | None, core: Bool[Tensor, "B V"]
    ) -> TokenSelection:
        """Keep the `core`, and of the other tokens those that add most to it, up to
        `budget(keep_ratio, n)` of each image. Raises as `select` does."""
        x, ratio = self.observe(encoded), need_ratio(self.name, keep_ratio)
        logits = self.logits(x, ratio)
        return TokenSelection(self.serve(x, logits, ratio, encoded.uids, core))

    def serve(
        self,
        x: PolicyInput,
        logits: Float[Tensor, "B V"],
        keep_ratio: float,
        uids: Sequence[str],
        core: Bool[Tensor, "B V"] | None = None,
    ) -> Bool[Tensor, "B V"]:
        """The kept set for given logits; the `core` is in it whatever its logits."""
        check_logits(self.name, logits, x.mask, uids)
        # Budgets are per image: [B V] -> [I W] and back.
        images, how = x.images, self.serving
        noise = None
        if how.select == "gumbel":
            noise = images.split(uniforms(uids, 0, x.mask.shape[1]).to(logits.device))
        if how.select == "threshold" and how.tau is None:
            raise UserError(
                f"pruner {self.name} selects by a threshold it "
                "does not have: set policy.tau or another select."
            )
        # The ratio decides the weight of relevance, too (`Serving.fade`).
        select: Select = how.select  # type: ignore[assignment]
        keep = serve(
            images.split(logits),
            images.mask,
            images.kept(keep_ratio),
            select,
            features=None if x.features is None else images.split(x.features),
            tau=how.tau,
            noise=noise,
            quality=how.quality_at(keep_ratio),
            start=None if core is None else images.split(core) & images.mask,
        )
        return images.join(keep, x.mask)

    def _above_threshold(self, x: PolicyInput, uids: Sequence[str]) -> Bool[Tensor, "B V"]:
        if self.serving.tau is None or "threshold_ratio" not in self.trained_on:
            raise UserError(
                f"pruner {self.name} has no threshold: give a "
                "keep_ratio, or calibrate one by stage=ppo."
            )
        # The network reads a ratio; the threshold was calibrated at this one.
        reference = float(self.trained_on["threshold_ratio"])
        images, chances = x.images, self.logits(x, reference)
        check_logits(self.name, chances, x.mask, uids)
        keep = serve(images.split(chances), images.mask, None, "threshold", tau=self.serving.tau)
        return images.join(keep, x.mask)

    @torch.no_grad()
    def calibrate(self, encoded: Iterable[Encoded], keep_ratio: float) -> float:
        """Set the threshold at which the mean kept fraction on held-out batches is `keep_ratio`;
        returns it."""
        scores = []
        for batch in encoded:
            x = self.observe(batch)
            scores.append(self.logits(x, keep_ratio)[x.mask].sigmoid())
        # The quantile over the tokens of all ranks: every rank gets the same threshold.
        tau = float(distributed.gathered_rows(torch.cat(scores)).quantile(1 - keep_ratio))
        self.serving = replace(self.serving, tau=tau)
        self.trained_on["threshold_ratio"] = keep_ratio
        return tau

    def flops_by_part(self, tokens: int, words: int, kept: int) -> dict[str, int]:
        """What choosing costs on one sample: codes, one pass of the network, and the kernel where a
        DPP selects."""
        c, parts = self.config, self.net_flops(tokens, words)
        # Codes are made once per token, the kernel on the width that it compares.
        if c["code_width"]:
            parts["autoencoder"] = cost.autoencoder_flops(
                c["token_width"], c["hidden"], c["code_width"], tokens
            )
        if self.serving.select == "dpp":
            width = c["code_width"] or c["token_width"]
            if self.serving.kernel != "codes":
                width = c["token_width"]
            parts["dpp"] = cost.greedy_flops(tokens, width, kept)
        return parts

    @abstractmethod
    def net_flops(self, tokens: int, words: int) -> dict[str, int]:
        """FLOPs of one pass of `net` on one sample, named by part."""

    def train_only(self, part: str, without: str | tuple[str, ...] = ()) -> None:
        """Let gradients reach only the parameters named `part`..., except those named `without`...

        Under DDP a parameter that requires a gradient and never gets one stops every rank.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(part) and not name.startswith(without))

    # --- folder -----------------------------------------------------------------------------------

    @staticmethod
    def from_pretrained(pretrained: str | Path, revision: str | None = None) -> "LearnedPruner":
        """A trained pruner from a folder, a run directory, the name of one that ships, or a hub id.

        Raises:
            UserError: nothing there, damaged, or of a kind this version does not know.
        """
        return load_pruner(pretrained, revision)

    @property
    def about(self) -> dict[str, Any]:
        """What `config.json` holds: all but the weights."""
        kind = type(self)
        target = {"_target_": f"{kind.__module__}.{kind.__qualname__}", "pruner": self.name}
        return {**target, **self.config, **asdict(self.serving), "trained_on": self.trained_on}

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write `model.safetensors` (fp16 if `half`), `config.json`, a model card, and the
        calibrations of the folder that it was loaded from; each complete or not at all.

        The weights come first: older settings leave out what newer weights have, the reverse could
        not be loaded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().contiguous().cpu() for key, value in self.state_dict().items()}
        # Buffers of integers keep their type.
        if half:
            state = {
                key: value.half() if value.is_floating_point() else value
                for key, value in state.items()
            }
        write_sealed(folder / WEIGHTS, save(state))
        write_sealed(folder / CONFIG, json.dumps(self.about, indent=1) + "\n")
        write_atomically(folder / CARD, model_card(self.name, self.trained_on, str(folder)))
        if self.folder is not None:
            copy_calibrations(self.folder, folder, _same_pruner)

    def push_to_hub(self, repo: str, private: bool = False, token: str | None = None) -> str:
        """Write what `save_pretrained` writes to a model repository on the hub; returns its
        address.

        Raises:
            UserError: the hub is out of reach, or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / CARD).write_text(model_card(self.name, self.trained_on, repo))
            return hub.push(Path(folder), repo, private, token)


def check_family(pruner: Any, lvlm: Any) -> None:
    """Refuse a pruner that was trained for an LVLM of another family; widths may be equal by
    chance.

    Raises:
        UserError: it was.
    """
    about = pruner.trained_on
    family, model_family = about.get("family"), lvlm.model_type
    if family is not None and model_family and family != model_family:
        raise UserError(
            f"pruner {pruner.name} was trained for a {family} ({about.get('model')}), "
            f"and this model is a {model_family}: train one for it with "
            "`python -m src.train stage=all model=...`."
        )


def check_width(pruner: Any, width: int, lvlm: str = "this LVLM") -> None:
    """Refuse a pruner that was trained on tokens of another width; one without weights reads any.

    Args:
        pruner: a policy, what wraps one, or a method without weights.
        width: D, of the LVLM's projected tokens.
        lvlm: how the LVLM is called.

    Raises:
        UserError: it was.
    """
    read = pruner.learned.token_width
    if read not in (None, width):
        raise UserError(
            f"pruner {pruner.name} reads tokens of width {read}, and those of {lvlm} have "
            f"{width}: train one for it with `python -m src.train stage=all model=...`."
        )


def load_pruner(pretrained: str | Path, revision: str | None = None) -> LearnedPruner:
    """A trained pruner from a folder, from a run directory (its `pruner/`), from the hub, or by the
    name of one that ships.

    Raises:
        UserError: nothing there, damaged, or of a kind this version does not know.
    """
    folder = find_pruner(pretrained, revision)
    pruner = pruner_from(read_config(folder), folder / CONFIG)
    load_weights(pruner, folder)
    pruner.folder = folder
    return pruner.eval()


def _same_pruner(a: Path, b: Path) -> bool:
    """Whether two folders hold the same weights and settings, whatever they were trained on. What
    an older folder does not name has its default, so pruners are compared, not files."""
    pair = load_pruner(a), load_pruner(b)
    settings = [{**pruner.about, "trained_on": None} for pruner in pair]
    weights, others = (pruner.state_dict() for pruner in pair)
    return settings[0] == settings[1] and all(torch.equal(weights[k], others[k]) for k in weights)


def pruner_from(about: Mapping[str, Any], source: str | Path = "this checkpoint") -> LearnedPruner:
    """A pruner from what `LearnedPruner.about` says, with fresh weights; `source` is for the error.

    The file may come from anywhere, so `_target_` is held against the allow-list of `build`, has to
    be a learned pruner, and is called with plain values: nothing that they contain is interpolated
    or built.

    Raises:
        UserError: a class that is not there or is not a learned pruner, or arguments that it does
            not take.
    """
    settings = {key: value for key, value in about.items() if key not in ("pruner", "_target_")}
    # Folders of 0.1 name no class.
    target = about.get("_target_") or BEFORE_TARGETS.get(about.get("pruner", ""))
    if target is None:
        known = ", ".join(BEFORE_TARGETS)
        raise UserError(
            f"{source} names the pruner {about.get('pruner')!r}, which is not one of {known}: "
            "train it again."
        )
    try:
        # The allow-list of `build`: a config must not name any class it likes.
        kind = target_at(target)
    except UserError as error:
        raise UserError(
            f"{source}: {error} Install the code that the pruner was trained with."
        ) from error
    if not (inspect.isclass(kind) and issubclass(kind, LearnedPruner)):
        raise UserError(
            f"{source}: _target_ {target} is not a learned pruner, so nothing is loaded from it."
        )
    try:
        # 0.1 knew no other kernel and did not say so
        return kind(**{"kernel": "tokens", **settings})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source} is damaged ({error}): copy it again, or train it again."
        ) from error
