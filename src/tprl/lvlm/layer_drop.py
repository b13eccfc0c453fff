"""Dropping visual tokens inside the language model: hooks on the decoder layers of a stock class.

No layer is switched to eager attention: a method's rows of attention are recomputed from queries
and keys of one layer. Hidden states, rotary embeddings and masks of later layers shrink, and so do
their caches, each to its own length.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot, pad

from tprl.budget import budget, image_rows, keep_top
from tprl.cost import FULL, LMShape, layer_kinds
from tprl.errors import UserError
from tprl.lvlm.loading import module_device
from tprl.types import Prompt, columns_of


class LayerStage(NamedTuple):
    """One drop. Layers are counted from 0."""

    before: int  # the first layer that works on fewer tokens
    reads: int  # the layer whose queries and keys decide: `before`, or one after the drop before
    keep: float  # fraction of an image's original visual tokens that lives from here on


class Look(NamedTuple):
    """The sequence as one layer gets it, which is what a method may read; answer tokens that are
    being scored stand at its end and must not be read."""

    layer: Any  # the decoder layer
    norm: Any  # the language model's final norm
    hidden: Float[Tensor, "B S D"]
    first: Float[Tensor, "B S D"]  # what the language model's first layer got, the same columns
    real: Bool[Tensor, "B S"]  # False on padding
    visual: Bool[Tensor, "B S"]
    image: Int[Tensor, "B S"]  # of visual columns: which image
    answer: Bool[Tensor, "B S"]
    marked: Bool[Tensor, "B S"]  # what a `Rewriter` marked for its later drops, at first nothing
    cos: Float[Tensor, "B S c"]
    sin: Float[Tensor, "B S c"]

    @property
    def after(self) -> Bool[Tensor, "B S"]:
        """The prompt's text after its last image."""
        column = torch.arange(self.real.shape[1], device=self.real.device)
        final = torch.where(self.visual, column, -1).amax(1, keepdim=True)
        return self.real & ~self.answer & (column > final)

    def heads(self, name: str, at: Int[Tensor, "B R"] | None = None) -> Float[Tensor, "B H R c"]:
        """Queries ("q") or keys ("k") after rotary embedding, in float32; of the columns `at`, or
        of all."""
        # As the layer does it: input norm, projection, norm of queries and keys where there is one.
        part = self if at is None else self.take(at, torch.ones_like(at, dtype=torch.bool))
        attention = self.layer.self_attn
        x = getattr(attention, f"{name}_proj")(self.layer.input_layernorm(part.hidden))
        x = x.unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, f"{name}_norm"):
            x = getattr(attention, f"{name}_norm")(x)
        # The module's own rotation, since layouts of rotary planes differ.
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        return rotate(x.transpose(1, 2), x.transpose(1, 2), part.cos, part.sin)[0].float()

    def attention(self, at: Int[Tensor, "B R"]) -> Float[Tensor, "B H R S"]:
        """Softmax attention of the columns `at` over the whole sequence."""
        # Grouped keys serve several heads of queries: [B H S c].
        query, key = self.heads("q", at), self.heads("k")
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        # Causal, and padding unseen: [B R S].
        seen = self.real.unsqueeze(1) & (
            torch.arange(key.shape[2], device=key.device) <= at.unsqueeze(2)
        )
        logits = (query @ key.mT) * query.shape[-1] ** -0.5
        return logits.masked_fill(~seen.unsqueeze(1), torch.finfo(logits.dtype).min).softmax(-1)

    def last_row(self) -> Float[Tensor, "B S"]:
        """Attention of the prompt's last token, mean over heads."""
        # Prompts are left-padded: their last tokens share a column, before any answer.
        last = self.real.shape[1] - 1 - int(self.answer[0].sum())
        return self.attention(torch.full_like(self.image[:, :1], last)).mean(1)[:, 0]

    def to(self, device: torch.device) -> "Look":
        """The same on another device: a model that is cut has layers on several."""
        return self._replace(**{name: getattr(self, name).to(device) for name in self._fields[2:]})

    def take(self, at: Int[Tensor, "B N"], valid: Bool[Tensor, "B N"]) -> "Look":
        """The columns `at` only, of which `valid` ones are real."""

        def columns(x: Tensor) -> Tensor:
            index = at.reshape(*at.shape, *[1] * (x.ndim - 2))  # [B N 1 ...]
            return x.gather(1, index.expand(-1, -1, *x.shape[2:]))

        part = {name: columns(getattr(self, name)) for name in self._fields[2:]}
        return self._replace(**part)._replace(
            real=part["real"] & valid, visual=part["visual"] & valid
        )


