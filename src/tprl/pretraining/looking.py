"""Where the embedded LVLM is told to look while stage `pretrain` teaches it.

The matching of words with tokens is found late when only the answer rewards it. Without any of this
the families of questions stayed at chance for 1,300 steps; without the words colors were still
confused after 6,000; without the way to count, the share of object tokens was taken for the number
of objects, which deceives the model under every pruner that keeps objects.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from tprl.data import scenes
from tprl.pretraining.packing import IGNORE, Pack

# weight of the start of the sequence while counting, in objects; 1 would hardly tell 5 from 6
SINK = 3.0


class Looking:
    """Aims for half of the heads of two layers of the language model; the other half is free.

    Lower layer: a visual token looks at the first kept token of its own object. Upper layer: a word
    for a color, a shape or a size looks at the tokens that have it, and whatever predicts a word of
    an answer at the objects that decide it. To count n objects it looks at the first token of each
    with weight 1 / (n + SINK), and with the rest at the start of the sequence: n can be read off
    linearly.

    Args:
        tokenizer: of the LVLM.
        families: of questions, in the order of a pack's numbers.
        conjunction: a word looks at what it and the words of the name before it describe ("small
            red circle": the last word at that circle alone), not at everything with its own
            property.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        families: Sequence[str] = scenes.FAMILIES,
        conjunction: bool = False,
    ) -> None:
        self.count, self.conjunction = families.index("count"), conjunction
        names = {
            "color": list(scenes.COLORS),
            "shape": list(scenes.SHAPES),
            "size": list(scenes.SIZES),
        }
        self.words = {
            name: torch.tensor(tokenizer.convert_tokens_to_ids(words))
            for name, words in names.items()
        }
        self.zero: Any = tokenizer.convert_tokens_to_ids("0")
        self.end: Any = tokenizer.eos_token_id

    def __call__(
        self,
        lower: Float[Tensor, "B H K K"],
        upper: Float[Tensor, "B H C K1"],
        kept: Int[Tensor, "B K"],
        pack: Pack,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """How far attention is from its aims (-log mass, or a divergence; nats), and the mass on
        them; both means.

        `lower` is the attention among the kept visual tokens, `upper` that of the text columns to
        the start of the sequence (column 0) and the kept visual tokens.
        """
        # [B K K] tokens of one object, and the first kept token of each.
        owner = pack.owner.gather(1, kept)
        same = (owner.unsqueeze(2) == owner.unsqueeze(1)) & (owner > 0).unsqueeze(2)
        first = (owner > 0) & ~same.tril(-1).any(2)
        # Columns that predict a word of an answer; counting has an aim of its own.
        answering = (pack.target != IGNORE) & (pack.target != self.end)
        counting = answering & (pack.family == self.count)
        # [B C K] where each text column should look, among the kept tokens.
        region = self.named(pack) | (_decisive(pack) & answering.unsqueeze(-1))
        region = region.gather(2, kept.unsqueeze(1).expand(-1, region.shape[1], -1))
        # Mass on the aims: of object tokens in the lower layer, of text columns in the upper one.
        inside, text = half_of_heads(lower), half_of_heads(upper)
        mass = (inside * (same & first.unsqueeze(1))).sum(-1)[owner > 0]
        seen = (text[..., 1:] * region).sum(-1)[region.any(-1) & ~counting]
        # The region of "none" holds every object, since all of them had to be looked at; none of
        # them counts.
        counted = (
            region[counting]
            & first[counting.nonzero()[:, 0]]
            & (pack.target[counting] != self.zero).unsqueeze(1)
        )
        # KL(aim || attention): weight 1 on each object, SINK on the start of the sequence.
        aim = F.pad(counted.float(), (1, 0), value=SINK)
        aim = aim / aim.sum(-1, keepdim=True)
        astray = (aim * ((aim + 1e-3) / (text[counting] + 1e-3)).log()).sum(-1)
        parts = [-(mass + 1e-3).log(), -(seen + 1e-3).log(), astray]
        return torch.stack([mean(part) for part in parts]).sum(), mean(torch.cat([mass, seen]))

    def named(self, pack: Pack) -> Bool[Tensor, "B C N"]:
        """The patches with the property that a text column names; none where it names none."""
        out = torch.zeros(
            *pack.text.shape, pack.owner.shape[1], dtype=torch.bool, device=pack.text.device
        )
        for name, ids in self.words.items():
            match = pack.text.unsqueeze(-1) == ids.to(pack.text.device)
            # label 0 is background
            number = torch.where(match.any(-1), match.int().argmax(-1) + 1, IGNORE)
            out |= getattr(pack, name).unsqueeze(1) == number.unsqueeze(-1)
        return self._with_words_before(out, pack) if self.conjunction else out

    def _with_words_before(self, named: Bool[Tensor, "B C N"], pack: Pack) -> Bool[Tensor, "B C N"]:
        """What each word describes together with the words of the same name before it, three words
        at most."""
        ids = torch.cat(list(self.words.values())).to(pack.text.device)
        is_name = torch.isin(pack.text, ids)
        # A word continues a name if the column before it is a name, too, of the same question.
        same_segment = pack.segment[:, :-1] == pack.segment[:, 1:]
        follows = F.pad(is_name[:, :-1] & is_name[:, 1:] & same_segment, (1, 0))
        # Each round carries the conjunction one word further.
        out = named
        for _ in range(2):
            before = F.pad(out[:, :-1], (0, 0, 1, 0))
            out = torch.where(follows.unsqueeze(-1), named & before, named)
        return out


def _decisive(pack: Pack) -> Bool[Tensor, "B C N"]:
    """The patches that decide the question which a text column belongs to."""
    return pack.region.gather(1, pack.segment.unsqueeze(-1).expand(-1, -1, pack.region.shape[2]))


def half_of_heads(attention: Float[Tensor, "B H Q K"]) -> Float[Tensor, "B Q K"]:
    """Mean over the first half of the heads."""
    return attention[:, : attention.shape[1] // 2].float().mean(1)


def mean(values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Mean; 0, with a gradient, of nothing: so few tokens may be kept that none lies on an
    object."""
    return values.mean() if len(values) else values.sum()


def cls_look(attention: Float[Tensor, "B H S S"], owner: Int[Tensor, "B N"]) -> Float[Tensor, ""]:
    """-log of the CLS attention (mean over heads) that each object gets, a mean over objects.

    Left alone, CLS prefers large objects, and a baseline that reads it loses small ones more often
    than chance does.
    """
    row = attention[:, :, 0, 1:].float().mean(1)
    objects = int(owner.max()) + 1
    # [B objects] attention by owner; column 0 is the background.
    mass = torch.zeros(len(row), objects, device=row.device).scatter_add(1, owner, row)
    # Objects that own no patch are not in the mean.
    patches = torch.zeros_like(mass).scatter_add(1, owner, torch.ones_like(row))[:, 1:]
    mass, there = mass[:, 1:], patches > 0
    return -(mass[there] + 1e-3).log().mean()


def next_look(
    attention: Float[Tensor, "B H S S"], owner: Int[Tensor, "B N"], neighbor: Int[Tensor, "B N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """-log of the attention (half of the heads) of an object's patches to its nearest object, and
    that attention.

    What stands next to an object cannot be told from its own patches, and was not found in 500
    steps without this.
    """
    inside = half_of_heads(attention[:, :, 1:, 1:])
    mass = (inside * (neighbor.unsqueeze(2) == owner.unsqueeze(1))).sum(-1)[owner > 0]
    return mean(-(mass + 1e-3).log()), mean(mass)
