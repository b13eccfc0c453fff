"""The vocabulary that every part of TPRL speaks.

Dimension letters, in every annotation:

    B samples · V visual tokens before pruning, padded · E extra tokens a method adds
    S sequence length · D width of the language model · Z width of the policy's codes
    Q question tokens, padded · T pruning steps · P position axes (1 for RoPE, 3 for M-RoPE)

Boxes are (x1, y1, x2, y2) in pixels of the original image, x2 and y2 exclusive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor

Box = tuple[float, float, float, float]


class Utterance(str):
    """What a model wrote, white space at its beginning included. A reference answer is words: what
    the chat template writes before an answer is still to come."""


class Sample(NamedTuple):
    """One question about zero or more images.

    `region` holds the boxes of the objects that decide the answer. It serves analysis and the
    oracle only: no pruner that is compared, and no reward, may read it.
    """

    uid: str
    images: tuple[Image, ...]
    question: str
    answers: tuple[str, ...]
    family: str = ""
    box: Box | None = None
    region: tuple[Box, ...] | None = None


@runtime_checkable
class TowerBlock(Protocol):
    """A block of a vision tower in two halves: tokens may merge between; of I images, M tokens."""

    def attend(
        self, x: Float[Tensor, "I M C"], bias: Float[Tensor, "I 1 1 M"]
    ) -> tuple[Float[Tensor, "I M C"], Float[Tensor, "I M c"]]:
        """`x` plus its attention, of which the logits have `bias` added per key, and the keys' mean
        over heads."""
        ...

    def feed(self, x: Float[Tensor, "I M C"]) -> Float[Tensor, "I M C"]:
        """`x` plus its MLP."""
        ...


class Tower(NamedTuple):
    """The part of a vision tower between extras["patch_embeds"] and the features."""

    # the CLS token as it enters the first block, before the patches, if there is one
    cls: Float[Tensor, " C"] | None
    blocks: Sequence[TowerBlock]  # those that make the features, later ones left out


class Counts(NamedTuple):
    """What a prompt holds, as plain numbers."""

    images: tuple[int, ...]  # visual tokens of each
    text: int  # all other columns
    words: int  # of the question


@dataclass(frozen=True)
class Encoded:
    """A batch of prompts after the vision tower and the projector, before the language model.
    Left-padded.

    Made once per sample by `LVLM.encode` and shared by every pruner, keep ratio and rollout that
    follows. `extras` holds only what the pruner in use asked for (see `Pruner.extras`), each with
    leading axes [B, V] or [B].
    """

    uids: tuple[str, ...]
    input_ids: Int[Tensor, "B S"]
    embeds: Float[Tensor, "B S D"]
    attention: Bool[Tensor, "B S"]
    positions: Int[Tensor, "P B S"]
    visual_at: Int[Tensor, "B V"]  # column in S of each visual token, raster order; 0 where padded
    visual_mask: Bool[Tensor, "B V"]
    image_of: Int[Tensor, "B V"]  # index of the image each visual token belongs to
    # per sample and image: (rows, columns) of each view
    grids: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    # True on the question: the user's words of the last user turn, before, between or after its
    # images, or in a prompt of text alone; never on template words or image tokens.
    question: Bool[Tensor, "B S"]
    extras: dict[str, Tensor] = field(default_factory=dict)
    # what deeper layers add to visual columns (deepstack), layer by layer
    deep: Float[Tensor, "B S F"] | None = None
    # the LVLM's projector, for methods that merge vision features
    project: Callable[[Tensor], Tensor] | None = None
    tower: Tower | None = None  # set with extras["patch_embeds"], for methods that merge inside it
    # The whole vision side on images [3 Y X] of other sizes, for methods that scale
    # extras["pixels"]: tokens [K D] of each, in raster order, and what deeper layers add to those.
    # None where the family has no other sizes.
    look: Callable[[Sequence[Tensor]], tuple[list[Tensor], list[Tensor] | None]] | None = None
    # Per sample and image: (rows, columns) of the patches of each pass of the vision tower, its
    # cost. `grids` does not always say it: LLaVA-NeXT drops the padding of crops after the tower.
    tiles: tuple[tuple[tuple[tuple[int, int], ...], ...], ...] = ()
    # per sample the question as text, for rules that look for words; () if unknown
    questions: tuple[str, ...] = ()
    # Per sample and image: the part of the original image, in its pixels, that the grid of the last
    # view lies over. A processor that crops shows the model no more. () where the size of images is
    # not known.
    seen: tuple[tuple[Box, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def visual(self) -> Float[Tensor, "B V D"]:
        """Projected visual tokens, gathered from the sequence; padded entries are zero."""
        at = self.visual_at.unsqueeze(-1).expand(-1, -1, self.embeds.shape[-1])
        return self.embeds.gather(1, at) * self.visual_mask.unsqueeze(-1)

    @property
    def is_visual(self) -> Bool[Tensor, "B S"]:
        """True on the columns of visual tokens."""
        return marked(self.attention, self.visual_at, self.visual_mask)

    @cached_property
    def counts(self) -> tuple[Counts, ...]:
        """Of each sample. Waits for the device once; what `rows` takes of it knows them."""
        width = max(map(len, self.grids), default=0)
        tokens = self.image_of.new_zeros(len(self), width)
        tokens.scatter_add_(1, self.image_of, self.visual_mask.long())
        text = self.attention.sum(1) - self.visual_mask.sum(1)
        table = torch.cat([tokens, torch.stack([text, self.question.sum(1)], 1)], 1).tolist()
        return tuple(
            Counts(tuple(row[: len(images)]), *row[width:])
            for row, images in zip(table, self.grids, strict=True)
        )

    @property
    def words(self) -> tuple[Float[Tensor, "B Q D"], Bool[Tensor, "B Q"]]:
        """Embeddings of the question's words, zero where padded, and which of them are real."""
        at, mask = columns_of(self.question, max((n.words for n in self.counts), default=0))
        words = self.embeds.gather(1, at.unsqueeze(-1).expand(-1, -1, self.embeds.shape[-1]))
        return words * mask.unsqueeze(-1), mask

    def rows(self, index: Sequence[int]) -> "Encoded":
        """The same batch restricted to (or repeated at) the given rows."""
        # Position axes stand before that of the batch.
        i = torch.as_tensor(list(index), dtype=torch.long, device=self.embeds.device)
        part = replace(
            self,
            uids=tuple(self.uids[j] for j in index),
            grids=tuple(self.grids[j] for j in index),
            tiles=tuple(self.tiles[j] for j in index) if self.tiles else (),
            questions=tuple(self.questions[j] for j in index) if self.questions else (),
            seen=tuple(self.seen[j] for j in index) if self.seen else (),
            positions=self.positions[:, i],
            extras={name: value[i] for name, value in self.extras.items()},
            deep=None if self.deep is None else self.deep[i],
            **{
                name: getattr(self, name)[i]
                for name in (
                    "input_ids",
                    "embeds",
                    "attention",
                    "visual_at",
                    "visual_mask",
                    "image_of",
                    "question",
                )
            },
        )
        if "counts" in vars(self):
            vars(part)["counts"] = tuple(self.counts[j] for j in index)
        return part


