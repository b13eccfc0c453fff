"""Scorer x MMR: a learned importance, reranked by how much a token repeats what is chosen."""

from pathlib import Path

import torch
from torch.nn.functional import normalize

from tprl.budget import need_ratio
from tprl.cost import similarity_flops
from tprl.errors import UserError
from tprl.pruners.base import BasePruner
from tprl.pruners.learned import LearnedPruner, load_pruner
from tprl.pruners.mmr_attention import marginal_relevance
from tprl.runtime.finite import check_logits
from tprl.types import Encoded, TokenSelection


class ScorerMMR(BasePruner):
    """Maximal marginal relevance over the logits of a trained pruner.

    Source: IDPruner (arXiv 2602.13315) and its public form (AngelSlim, `idpruner.py`), the rule of
    docs/baselines.md#scorer_mmr: importance is the scorer's logit, brought linearly to [0, 1]
    within the image; the first token is the most important one; each next has the largest
    balance * importance - (1 - balance) * (largest cosine of projected tokens to a chosen one).
    Any trained pruner may be the scorer; the paper's is VisionSelector's (`selector`). Ours differs
    in the rounding of the budget and in ties (lower index). Complexity O(n^2 D + k n) per image,
    k steps in sequence, after the scorer.

    Args:
        pruner: the scorer.
        balance: of importance against redundancy; 0.5 in the public form.

    Raises:
        UserError: `balance` outside [0, 1].
    """

    def __init__(self, pruner: LearnedPruner, balance: float = 0.5) -> None:
        if not 0 <= balance <= 1:
            raise UserError(f"balance must be in [0, 1], got {balance}; use e.g. 0.5.")
        self.pruner, self.balance = pruner, balance
        self.name = "scorer_mmr"
        self.extras, self.trained_on = pruner.extras, pruner.trained_on
        self.reads_question = pruner.reads_question

    @property
    def learned(self) -> LearnedPruner:
        return self.pruner

    @torch.no_grad()
    def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
        """Keep `budget(keep_ratio, n)` tokens of each image.

        Raises:
            UserError: wrong width, logits that are not finite, or a ratio outside (0, 1].
        """
        ratio = need_ratio(self.name, keep_ratio)
        x = self.pruner.observe(encoded)
        logits = self.pruner.logits(x, ratio)
        check_logits(self.pruner.name, logits, x.mask, encoded.uids)
        images = x.images
        # [I W] importance in [0, 1] within the image; padding is never chosen.
        score, mask = images.split(logits).double(), images.mask
        low = score.masked_fill(~mask, torch.inf).amin(1, keepdim=True) if score.numel() else 0.0
        high = score.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) if score.numel() else 0.0
        importance = (score - low) / (high - low + 1e-6)
        unit = normalize(images.tokens(encoded).double(), dim=-1)
        redundancy = (1 - self.balance) * (unit @ unit.mT)
        k = images.budgets(ratio)
        keep = marginal_relevance(self.balance * importance, redundancy, mask, k)
        return TokenSelection(images.join(keep, x.mask))

    def flops_by_part(self, tokens: int, words: int, kept: int) -> dict[str, int]:
        """What choosing costs on one sample: the scorer without its own selection, and all cosines
        between projected tokens."""
        parts = self.pruner.flops_by_part(tokens, words, kept)
        parts.pop("dpp", None)
        return {**parts, "mmr": similarity_flops(tokens, self.pruner.token_width)}


def load_scorer_mmr(pretrained: str | Path, balance: float = 0.5) -> ScorerMMR:
    """MMR over the logits of a trained pruner: a folder, a run directory, or one that ships.

    Raises:
        UserError: nothing there, or `balance` outside [0, 1].
    """
    return ScorerMMR(load_pruner(pretrained), balance)
