"""A stock model whose `generate` prunes: what `tprl.prune` puts in the place of the method."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tprl.budget import need_ratio, rows_of
from tprl.errors import UserError
from tprl.lvlm.batching import axes
from tprl.lvlm.carrying import MARK, CachedTurn, Carried, carry
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner, dropping
from tprl.lvlm.overflow import Watch, watched
from tprl.lvlm.questions import QuestionFinder
from tprl.lvlm.remembering import LastLook
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Prompt, Pruner, TokenSelection

# What the processor gives beside pixels; `generate` gets our own in their place.
TEXT_INPUTS = ("attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids")
# Arguments that would read the unpruned prompt behind our back.
REFUSED = {
    "pixel_values_videos": "videos are not pruned yet: give images, or call undo() first",
    "inputs_embeds": "there is nothing to prune in embeddings: give input_ids and pixel_values",
    "past_key_values": (
        "a cache is carried on with prune(..., reuse_images=True) alone: "
        "give the whole conversation with its images"
    ),
    "assistant_model": "assisted decoding reads the unpruned prompt: leave it out",
    "prompt_lookup_num_tokens": "prompt lookup reads the unpruned prompt: leave it out",
    "prefill_chunk_size": "a pruned prompt is prefilled in one piece: leave it out",
    "mm_encoder_outputs": "images are encoded here: give pixel_values",
}


class Kept(NamedTuple):
    """What is left of one image."""

    # in raster order, view by view; of a new token, the place where it stands
    indices: Int[Tensor, " K"]
    grid: tuple[tuple[int, int], ...]  # (rows, columns) of each view (crop) of the image

    @property
    def total(self) -> int:
        """Visual tokens before pruning."""
        return sum(rows * columns for rows, columns in self.grid)


class Pruning:
    """A model whose `generate` prunes; made by `tprl.prune`.

    Attributes:
        encoded: the prompts of the latest call before pruning, where images are remembered.
        look: counts how often the vision tower ran, there too.
        carried: tokens of each prompt of the latest call that `past_key_values` of the turn before
            held, and the visual ones among them; None without.
        kept: of the latest call, for each prompt a list with a `Kept` per image: what the language
            model's first layer reads. Empty before the first call.
    """

    def __init__(
        self,
        lvlm: FrozenLVLM,
        pruner: Pruner | LayerPruner,
        keep_ratio: float | None,
        question: QuestionFinder | None,
        positions: str,
    ) -> None:
        self.lvlm, self.pruner, self.keep_ratio = lvlm, pruner, keep_ratio
        # prune has checked it
        self.positions: Literal["keep", "compact"] = positions  # type: ignore[assignment]
        self.kept: list[list[Kept]] = []
        self.encoded: Encoded | None = None
        self.look: LastLook | None = None
        self.carried: Carried | None = None
        self.take_off: Callable[[], None] | None = None  # removes an adapter that prune added
        self._question = question
        self._stock: Callable[..., Any] = lvlm.model.generate
        self._before = vars(lvlm.model).get("generate")  # almost always None: the class has it
        functools.update_wrapper(self, self._stock)  # inspect.signature shows the stock one's
        lvlm.model.generate = self

    def remember_images(self) -> None:
        """From here on, images that the call before has shown are not encoded again."""
        # on this handle's own view of the model
        self.look = LastLook(self.lvlm.look)
        self.lvlm.look = self.look  # type: ignore[method-assign]

    def undo(self) -> None:
        """The model is again what it was. A second call does nothing."""
        model = self.lvlm.model
        if model.generate is not self:
            return
        del model.generate
        if self._before is not None:
            model.generate = self._before
        if self.take_off is not None:
            self.take_off()

    def __enter__(self) -> "Pruning":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    @torch.no_grad()
    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The stock `generate`, of a prompt without the visual tokens that the pruner drops.

        The stock method gets the pruned prompt as embeddings, which the first forward reads, and
        the original ids, which everything else reads: the output, streamers, processors of logits,
        stopping criteria.

        Raises:
            UserError: an argument that cannot be honored, inputs that do not belong together, or
                numbers that the model's dtype cannot hold.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        # Text alone is not pruned: the stock method answers.
        if kwargs.get("pixel_values") is None:
            self._check_text_only(ids, kwargs)
            self.kept = [[] for _ in range(0 if ids is None else len(ids))]
            return self._stock(ids, *args, **kwargs)
        config = args[0] if args else kwargs.get("generation_config")
        self._check(ids, config, kwargs)
        # Some checkpoints (SmolVLM2) leave the cache off, which only their trainer wanted.
        if self._cache(config, kwargs) is None:
            kwargs["use_cache"] = True
        ids = ids.to(self.lvlm.device)
        encoded = self.encode(ids, kwargs)
        self.encoded = encoded if self.look is not None else None
        # Methods between layers get the whole prompt; all others choose before the first layer.
        plan = None
        if isinstance(self.pruner, LayerPruner):
            ratio = need_ratio(self.pruner.name, self.keep_ratio)
            plan, selection = LayerPlan.of(self.pruner, ratio, self.lvlm.layers), keep_all(encoded)
        else:
            selection = self.pruner.select(encoded, self.keep_ratio)
        # The prompt without dropped tokens, at its own position ids: [B S1 D].
        self.kept = kept(encoded, selection)
        prompt = splice(encoded, selection, self.positions)
        names = [f"prompt {row}" for row in range(len(ids))]
        lvlm, watch = self.lvlm, Watch()
        past = kwargs.pop("past_key_values", None)
        self.carried = None if past is None else self._carry(past, prompt, plan)
        # What a cache holds is not read again: [B S2] of the S1 columns are left.
        left = prompt if self.carried is None else columns_from(prompt, self.carried.columns)
        more = {} if self.carried is None else {"past_key_values": self.carried.cache}
        out: Any = None
        try:
            with (
                lvlm.deepstack(left.deep, left.visual),
                dropping(lvlm.model, prompt, plan),
                watched(lvlm.model, watch),
            ):
                out = self._stock(
                    ids,
                    *args,
                    inputs_embeds=prompt.embeds,
                    attention_mask=prompt.attention.long(),
                    position_ids=axes(prompt.positions),
                    **lvlm.inputs_beside(prompt.input_ids, prompt.visual),
                    **self._remaining(ids.shape[1], config, kwargs),
                    **more,
                )
        except RuntimeError:  # sampling refuses what is not finite, without saying why it is not
            lvlm.check_written(watch.finite, prompt, plan, names)
            raise
        lvlm.check_written(watch.finite, prompt, plan, names)
        # A later call with this cache would count positions of the unpruned prompt.
        if getattr(out, "past_key_values", None) is not None:
            setattr(out.past_key_values, MARK, self._held(prompt, plan, out.sequences, ids))
        return out

    def _carry(self, past: Any, prompt: Prompt, plan: LayerPlan | None) -> Carried:
        """What the cache of the turn before holds of this turn's prompt."""
        assert self.look is not None
        if plan is not None:
            raise UserError(
                f"generate got past_key_values, and {self.pruner.name} drops tokens between "
                "layers, whose caches differ: leave past_key_values out."
            )
        return carry(self.lvlm, past, prompt, self.look.runs)

    def _held(
        self, prompt: Prompt, plan: LayerPlan | None, sequences: Tensor, ids: Tensor
    ) -> CachedTurn | str:
        """What the columns of a cache are of, for `carry`; or why it cannot be carried on."""
        if self.look is None:
            return "it was returned without reuse_images=True"
        if plan is not None:
            return "its layers hold different tokens"
        if len(sequences) != len(ids):
            return "it is of several sequences per prompt"
        return CachedTurn(prompt, sequences[:, ids.shape[1] :], self.look.runs)

    def encode(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Encoded:
        """The batch before pruning, from the arguments of `generate`."""
        attention = kwargs.get("attention_mask")
        attention = torch.ones_like(ids) if attention is None else attention.to(ids.device)
        # Without a finder no token is the question: pruners that read none do not need one.
        question = torch.zeros_like(ids, dtype=torch.bool)
        if self._question is not None:
            question = self._question(ids, attention.bool())
        inputs = {name: kwargs[name] for name in self.lvlm.pixel_inputs if name in kwargs}
        missing = [name for name in self.lvlm.pixel_inputs if name not in inputs]
        if missing:
            raise UserError(
                f"generate was not given {', '.join(missing)}: pass all that the processor returns."
            )
        inputs |= {"input_ids": ids, "attention_mask": attention}
        return self.lvlm.encode_inputs(inputs, self.pruner.extras, question)

    def _remaining(self, length: int, config: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What the stock `generate` still needs. `max_length` and `min_length` count the original
        prompt, and the stock code would count the pruned one: both become numbers of new tokens."""
        # All but what was spliced passes through, as the caller wrote it.
        handled = {*TEXT_INPUTS, *self.lvlm.pixel_inputs}
        remaining = {name: value for name, value in kwargs.items() if name not in handled}
        default = self.lvlm.model.generation_config
        for bound in ("max", "min"):
            # The call's own argument first, then its config, then the model's.
            limit = remaining.pop(f"{bound}_length", None)
            if limit is None:
                limit = _setting(f"{bound}_length", config, default)
            new = remaining.get(f"{bound}_new_tokens")
            if new is None:
                new = _setting(f"{bound}_new_tokens", config, default)
            if limit and new is None:
                remaining[f"{bound}_new_tokens"] = max(limit - length, 0)
        return remaining

    def _check(self, ids: Tensor | None, config: Any, kwargs: Mapping[str, Any]) -> None:
        # An argument may also come as a field of the generation config.
        for name, why in REFUSED.items():
            # With remembered images it is judged beside this turn's prompt (`carry`).
            if name == "past_key_values" and self.look is not None:
                continue
            if kwargs.get(name) is not None or getattr(config, name, None) is not None:
                raise UserError(f"generate got {name}, and this model is pruned: {why}.")
        if ids is None:
            raise UserError(
                "generate got pixel_values without input_ids: pass all that the processor returns."
            )
        # A guessed mask would take padding for text of the prompt.
        pad = self.lvlm.model.generation_config.pad_token_id
        unmasked = kwargs.get("attention_mask") is None and len(ids) > 1
        if unmasked and pad is not None and bool((ids == pad).any()):
            raise UserError(
                "generate got a padded batch without attention_mask: "
                "pass all that the processor returns."
            )
        if self._cache(config, kwargs) is False:
            raise UserError(
                "generate got use_cache=False, and this model is pruned: "
                "without a cache transformers takes the gaps between "
                "pruned tokens for packed sequences: leave the cache on."
            )

    @staticmethod
    def _cache(config: Any, kwargs: Mapping[str, Any]) -> bool | None:
        """Whether the caller wants a cache; None if nothing says so."""
        wanted = kwargs.get("use_cache")
        return getattr(config, "use_cache", None) if wanted is None else wanted

    def _check_text_only(self, ids: Tensor | None, kwargs: Mapping[str, Any]) -> None:
        """What would go unpruned without a word, or wrong: images that come some other way, a
        pruned prompt's cache."""
        for name in (
            "pixel_values_videos",
            "mm_encoder_outputs",
            "inputs_embeds",
            "past_key_values",
        ):
            value = kwargs.get(name)
            if value is not None and (name != "past_key_values" or hasattr(value, MARK)):
                raise UserError(f"generate got {name}, and this model is pruned: {REFUSED[name]}.")
        if ids is not None and bool((ids == self.lvlm.image_token).any()):
            raise UserError(
                "generate got image tokens without pixel_values: "
                "pass all that the processor returns."
            )


def columns_from(prompt: Prompt, first: int) -> Prompt:
    """The prompts without their first columns."""
    rows = torch.arange(len(prompt.uids), device=prompt.embeds.device)
    return prompt.rows(rows, prompt.embeds.shape[1] - first)


def kept(encoded: Encoded, selection: TokenSelection) -> list[list[Kept]]:
    """Which tokens of each image of each prompt the language model reads."""
    # New tokens, such as merged ones, stand at places of old ones.
    standing = selection.keep.clone()
    if selection.extra_at is not None and selection.extra_mask is not None:
        row, token = selection.extra_mask.nonzero(as_tuple=True)
        standing[row, selection.extra_at[row, token]] = True
    # One line per image over its own tokens, in the order of samples and their images.
    images = rows_of(encoded)
    kept_images: list[list[Kept]] = [[] for _ in encoded.uids]
    lines = (images.split(standing) & images.mask).cpu()
    for sample, line in zip(images.sample.tolist(), lines, strict=True):
        kept_images[sample].append(
            Kept(line.nonzero().squeeze(1), encoded.grids[sample][len(kept_images[sample])])
        )
    return kept_images


def _setting(name: str, config: Any, default: Any) -> Any:
    """A setting of the generation config of this call, or of the model's own."""
    value = getattr(config, name, None)
    return getattr(default, name, None) if value is None else value