def columns_of(
    mask: Bool[Tensor, "B S"], width: int | None = None
) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
    """Columns where each row is True, in order and right-padded with 0, and which entries are real.
    W is the largest number of them in a row: give it where the host knows it."""
    if width is None:
        width = int(mask.sum(1).max()) if len(mask) else 0
    # Stable: True columns come first and keep their order.
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    real = mask.gather(1, order)
    return order * real, real


def marked(
    like: Bool[Tensor, "B S"], at: Int[Tensor, "B V"], mask: Bool[Tensor, "B V"]
) -> Bool[Tensor, "B S"]:
    """True on the columns `at` whose entry in `mask` is True."""
    # Padded entries name column 0, which others may stand in: counts add up in any order.
    return torch.zeros_like(like, dtype=torch.long).scatter_add(1, at, mask.long()) > 0


@dataclass(frozen=True)
class TokenSelection:
    """What a pruner decided: which visual tokens live, and what replaces or joins them.

    `merged` replaces the embeddings of kept tokens; `extra` are new tokens, each standing at the
    position of the visual token `extra_at` names (entries with `extra_mask` False are padding).
    Kept tokens stay in raster order. Extra tokens have the deepstack features of that token, or
    `extra_deep`. `positions`, where they are not those of the unpruned prompt, are of its S
    columns, then of the E extra tokens. `core`, a part of `keep`, stands at the front of its image,
    at its own positions: what else is kept then changes nothing of its keys and values.
    """

    keep: Bool[Tensor, "B V"]
    merged: Float[Tensor, "B V D"] | None = None
    extra: Float[Tensor, "B E D"] | None = None
    extra_at: Int[Tensor, "B E"] | None = None
    extra_mask: Bool[Tensor, "B E"] | None = None
    extra_deep: Float[Tensor, "B E F"] | None = None
    positions: Int[Tensor, "P B _"] | None = None
    core: Bool[Tensor, "B V"] | None = None

    @property
    def count(self) -> Int[Tensor, " B"]:
        """Visual tokens that the language model will read, per sample."""
        kept = self.keep.sum(1)
        return kept if self.extra_mask is None else kept + self.extra_mask.sum(1)

    def per_image(self, encoded: Encoded) -> list[list[int]]:
        """`count` by sample and image."""
        # [B images] counts, cut to the images that each sample has.
        width = max(map(len, encoded.grids), default=0)
        counts = torch.zeros(len(encoded), width, dtype=torch.long, device=self.keep.device)
        counts.scatter_add_(1, encoded.image_of, self.keep.long())
        if self.extra_mask is not None and self.extra_at is not None:
            anchored = encoded.image_of.gather(1, self.extra_at)
            counts.scatter_add_(1, anchored, self.extra_mask.long())
        pairs = zip(counts.tolist(), encoded.grids, strict=True)
        return [row[: len(images)] for row, images in pairs]


