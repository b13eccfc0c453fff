"""The second phase: questions, with the loss on answers, on few or all visual tokens.

Half of the heads of two layers of the language model are told where to look: a word of a question
at the patches that show what it names, and two layers later what writes the answer at where it is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tprl.errors import UserError
from tprl.pretraining.looking import half_of_heads, mean
from tprl.pretraining.losses import outside_loss
from tprl.pretraining.reading import packed_mask
from tprl.pretraining.tiny_llava import TinyLlava

from .attention import LIGHT
from .blueprint import number_ids
from .packs import Packer
from .readings import Rated, Reading
from .tower import soft_cross_entropy

LOOK = 0.3  # weight of where to look
SIGMA = 1.5  # pixels


class Reader:
    """Losses of the language model.

    Args:
        parts: the models, where they stay; the tower is left as it is.
    """

    def __init__(self, parts: TinyLlava) -> None:
        self.llava, tokenizer = parts.llava, parts.processor.tokenizer
        self.model: Any = parts.llava.model.language_model
        layers = len(self.model.layers)
        if layers < 4 or self.model.config.num_attention_heads < 2:
            raise UserError(
                "two layers are told where to look: use at least four layers and two heads."
            )
        self.asking, self.answering = layers // 2 - 1, layers // 2 + 1
        device = parts.llava.device
        self.numbers = torch.tensor(number_ids(tokenizer), device=device)
        self.before = torch.tensor(Packer(parts.processor).before(), device=device)
        if self.model.config._attn_implementation != LIGHT:
            for number in (self.asking, self.answering):  # fast attention gives no weights
                self.model.layers[number].self_attn.config = _eager(self.model.config)

    def terms(self, features: Float[Tensor, "B N C"], asked: Reading) -> dict[str, Tensor | float]:
        """Losses, nats, and rates of what is right, in percent of answers."""
        kept, total = asked.kept, features.shape[1]
        picked = features.gather(1, kept.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        tokens = self.llava.model.multi_modal_projector(picked)
        hidden, looks = self._read(tokens, asked, total)
        logits = self.llava.lm_head(hidden.flatten(0, 1)[asked.at]).float()
        loss = self.answer_loss(logits, asked.target, asked.place, asked.points)
        weight = asked.weight
        answer = (weight * loss).sum() / weight.sum().clamp(min=1e-6)
        look, mass = self._look(looks, asked)
        full = kept.shape[1] == total
        return {
            "loss/answer": answer,
            "loss/look": LOOK * look,
            "attention_mass": mass,
            "kept": kept.shape[1] / total,
            **self._rates(logits, asked, "full" if full else "pruned"),
        }

    def answer_loss(
        self, logits: Tensor, target: Tensor, place: Tensor, points: Int[Tensor, " P"]
    ) -> Tensor:
        """Of every token of answers, nats; `points` are those that are coordinates."""
        loss = F.cross_entropy(logits, target, reduction="none")
        pointing = logits[points]
        near = soft_cross_entropy(pointing[:, self.numbers], place[points], SIGMA)
        return loss.index_copy(0, points, near + outside_loss(pointing, self.numbers))

    def _rates(self, logits: Tensor, asked: Reading, name: str) -> dict[str, Tensor]:
        """Share of questions answered right under teacher forcing: every token, or a click in the
        box."""
        right = logits.argmax(-1) == asked.target
        return {
            f"{name}/{label}": self._clicks(logits, asked.place, rated)
            if rated.pointing
            else _words_right(right, rated)
            for label, rated in asked.rated.items()
        }

    def _clicks(self, logits: Tensor, place: Tensor, rated: Rated) -> Tensor:
        guess = logits[rated.at][:, self.numbers].argmax(-1).view(-1, 4).float()
        true = place[rated.at].view(-1, 4)
        center = (guess[:, :2] + guess[:, 2:]) / 2
        return ((center >= true[:, :2]) & (center <= true[:, 2:])).all(-1).float().mean()

    def _read(
        self, tokens: Float[Tensor, "B K D"], asked: Reading, total: int
    ) -> tuple[Float[Tensor, "B C D"], list[Float[Tensor, "B H C K"]]]:
        """Hidden states of the text columns, and how two layers look from there at visual
        tokens."""
        model, start, text = self.model, len(self.before), asked.text.shape[1]
        before = self.before.expand(len(tokens), -1)
        embeds = torch.cat([model.embed_tokens(before), tokens, model.embed_tokens(asked.text)], 1)
        places = [
            torch.arange(start, device=tokens.device).expand(len(tokens), -1),
            asked.kept + start,
            asked.offset + start + total,
        ]
        seen = packed_mask(asked.segment, start + tokens.shape[1])
        # Additive: eager attention adds its mask, and adding a boolean one masks nothing.
        lowest = torch.finfo(tokens.dtype).min
        mask = torch.zeros_like(seen, dtype=tokens.dtype).masked_fill(~seen, lowest)
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

    def _look(self, looks: list[Tensor], asked: Reading) -> tuple[Tensor, Tensor]:
        """-log of the attention on what is meant, nats, and its mass; means over columns that mean
        something."""
        masses = [
            (half_of_heads(attention) * meant).sum(-1).flatten()[at]
            for attention, meant, at in zip(looks, asked.meant, asked.looking, strict=True)
        ]
        losses = torch.stack([mean(-(mass + 1e-3).log()) for mass in masses])
        return losses.sum(), mean(torch.cat(masses))


def _words_right(right: Tensor, rated: Rated) -> Tensor:
    """Share of answers of which every token is right."""
    wrong = torch.zeros(rated.count, device=right.device)
    wrong = wrong.index_add(0, rated.answer, (~right[rated.at]).float())
    return (wrong == 0).float().mean()


def _eager(config: Any) -> Any:
    """The same settings with attention that shows its weights."""
    other = type(config).from_dict(config.to_dict())
    other._attn_implementation = "eager"
    return other
