"""The actor-critic: a small transformer over the alive visual tokens and the question."""

import math
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tprl.budget import Rows, image_rows, rows_by_size
from tprl.errors import UserError
from tprl.types import Encoded


class PolicyInput(NamedTuple):
    """All that the policy sees of a batch; it stays the same over the pruning steps of an
    episode."""

    codes: Float[Tensor, "B V Z"]
    xy: Float[Tensor, "B V 2"]  # center of each token in its image, (x, y) as fractions in [0, 1]
    mask: Bool[Tensor, "B V"]  # False on padded visual tokens
    query: Float[Tensor, "B Q D"]
    query_mask: Bool[Tensor, "B Q"]
    # of the diversity kernel, only where a DPP selects
    features: Float[Tensor, "B V F"] | None = None
    image: Int[Tensor, "B V"] | None = None  # which image a token belongs to; None: all the same
    prior: Float[Tensor, "B V"] | None = None  # what keep logits start from; None: 0
    scores: Float[Tensor, "B V S"] | None = None  # what the prior joins; the network reads it
    # Tokens of each image by sample, as plain numbers: with them `images` waits for no device.
    sizes: tuple[tuple[int, ...], ...] | None = None

    def rows(self, index: Int[Tensor, " R"]) -> "PolicyInput":
        """The same batch restricted to (or repeated at) the given rows; give `index` on the
        host."""
        numbers, place = index.tolist(), index.to(self.mask.device)
        *tensors, sizes = self
        parts = [None if part is None else part[place] for part in tensors]
        picked = None if sizes is None else tuple(sizes[number] for number in numbers)
        return PolicyInput(*parts, picked)  # type: ignore[arg-type]

    @property
    def longest(self) -> int | None:
        """Visual tokens of the sample with most, where the host knows them."""
        return None if self.sizes is None else max(map(sum, self.sizes), default=0)

    @property
    def images(self) -> Rows:
        """The batch as rows of images: budgets are per image."""
        if self.sizes is not None:
            return rows_by_size(self.sizes, self.mask.device)
        image = self.image
        if image is None:
            image = torch.zeros_like(self.mask, dtype=torch.long)
        return image_rows(self.mask, image)


class StateFeatures(NamedTuple):
    """What the encoder makes of a state; the heads read it."""

    tokens: Float[Tensor, "B N W"]  # the alive tokens
    at: Int[Tensor, "B N"]  # their indices in V
    valid: Bool[Tensor, "B N"]  # False where a sample has fewer
    words: Float[Tensor, "B Q1 W"]
    word_mask: Bool[Tensor, "B Q1"]


