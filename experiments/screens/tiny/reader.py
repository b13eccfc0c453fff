"""The second phase: questions, with the loss on answers, on few or all visual tokens.

Half of the heads of two layers of the language model are told where to look: a word of a question
at the patches that show what it names, and two layers later what writes the answer at where it is.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.data.screens import FAMILIES
from tprl.errors import UserError
from tprl.pretraining.looking import half_of_heads, mean
from tprl.pretraining.losses import outside_loss
from tprl.pretraining.reading import packed_mask
from tprl.pretraining.tiny_llava import TinyLlava

from .blueprint import number_ids
from .labels import IGNORE
from .packs import Pack, Packer
from .tower import soft_cross_entropy

LOOK = 0.3  # weight of where to look
SIGMA = 1.5  # pixels


class Reader:
    """Losses of the language model.

    Args:
        parts: the models; the tower is left as it is.
        full_share: share of the steps that see all visual tokens.
        keep_low: least kept share of the others, reached over the first third of the phase.
        shown_share: share of the pages whose dropout prefers patches that show something.
    """

    def __init__(
        self,
        parts: TinyLlava,
        full_share: float = 0.2,
        keep_low: float = 0.03,
        shown_share: float = 0.5,
    ) -> None:
        self.llava, tokenizer = parts.llava, parts.processor.tokenizer
        self.model: Any = parts.llava.model.language_model
        layers = len(self.model.layers)
        if layers < 4 or self.model.config.num_attention_heads < 2:
            raise UserError(
                "two layers are told where to look: use at least four layers and two heads."
            )
        self.asking, self.answering = layers // 2 - 1, layers // 2 + 1
        self.full_share, self.keep_low, self.shown_share = full_share, keep_low, shown_share
        self.numbers = torch.tensor(number_ids(tokenizer))
        self.before = torch.tensor(Packer(parts.processor).before())
        for number in (self.asking, self.answering):  # fast attention does not give its weights
            self.model.layers[number].self_attn.config = _eager(self.model.config)

    def kept_tokens(
        self, visible: Bool[Tensor, "B N"], done: float, *key: int
    ) -> Int[Tensor, "B K"]:
        """Indices of the visual tokens of a step, in raster order.

        Args:
            shown: patches that show something.
            done: share of the phase that is over.
            key: decides the draw.
        """
        number = int(np.random.default_rng([3, *key]).integers(2**31))
        generator = torch.Generator().manual_seed(number)
        low = 0.4 + (self.keep_low - 0.4) * min(1.0, 3 * done)
        full = torch.rand((), generator=generator) < self.full_share
        share = low ** float(torch.rand((), generator=generator))  # log-uniform
        count = visible.shape[1] if full else max(1, round(share * visible.shape[1]))
        chance = torch.rand(visible.shape, generator=generator)
        strength, prefers = torch.rand(2, len(visible), 1, generator=generator)
        chance = chance - strength * (prefers < self.shown_share) * visible
        return chance.argsort(1)[:, :count].sort(1).values

    def terms(
        self, features: Float[Tensor, "B N C"], pack: Pack, kept: Int[Tensor, "B K"]
    ) -> dict[str, Tensor]:
        """Losses, nats, and rates of what is right, in percent of answers."""
        picked = features.gather(1, kept.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        tokens = self.llava.model.multi_modal_projector(picked)
        hidden, looks = self._read(tokens, kept, pack, features.shape[1])
        rows = pack.target != IGNORE
        logits = self.llava.lm_head(hidden[rows]).float()
        loss = self._answer_loss(logits, pack.target[rows], pack.place[rows])
        # Every question weighs the same, whatever the length of its answer.
        length = torch.zeros(pack.region.shape[:2]).scatter_add(1, pack.segment, rows.float())
        weight = 1 / length.gather(1, pack.segment)[rows]
        terms = {"loss/answer": (weight * loss).sum() / weight.sum().clamp(min=1e-6)}
        look, terms["attention_mass"] = self._look(looks, kept, pack)
        terms["loss/look"] = LOOK * look
        terms["kept"] = torch.tensor(kept.shape[1] / features.shape[1])
        full = kept.shape[1] == features.shape[1]
        return terms | self._rates(logits, pack, rows, "full" if full else "pruned")

    def _answer_loss(self, logits: Tensor, target: Tensor, place: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target, reduction="none")
        point = place >= 0
        near = soft_cross_entropy(logits[point][:, self.numbers], place[point], SIGMA)
        return loss.masked_scatter(point, near + outside_loss(logits[point], self.numbers))

    def _rates(self, logits: Tensor, pack: Pack, rows: Tensor, name: str) -> dict[str, Tensor]:
        """Share of questions answered right under teacher forcing: every token, or a click in the
        box."""
        number = (torch.arange(len(pack.text)).unsqueeze(1) * pack.region.shape[1] + pack.segment)[
            rows
        ]
        target, place, family = pack.target[rows], pack.place[rows], pack.family[rows]
        right = logits.argmax(-1) == target
        terms: dict[str, Tensor] = {}
        for at, label in enumerate(FAMILIES):
            chosen = family == at
            if not bool(chosen.any()):
                continue
            if bool((place[chosen] >= 0).any()):
                point = chosen & (place >= 0)
                guess = logits[point][:, self.numbers].argmax(-1).view(-1, 4).float()
                true = place[point].view(-1, 4)
                center = (guess[:, :2] + guess[:, 2:]) / 2
                rate = ((center >= true[:, :2]) & (center <= true[:, 2:])).all(-1).float().mean()
            else:
                wrong = torch.zeros(int(number.max()) + 1).index_add(
                    0, number[chosen], (~right[chosen]).float()
                )
                rate = (wrong[number[chosen].unique()] == 0).float().mean()
            terms[f"{name}/{label}"] = rate
        return terms

    def _read(
        self, tokens: Float[Tensor, "B K D"], kept: Int[Tensor, "B K"], pack: Pack, total: int
    ) -> tuple[Float[Tensor, "B C D"], list[Float[Tensor, "B H C K"]]]:
        """Hidden states of the text columns, and how two layers look from there at visual
        tokens."""
        model, start, text = self.model, len(self.before), pack.text.shape[1]
        before = self.before.expand(len(tokens), -1)
        embeds = torch.cat([model.embed_tokens(before), tokens, model.embed_tokens(pack.text)], 1)
        places = [
            torch.arange(start).expand(len(tokens), -1),
            kept + start,
            pack.offset + start + total,
        ]
        seen = packed_mask(pack.segment, start + tokens.shape[1])
        # Additive: eager attention adds its mask, and adding a boolean one masks nothing.
        mask = torch.zeros(seen.shape, dtype=tokens.dtype).masked_fill(
            ~seen, torch.finfo(tokens.dtype).min
        )
        weights: list[Tensor] = []
        hooks = [
            model.layers[number].self_attn.register_forward_hook(
                lambda module, inputs, output: weights.append(output[1])
            )
            for number in (self.asking, self.answering)
        ]
        out = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=torch.cat(places, 1),
            use_cache=False,
        )
        for hook in hooks:
            hook.remove()
        image = slice(start, start + tokens.shape[1])
        return out.last_hidden_state[:, -text:], [weight[:, :, -text:, image] for weight in weights]

    def _look(self, looks: list[Tensor], kept: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        """-log of the attention on what is meant, nats, and its mass; means over columns that mean
        something."""
        answer = (pack.target != IGNORE).unsqueeze(-1) & pack.region.gather(
            1, pack.segment.unsqueeze(-1).expand(-1, -1, pack.region.shape[2])
        )
        masses = []
        for attention, meant in zip(looks, (pack.named, answer), strict=True):
            meant = meant.gather(2, kept.unsqueeze(1).expand(-1, meant.shape[1], -1))
            masses.append((half_of_heads(attention) * meant).sum(-1)[meant.any(-1)])
        losses = torch.stack([mean(-(mass + 1e-3).log()) for mass in masses])
        return losses.sum(), mean(torch.cat(masses))


def _eager(config: Any) -> Any:
    """The same settings with attention that shows its weights."""
    other = type(config).from_dict(config.to_dict())
    other._attn_implementation = "eager"
    return other