@dataclass(frozen=True)
class Prompt:
    """What the language model reads after pruning, left-padded; `visual` marks visual tokens."""

    uids: tuple[str, ...]
    input_ids: Int[Tensor, "B S"]
    embeds: Float[Tensor, "B S D"]
    attention: Bool[Tensor, "B S"]
    positions: Int[Tensor, "P B S"]
    visual: Bool[Tensor, "B S"]
    image: Int[Tensor, "B S"]  # of visual tokens: the index of their image; 0 elsewhere
    deep: Float[Tensor, "B S F"] | None = None  # see `Encoded.deep`

    def rows(
        self,
        index: Int[Tensor, " R"],
        width: int | None = None,
        numbers: Sequence[int] | None = None,
    ) -> "Prompt":
        """The prompts at `index`, their last `width` columns; `numbers` are the same where the host
        knows them."""
        # Prompts are left-padded, so the last columns hold all of a shorter one.
        start = 0 if width is None else self.visual.shape[1] - width
        fields = ("input_ids", "embeds", "attention", "visual", "image")
        return replace(
            self,
            uids=tuple(self.uids[row] for row in (index.tolist() if numbers is None else numbers)),
            positions=self.positions[:, index, start:],
            deep=None if self.deep is None else self.deep[index, start:],
            **{name: getattr(self, name)[index, start:] for name in fields},
        )


@dataclass(frozen=True)
class Outcome:
    """All that a reward may look at. Row 0 of every [T+1, B] field is the prompt with all visual
    tokens."""

    uids: tuple[str, ...]
    kept: Int[Tensor, "T1 B"]
    score: Float[Tensor, "T1 B"] | None = None  # the task's own score in [0, 1]
    # mean nats per reference-answer token, teacher-forced
    log_prob: Float[Tensor, "T1 B"] | None = None
    # of the whole question, selector included in rows 1 on
    flops: Float[Tensor, "T1 B"] | None = None
    # nats per token, from the answer with all tokens; row 0 is 0
    answer_kl: Float[Tensor, "T1 B"] | None = None
    # 1 where the answer is the one with all tokens; row 0 is 1
    agreement: Float[Tensor, "T1 B"] | None = None


@runtime_checkable
class LVLM(Protocol):
    """A frozen vision-language model. A plain object, never a registered submodule of a
    LightningModule."""

    name: str
    width: int
    device: torch.device

    def encode(
        self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()
    ) -> Encoded: ...

    def answer(self, prompt: Prompt) -> list[str]: ...

    def score(
        self, prompt: Prompt, answers: Sequence[str]
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """Teacher-forced mean log-probability (nats per token, end token included) of each answer,
        and whether greedy decoding would produce exactly that answer."""
        ...


@runtime_checkable
class OpenLVLM(LVLM, Protocol):
    """An LVLM that shows its output distribution."""

    def distributions(self, prompt: Prompt, answers: Sequence[str]) -> Float[Tensor, "B A N"]:
        """Log-probabilities of all N vocabulary entries at every answer token, teacher-forced; nan
        where an answer is shorter."""
        ...

    def divergence(
        self,
        prompt: Prompt,
        answers: Sequence[str],
        reference: Float[Tensor, "R A N"],
        index: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """KL(reference[index[i]] || distributions of prompt i), mean over the answer's tokens in
        nats, and 1.0 where every token has the same arg-max; `reference` is of `distributions`."""
        ...


@runtime_checkable
class GatedLVLM(LVLM, Protocol):
    """An LVLM that a pruner can be differentiated through, `micro_batch` prompts at a time."""

    micro_batch: int

    def gated_log_prob(
        self, encoded: Encoded, gate: Float[Tensor, "B V"], answers: Sequence[str]
    ) -> Float[Tensor, " B"]:
        """`score`'s log-probability with attention to each visual token weighted by its gate."""
        ...


@runtime_checkable
class Pruner(Protocol):
    """Decides which visual tokens live. `extras` names what it needs beyond the projected tokens.

    What choosing costs, in FLOPs per image, is `flops(shape, tokens, kept)`. What else a pruner may
    say of itself is in `pruners.base.BasePruner`, from which every pruner derives.
    """

    name: str
    extras: frozenset[str]

    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep exactly `budget(keep_ratio, n)` tokens per image; with None the pruner decides how
        many."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Turns an Outcome into named terms, each [T, B]: the reward of pruning step t = 1..T."""

    def __call__(self, outcome: Outcome) -> dict[str, Float[Tensor, "T B"]]: ...


@runtime_checkable
class Dataset(Protocol):
    """Samples together with their official score."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def score(self, sample: Sample, prediction: str) -> float: ...

    def teacher_forced(self, sample: Sample) -> bool:
        """Whether this sample's score equals "the greedy answer is exactly answers[0]" (then one
        teacher-forced forward replaces a generation)."""
        ...