class PolicyNet(nn.Module):
    """Per-token keep logits and a state value from X = [Z_alive ; W q].

    A pre-norm GELU transformer encoder without dropout (rollout and update must see the same
    network), a residual MLP per token for the logit, and a residual MLP on the mean over alive
    tokens for the value. Step and keep ratio are added to every token, because the horizon is
    finite and one policy serves all ratios. Codes and query are layer-normalized first: their scale
    depends on the LVLM. Dead tokens are left out, not only masked, so that later steps cost less.

    Args:
        code_width: Z, width of the visual codes.
        query_width: D, width of the question's embeddings.
        width: model width; a multiple of `heads`.
        layers: encoder blocks.
        heads: attention heads.
        max_steps: largest number of pruning steps; the step index is embedded.
        query: "tokens" lets visual tokens attend to every word, "pooled" to their mean, "none"
            hides the question.
        positions: add a projection of sines and cosines of each token's place in its image.
        budgets: outputs of the budget head (see `budget_logits`); 0 for none.
        scores: S, scores of each token (`PolicyInput.scores`) that are read beside its code.

    Raises:
        UserError: `width` is not a multiple of `heads`, or `query` is unknown.
    """

    def __init__(
        self,
        code_width: int,
        query_width: int,
        width: int = 128,
        layers: int = 2,
        heads: int = 8,
        max_steps: int = 3,
        query: str = "tokens",
        positions: bool = True,
        budgets: int = 0,
        scores: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(
                f"policy.width must be a multiple of policy.heads={heads}, got {width}."
            )
        if query not in ("tokens", "pooled", "none"):
            raise UserError(f"policy.query must be tokens, pooled or none, got {query}.")
        self.query, self.max_steps, self.width = query, max_steps, width
        self.code_width, self.query_width = code_width, query_width
        # What enters: codes, words, places, the step and the budget, all as vectors of `width`.
        self.code_in = nn.Sequential(nn.LayerNorm(code_width), nn.Linear(code_width, width))
        self.query_in: nn.Module | None = None
        if query != "none":
            self.query_in = nn.Sequential(nn.LayerNorm(query_width), nn.Linear(query_width, width))
        self.place = nn.Linear(4 * OCTAVES, width) if positions else None
        self.score_in = nn.Linear(scores, width) if scores else None
        self.step = nn.Embedding(max_steps, width)
        self.ratio = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.kind = nn.Parameter(torch.zeros(2, width))  # tells visual tokens from words
        # What reads it, and one head for each of the two answers.
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))
        self.policy_head = Head(width)
        self.value_head = Head(width)
        self._initialize()
        self.budget_head: nn.Module | None = None
        if budgets:
            self.add_budget_head(budgets)

    def add_budget_head(self, budgets: int) -> None:
        """A fresh head for `budget_logits`; the rest stays."""
        width = self.kind.shape[1]
        layers = (
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Linear(width, budgets),
        )
        self.budget_head = nn.Sequential(*layers).to(self.kind.device)

    def forward(
        self, x: PolicyInput, alive: Bool[Tensor, "B V"], step: int, keep_ratio: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B V"], Float[Tensor, " B"]]:
        """Logits [B V] (0 where not alive) and values [B] of the state at pruning step `step`
        (0-based).

        Raises:
            UserError: `step` is beyond `max_steps`.
        """
        read = self.read(x, alive, step, keep_ratio)
        value = self.value_head(_mean(read.tokens, read.valid)).float()
        return self.keep_logits(read, x, alive), value

    def read(
        self, x: PolicyInput, alive: Bool[Tensor, "B V"], step: int, keep_ratio: Float[Tensor, " B"]
    ) -> StateFeatures:
        """The encoder's outputs.

        Raises:
            UserError: `step` is beyond `max_steps`.
        """
        if not 0 <= step < self.max_steps:
            raise UserError(
                f"pruning step {step} is beyond policy.max_steps={self.max_steps}: raise max_steps."
            )
        if alive is x.mask:
            # Nothing is pruned yet: every column as it stands, up to the last one that some sample
            # has. A trace then holds no count of tokens.
            width = alive.shape[1] if x.longest is None else max(x.longest, 1)
            valid = alive[:, :width]
            at = torch.arange(width, device=alive.device).expand_as(valid)
            scores = None if x.scores is None else x.scores[:, :width]
            tokens = self._embedded(x.codes[:, :width], x.xy[:, :width], valid, scores)
        else:
            # Dead tokens are left out, so later steps cost less: [B N W].
            at = alive_first(alive)
            valid = alive.gather(1, at)
            index = at.unsqueeze(2)

            def living(part: Tensor) -> Tensor:
                return part.gather(1, index.expand(-1, -1, part.shape[2]))

            scores = None if x.scores is None else living(x.scores)
            tokens = self._embedded(living(x.codes), living(x.xy), valid, scores)
        words, word_mask = self._words(x)
        # One sequence of visual tokens and words, [B N + Q W].
        everything = torch.cat([tokens, words], 1)
        keys = torch.cat([valid, word_mask], 1)
        # Budget and step are added to every token: one policy serves all of them.
        ratio = keep_ratio.to(tokens.dtype).unsqueeze(1)
        condition = self.ratio(torch.cat([ratio, ratio.log()], 1)) + self.step.weight[step]
        everything = everything + condition.unsqueeze(1)
        for block in self.blocks:
            everything = block(everything, keys)
        visual, asked = everything[:, : at.shape[1]], everything[:, at.shape[1] :]
        return StateFeatures(visual, at, valid, asked, word_mask)

    def keep_logits(
        self, read: StateFeatures, x: PolicyInput, alive: Bool[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """One logit per token, 0 where not alive: the prior, if there is one, and what was
        learned."""
        # [B N] of the tokens that were read, then [B V] at their columns.
        learned = self.policy_head(read.tokens).masked_fill(~read.valid, 0.0)
        logits = torch.zeros_like(alive, dtype=learned.dtype).scatter(1, read.at, learned).float()
        return logits if x.prior is None else logits + x.prior.masked_fill(~alive, 0.0)

    def budget_logits(self, gist: Float[Tensor, "B F"]) -> Float[Tensor, "B K"]:
        """Log-odds that the answer survives each of K budgets, from the `gist` of a reading."""
        assert self.budget_head is not None
        return self.budget_head(gist).float()

    def _embedded(
        self,
        codes: Float[Tensor, "B N Z"],
        xy: Float[Tensor, "B N 2"],
        valid: Bool[Tensor, "B N"],
        scores: Float[Tensor, "B N S"] | None,
    ) -> Float[Tensor, "B N W"]:
        """Tokens as the encoder reads them. Contents of those that are not alive are erased, not
        only masked: a NaN among them would survive an attention weight of zero."""

        def erased(part: Tensor) -> Tensor:
            return part.masked_fill(~valid.unsqueeze(2), 0.0).to(self.kind.dtype)

        tokens = self.code_in(erased(codes)) + self.kind[0]
        if self.place is not None:
            tokens = tokens + self.place(sinusoids(erased(xy)))
        if self.score_in is not None:
            assert scores is not None
            tokens = tokens + self.score_in(erased(scores))
        return tokens

    def _words(self, x: PolicyInput) -> tuple[Float[Tensor, "B Q1 W"], Bool[Tensor, "B Q1"]]:
        """The question as tokens: all words with their order, one mean, or nothing."""
        mask = x.query_mask
        if self.query_in is None:
            return x.query.new_zeros(len(mask), 0, self.width, dtype=self.kind.dtype), mask[:, :0]
        # [B Q W] padding is erased: a NaN in it would survive an attention weight of zero.
        real = x.query.masked_fill(~mask.unsqueeze(-1), 0.0).to(self.kind.dtype)
        words = self.query_in(real) + self.kind[1]
        if self.query == "tokens":
            # Rank among the question's own words, so that left, right or no padding gives the same.
            rank = (mask.cumsum(1) - 1).clamp(min=0)
            return words + order_code(rank, self.width).to(words.dtype), mask
        return _mean(words, mask).unsqueeze(1), mask.new_ones(len(mask), 1)

    def _initialize(self) -> None:
        # Orthogonal with gain sqrt(2), as usual for actor-critics.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, math.sqrt(2))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.step.weight, std=0.02)
        nn.init.normal_(self.kind, std=0.02)
        # A small last layer: the first policy is nearly uniform.
        nn.init.orthogonal_(self.policy_head.out.weight, 0.01)
        nn.init.orthogonal_(self.value_head.out.weight, 1.0)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block. Written out because `nn.TransformerEncoderLayer` switches to
    another kernel under no_grad, and the log-probabilities of rollout and update must be the same
    numbers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, x: Float[Tensor, "B N W"], keys: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B N W"]:
        """Every token attends to the tokens where `keys` is True."""
        # [B N 3W] -> three of [B H N W/H].
        joint = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        # A sample without any key (text only, no question) attends to everything; its output is
        # never used.
        mask = (keys | ~keys.any(1, keepdim=True))[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # Heads side by side again: [B N W].
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Head(nn.Module):
    """Residual MLP, then one number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Float[Tensor, "*N W"]) -> Float[Tensor, "*N"]:
        return self.out(self.norm(x + self.mlp(x))).squeeze(-1)


def gist(read: StateFeatures) -> Float[Tensor, "B F"]:
    """The mean token beside the mean word: F = 2 W."""
    return torch.cat([_mean(read.tokens, read.valid), _mean(read.words, read.word_mask)], 1)


def _mean(x: Float[Tensor, "B N W"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B W"]:
    """Mean over the entries where `mask` is True; 0 where there are none."""
    return x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def alive_first(alive: Bool[Tensor, "B V"]) -> Int[Tensor, "B N"]:
    """Indices of the alive tokens in order, then of dead ones; N is the batch's largest alive
    count, at least 1."""
    width = max(int(alive.sum(1).max()), 1) if len(alive) else 1
    # Stable: alive tokens keep their raster order.
    return (~alive).to(torch.int8).argsort(dim=1, stable=True)[:, :width]


OCTAVES = 6  # finest period 1/16 of the image side: two tokens of a 32 x 32 grid


def sinusoids(xy: Float[Tensor, "B V 2"]) -> Float[Tensor, "B V F"]:
    """sin and cos of pi * 2^j * (x, y), j = 0..OCTAVES-1: F = 4 * OCTAVES features per token."""
    octave = torch.arange(OCTAVES, device=xy.device, dtype=xy.dtype)
    # [B V 2 OCTAVES]
    angles = xy.unsqueeze(-1) * (math.pi * 2.0**octave)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(2)


def order_code(rank: Int[Tensor, "B Q"], width: int) -> Float[Tensor, "B Q W"]:
    """Sine-cosine code of a word's rank (Vaswani et al. 2017, section 3.5); any length, no
    parameters."""
    # [B Q W/2] angles; sine and cosine of one rate stand side by side.
    rate = torch.exp(-math.log(1e4) * torch.arange(0, width, 2, device=rank.device) / width)
    angles = rank.unsqueeze(-1) * rate
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(2)[..., :width]


def places(encoded: Encoded) -> Float[Tensor, "B V 2"]:
    """Center (x, y) of every visual token in its image, fractions of width and height; 0 where
    padded."""
    out = torch.zeros(*encoded.visual_mask.shape, 2)
    tables: dict[tuple[int, int], Tensor] = {}
    for b, images in enumerate(encoded.grids):
        start = 0
        # Views of a sample follow each other in V, each with fractions of its own.
        for rows, columns in chain.from_iterable(images):
            if (rows, columns) not in tables:
                y = (torch.arange(rows) + 0.5).div(rows).repeat_interleave(columns)
                x = (torch.arange(columns) + 0.5).div(columns).repeat(rows)
                tables[rows, columns] = torch.stack([x, y], 1)
            out[b, start : start + rows * columns] = tables[rows, columns]
            start += rows * columns
    return out.to(encoded.embeds.device)