@runtime_checkable
class LayerPruner(Protocol):
    """Drops visual tokens between decoder layers. Its keep_ratio is the mean over layers of the
    fraction of visual tokens that each layer really computes."""

    name: str
    extras: frozenset[str]  # always empty: there only because evaluations ask every method

    def stages(self, keep_ratio: float, layers: int) -> tuple[LayerStage, ...]:
        """The schedule that has this mean.

        Raises:
            UserError: none has.
        """
        ...

    def rank(self, look: Look, k: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        """Scores of the visual columns: the highest `k` of each image live (k is that of the
        column's image), ties go to the lower index."""
        ...

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        """What ranking `alive` visual tokens in a prompt with `text` other ones costs (see
        `tprl.cost`)."""
        ...


@runtime_checkable
class Rewriter(LayerPruner, Protocol):
    """A method that also writes: it is asked to `rewrite` where others are asked to `rank`."""

    def rewrite(
        self, look: Look, read: Look, k: Int[Tensor, "B S"]
    ) -> tuple[Look, Float[Tensor, "B S"]]:
        """The sequence that goes on, and scores as from `rank`.

        Args:
            look: the sequence as layer `LayerStage.before` would get it; only `hidden` and `marked`
                may change.
            read: as layer `LayerStage.reads` got it, the same columns; what `rank` is given.
            k: see `rank`.
        """
        ...


def last_row_flops(lm: LMShape, tokens: int) -> int:
    """`Look.last_row`: keys of all tokens, one query, one row of inner products."""
    q, kv = lm.heads * lm.head_dim, lm.kv_heads * lm.head_dim
    return 2 * tokens * lm.width * kv + 2 * lm.width * q + 2 * tokens * q


class LayerPlan(NamedTuple):
    """A method's schedule on a language model of so many layers."""

    pruner: LayerPruner
    stages: tuple[LayerStage, ...]
    layers: int

    @classmethod
    def of(cls, pruner: LayerPruner, keep_ratio: float, layers: int) -> "LayerPlan":
        """The method's schedule at a keep ratio."""
        return cls(pruner, pruner.stages(keep_ratio, layers), layers)

    def counts(self, *images: int) -> list[int]:
        """Visual tokens that each layer computes of images that have so many, all together."""
        # A stage holds until the next one, counted in tokens of the original image.
        keep = [1.0] * self.layers
        for stage in self.stages:
            keep[stage.before :] = [stage.keep] * (self.layers - stage.before)
        counts = []
        for fraction in keep:
            counts.append(sum(budget(fraction, n) for n in images))
        return counts

    def flops(self, lm: LMShape, text: int, *images: int) -> int:
        """What all its rankings cost for a prompt with `text` tokens and images that have so
        many."""
        # Shifted by one: a stage ranks what the layer before it computed.
        counts = [sum(images), *self.counts(*images)]
        return sum(
            self.pruner.flops(lm, stage, text, counts[stage.before]) for stage in self.stages
        )


def check_layers(text: Any, name: str) -> None:
    """Refuse a method that reads layers or drops tokens between them, by `name`, on a language
    model, by its config, whose layers are not all full attention with places in its rotary
    embedding alone.

    Raises:
        UserError: they are not.
    """
    kinds = set(layer_kinds(text)) - {FULL}
    # Ministral 3 scales queries by their positions too, which are not told layer by layer.
    scaled = bool((getattr(text, "rope_parameters", None) or {}).get("llama_4_scaling_beta"))
    if not kinds and not scaled:
        return
    what = f"layers of {min(kinds).replace('_', ' ')}" if kinds else "queries scaled by position"
    raise UserError(
        f"{name} reads layers of the language model, and this LVLM has {what}, where that is not "
        "exact: use a method that does not, e.g. pruner=attention_dpp."
    )


@contextmanager
def dropping(model: Any, prompt: Prompt, plan: LayerPlan | None) -> Generator[None, None, None]:
    """While it lasts, the stock model reads the unpruned `prompt` as the plan says: in prefill and
    in every later step.

    Args:
        model: the stock LVLM; its language model is of the Llama or Qwen kind.
        prompt: what the next prefill reads, perhaps several times over (beams), perhaps with an
            answer after it.
        plan: None changes nothing.

    Raises:
        UserError: a drop before the layers that still add deepstack features, or as `check_layers`.
    """
    if plan is None or not plan.stages or not bool(prompt.visual.any()):
        yield
        return
    parts = model.model
    language = parts.language_model if hasattr(parts, "language_model") else parts.text_model
    check_layers(language.config, plan.pruner.name)
    # Deepstack adds features by the columns of the unpruned prompt.
    first = min(stage.before for stage in plan.stages)
    if prompt.deep is not None and first < prompt.deep.shape[-1] // prompt.embeds.shape[-1]:
        raise UserError(
            f"{plan.pruner.name} drops tokens before layer {first}, where this LVLM still adds "
            "deepstack features to them: use a method that prunes before the language model."
        )
    # Every layer gets a hook: later ones need the shorter masks of what was dropped.
    drop = _Dropping(language, prompt, plan)
    handles = [
        layer.register_forward_pre_hook(drop.hook(number), with_kwargs=True)
        for number, layer in enumerate(language.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Dropping:
    """One prompt on its way through the layers."""

    def __init__(self, language: Any, prompt: Prompt, plan: LayerPlan) -> None:
        self.language, self.prompt, self.plan = language, prompt, plan
        self.kind: str = language.config._attn_implementation
        self.first = min(stage.before for stage in plan.stages)
        self.prefilling, self.readers = True, {stage.reads for stage in plan.stages}
        self.look: Look | None = None
        # [B, images] visual tokens before any drop
        self.originals: Tensor = prompt.visual.new_zeros(0)
        self.read: dict[int, Look] = {}  # of layers that decide about a drop still to come
        self.real: dict[int, Tensor] = {}  # [B n] of every layer with fewer columns, padding False

    def hook(self, number: int) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            cache: Any = kwargs.get("past_key_values")
            # No cache, or an empty one, is a prefill.
            if number == 0:
                self.prefilling = cache is None or cache.get_seq_length(0) == 0
            if self.prefilling:
                hidden = self._prefill(number, hidden, kwargs)
            elif number >= self.first:
                assert cache is not None
                # Caches differ in length: what this layer kept, then all written since.
                new, past = hidden.shape[1], cache.get_seq_length(number)
                first = self.real[number]  # of the prompt
                real = pad(first, (0, past + new - first.shape[1]), value=True)
                kwargs["attention_mask"] = self._mask(real, new, hidden.dtype)
            return (hidden, *args[1:]), kwargs

        return before

    def _prefill(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        # The hidden states are this layer's, everything else is as the last drop left it.
        look = self._begin(hidden, kwargs) if number == 0 else self.look
        assert look is not None
        layer = self.language.layers[number]
        self.look = look.to(hidden.device)._replace(layer=layer, hidden=hidden)
        if number in self.readers:  # of no other layer: this holds hidden states
            self.read[number] = self.look.to(module_device(layer, hidden))
        for stage in self.plan.stages:
            # What was read before a drop has other columns and is of no use after it.
            if stage.before == number:
                self.look = self._drop(stage)
                self.read.clear()
                if number in self.readers:
                    self.read[number] = self.look.to(module_device(layer, hidden))
        if number >= self.first:
            # Rotary turns and mask of the columns that are left, in place of the prompt's.
            self.real[number] = self.look.real
            kwargs["position_embeddings"] = (self.look.cos, self.look.sin)
            kwargs["position_ids"] = None  # read by flash attention on packed sequences only
            width = self.look.real.shape[1]
            kwargs["attention_mask"] = self._mask(self.look.real, width, hidden.dtype)
        return self.look.hidden

    def _begin(self, hidden: Tensor, kwargs: dict[str, Any]) -> Look:
        self.read.clear()
        # Beams repeat each prompt, and teacher forcing writes an answer behind it.
        width = self.prompt.visual.shape[1]
        copies, answer = len(hidden) // len(self.prompt.visual), hidden.shape[1] - width

        def grown(x: Tensor, value: bool | int) -> Tensor:
            return pad(x.repeat_interleave(copies, 0), (0, answer), value=value).to(hidden.device)

        real, visual = grown(self.prompt.attention, True), grown(self.prompt.visual, False)
        image = grown(self.prompt.image, 0)
        # Budgets are fractions of these counts, whatever drops came before: [B images].
        self.originals = (one_hot(image) * visual.unsqueeze(-1)).sum(1)
        column = torch.arange(hidden.shape[1], device=hidden.device)
        turns = kwargs["position_embeddings"]
        cos, sin = (part.expand(len(hidden), -1, -1).to(hidden.device) for part in turns)
        marks = real, visual, image, (column >= width).expand_as(real), torch.zeros_like(real)
        return Look(None, self.language.norm, hidden, hidden, *marks, cos, sin)

    def _drop(self, stage: LayerStage) -> Look:
        read = self.read[stage.reads]
        assert self.look is not None
        look = self.look.to(read.hidden.device)  # where the layer is that decides
        # One line per image: budgets hold image by image.
        at, mask = columns_of(look.visual)
        image = look.image.gather(1, at)
        images = image_rows(mask, image)
        # k of each line, and spread over the columns of its image for the method: [B S].
        counts = self.originals.to(at.device)[images.sample, images.split(image)[:, 0]].tolist()
        k = torch.tensor([budget(stage.keep, n) for n in counts], device=at.device)
        wide = torch.zeros_like(look.image)
        wide.scatter_add_(1, at, images.join(k.unsqueeze(1).expand_as(images.at), mask))
        # The method scores, and the highest k of every image live.
        pruner = self.plan.pruner
        if isinstance(pruner, Rewriter):
            look, scores = pruner.rewrite(look, read, wide)
        else:
            scores = pruner.rank(read, wide)
        keep = images.join(keep_top(images.split(scores.gather(1, at)), images.mask, k), mask)
        # Dropped tokens count as padding from here on: columns of the longest row remain.
        alive = look.real.clone()
        row, token = (mask & ~keep).nonzero(as_tuple=True)
        alive[row, at[row, token]] = False
        length = int(alive.sum(1).max())
        order = torch.arange(alive.shape[1], device=at.device).expand_as(alive)
        # Dead columns sort to the front, as in `splice`.
        place = torch.where(alive, order, order - alive.shape[1])
        index = place.argsort(dim=1, stable=True)[:, -length:]
        return look.take(index, alive.gather(1, index))

    def _mask(self, real: Bool[Tensor, "B K"], new: int, dtype: torch.dtype) -> Tensor | None:
        """For the last `new` of the columns that `real` describes, in the form that the attention
        in use wants."""
        if self.kind != "eager" and bool(real.all()) and new in (1, real.shape[1]):
            return None  # causal by itself
        if "flash" in self.kind:
            return real
        keys = real.shape[1]
        column = torch.arange(keys, device=real.device)
        row = column[keys - new :]
        # [B 1 new K] booleans: causal, padding unseen.
        eye = row.unsqueeze(1) == column  # padding sees itself, never nothing
        seen = (real.unsqueeze(1) & (column <= row.unsqueeze(1)) | eye).unsqueeze(1)
        if self.kind != "eager":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=real.device).masked_fill(
            ~seen, torch.finfo(dtype).min
        )
