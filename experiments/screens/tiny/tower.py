"""The first phase: every patch tells, through the projector, what it shows (dense supervision).

Words are told in the language model's own embedding of them, so that it begins its phase with
visual tokens in which its words can be found.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tprl.pretraining.tiny_llava import TinyLlava

from .blueprint import SIDE, SPACE, vocabulary
from .labels import ICONS, IGNORE, NUMBER, OTHER, POINTS, ROLES
from .targets import Chosen, Targets

BIN = 4  # pixels of a class of coordinates
BINS = SIDE // BIN + 1
BANDS = 5  # of four rows of patches, in which lines are read at first
WEIGHTS = {
    "glyph": 1.0, "character": 0.5, "word": 1.0, "number": 0.3, "name": 0.7, "key": 0.2,
    "icon": 0.5, "role": 0.3, "checked": 0.3, "active": 0.2, "box": 0.3, "edge": 3.0,
    "present": 0.3, "cls_look": 0.1, "contrast": 0.3,
}  # fmt: skip


class DenseHeads(nn.Module):
    """What is read off a patch; only the tower, the projector and the word embeddings outlive them.

    Args:
        parts: the models.
        middle: after which layer of the tower characters are asked for a first time.
    """

    def __init__(self, parts: TinyLlava, middle: int = 3) -> None:
        super().__init__()
        config: Any = parts.llava.config
        tower, width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.middle = middle
        self.glyph = nn.Linear(tower, POINTS * (OTHER + 1))
        self.character = nn.Linear(width, POINTS * (OTHER + 1))
        self.number = nn.Linear(width, NUMBER * 11)
        self.words = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("word", "name", "key")}
        )
        self.none = nn.Parameter(torch.zeros(3, width))
        sizes = {"icon": len(ICONS) + 1, "role": len(ROLES) + 1, "checked": 2, "active": 2}
        self.classes = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.box = nn.Linear(width, 4 * BINS)
        self.edge = nn.Linear(width, 4)
        ids = [number for number, token in enumerate(vocabulary()) if token[:1] == SPACE]
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.present = nn.Linear(tower, len(ids))
        self.register_buffer(
            "place", torch.zeros(len(vocabulary()), dtype=torch.long), persistent=False
        )
        self.place: Tensor
        self.place[self.ids] = torch.arange(1, len(ids) + 1)  # 0 is no word

    def word_logits(
        self, which: str, tokens: Float[Tensor, "P D"], embedding: Tensor
    ) -> Float[Tensor, "P words1"]:
        """Logits of no word and of every word."""
        row = list(self.words).index(which)
        table = torch.cat([self.none[row : row + 1], embedding[self.ids]])
        return self.words[which](tokens) @ table.T

    def places(self, target: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Classes of word tokens; IGNORE stays."""
        return torch.where(target >= 0, self.place[target.clamp(min=0)], IGNORE)


def see(
    tower: nn.Module, pixels: Float[Tensor, "B 3 H W"], middle: int
) -> tuple[Float[Tensor, "B N1 C"], Float[Tensor, "B N C"], Float[Tensor, "B N"]]:
    """Features of the last layer but one, CLS first; those of patches after layer `middle`; and how
    CLS looks at patches (mean over heads) in the layer that makes the features."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    between = hidden[:, 1:]
    layers = tower.encoder.layers[:-1]
    for number, layer in enumerate(layers, 1):
        before = hidden
        hidden = layer(hidden, attention_mask=None)
        if number == middle:
            between = hidden[:, 1:]
    return hidden, between, cls_row(layers[-1], before)


def see_lines(
    tower: nn.Module, pixels: Float[Tensor, "B 3 H W"], middle: int, bands: int = BANDS
) -> Float[Tensor, "B N C"]:
    """Features of patches after layer `middle`, seen in bands of some rows each that know nothing
    of each other: enough to read a line, for a fifth of the attention."""
    patches = tower.pre_layrnorm(tower.embeddings(pixels))[:, 1:]
    hidden = patches.unflatten(1, (bands, -1)).flatten(0, 1)
    for layer in tower.encoder.layers[:middle]:
        hidden = layer(hidden, attention_mask=None)
    return hidden.unflatten(0, (-1, bands)).flatten(1, 2)


def cls_row(layer: nn.Module, hidden: Float[Tensor, "B N1 C"]) -> Float[Tensor, "B N"]:
    """The first row of a layer's attention without CLS itself: fast attention does not give it."""
    attention, normal = layer.self_attn, layer.layer_norm1(hidden)
    heads = attention.num_heads
    query = attention.q_proj(normal[:, :1]).unflatten(-1, (heads, -1))
    keys = attention.k_proj(normal).unflatten(-1, (heads, -1))
    score = torch.einsum("bqhd,bkhd->bhqk", query, keys).float() * attention.scale
    return score.softmax(-1)[:, :, 0, 1:].mean(1)


def cls_look(row: Float[Tensor, "B N"], asked: Targets) -> Float[Tensor, ""]:
    """-log of the attention of CLS that each element gets, a mean over elements, nats."""
    mass = torch.zeros(len(row), asked.elements, device=row.device)
    mass = mass.scatter_add(1, asked.owner, row)
    return -(mass.flatten()[asked.there] + 1e-3).log().mean()


def dense_terms(
    heads: DenseHeads,
    tokens: Float[Tensor, "B N D"],
    between: Float[Tensor, "B N C"],
    embedding: Float[Tensor, "vocab D"],
    asked: Targets,
) -> dict[str, Tensor]:
    """Losses (nats, not weighted) and rates of what is right, of what patches show."""
    flat = tokens.flatten(0, 1)
    terms = text_terms(heads, tokens, flat, between, embedding, asked)
    _names(terms, heads, flat, embedding, asked)
    _classes(terms, heads, flat, asked)
    terms |= number_terms(heads, flat, asked.numbers)
    _boxes(terms, heads, flat, asked.boxes)
    return terms


def text_terms(
    heads: DenseHeads,
    tokens: Float[Tensor, "B N D"],
    flat: Float[Tensor, "BN D"],
    between: Float[Tensor, "B N C"],
    embedding: Float[Tensor, "vocab D"],
    asked: Targets,
) -> dict[str, Tensor]:
    """What is written: characters and words; numbers have `number_terms`.

    Args:
        heads: that are asked.
        tokens, flat: the same tokens twice, so that their gradients add up in one order.
        between: features in the middle of the tower.
        embedding: of the language model's words.
        asked: what is written.
    """
    terms: dict[str, Tensor] = {}
    for name, features in (("glyph", between), ("character", tokens)):
        logits = getattr(heads, name)(features).float().unflatten(-1, (POINTS, -1))
        _characters(terms, name, logits, asked.characters)
    _word(terms, heads, flat, embedding, "word", asked.words["word"])
    return terms


def _characters(terms: dict[str, Tensor], name: str, logits: Tensor, target: Tensor) -> None:
    loss = F.cross_entropy(
        logits.flatten(0, -2), target.flatten(), reduction="none", ignore_index=IGNORE
    )
    # Most points see no text; they would teach nothing but that.
    weight = torch.where(target.flatten() > 0, 1.0, 0.1) * (target.flatten() != IGNORE)
    terms[f"loss/{name}"] = (loss * weight).sum() / weight.sum().clamp(min=1)
    text = target > 0
    terms[f"{name}_accuracy"] = ((logits.argmax(-1) == target) & text).sum() / text.sum()


def _word(
    terms: dict[str, Tensor],
    heads: DenseHeads,
    tokens: Float[Tensor, "BN D"],
    embedding: Tensor,
    which: str,
    chosen: Chosen,
) -> None:
    """Words are asked where there are some, and of as many of the other patches as there are of
    these, at most."""
    logits = heads.word_logits(which, tokens[chosen.at], embedding).float()
    truth = heads.places(chosen.truth)
    terms[f"loss/{which}"] = F.cross_entropy(logits, truth)
    right = logits.argmax(-1) == truth
    terms[f"{which}_accuracy"] = right[chosen.counted].float().mean()


def _names(
    terms: dict[str, Tensor],
    heads: DenseHeads,
    tokens: Float[Tensor, "BN D"],
    embedding: Tensor,
    asked: Targets,
) -> None:
    """Names of elements, and of what is around them."""
    _word(terms, heads, tokens, embedding, "key", asked.words["key"])
    if not len(asked.names.at):
        return
    logits = heads.word_logits("name", tokens[asked.names.at], embedding).float()
    names = heads.places(asked.names.truth)
    labeled = names >= 0
    share = labeled / labeled.sum(-1, keepdim=True)
    picked = logits.log_softmax(-1).gather(-1, names.clamp(min=0))
    terms["loss/name"] = -(picked * share).sum(-1).mean()
    terms["name_accuracy"] = (logits.argmax(-1, keepdim=True) == names).any(-1).float().mean()


def _classes(
    terms: dict[str, Tensor], heads: DenseHeads, tokens: Float[Tensor, "BN D"], asked: Targets
) -> None:
    for name, head in heads.classes.items():
        chosen = asked.classes[name]
        if not len(chosen.at):
            continue
        logits = head(tokens[chosen.at]).float()
        terms[f"loss/{name}"] = F.cross_entropy(logits, chosen.truth)
        right = logits.argmax(-1) == chosen.truth
        terms[f"{name}_accuracy"] = right[chosen.counted].float().mean()


def number_terms(
    heads: DenseHeads, tokens: Float[Tensor, "BN D"], chosen: Chosen
) -> dict[str, Tensor]:
    """The digits of numbers; nothing where there are none."""
    if not len(chosen.at):
        return {}
    logits = heads.number(tokens[chosen.at]).float().unflatten(-1, (NUMBER, -1))
    return {
        "loss/number": F.cross_entropy(logits.flatten(0, 1), chosen.truth.flatten()),
        "number_accuracy": (logits.argmax(-1) == chosen.truth).all(-1).float().mean(),
    }


def _boxes(
    terms: dict[str, Tensor], heads: DenseHeads, tokens: Float[Tensor, "BN D"], chosen: Chosen
) -> None:
    truth = chosen.truth
    if not len(chosen.at):
        return
    classes = heads.box(tokens[chosen.at]).float().unflatten(-1, (4, BINS))
    terms["loss/box"] = soft_cross_entropy(classes, truth / BIN).mean()
    edges = heads.edge(tokens[chosen.at]).float()
    terms["loss/edge"] = F.smooth_l1_loss(edges, truth / SIDE, beta=0.05)
    terms["box_error"] = (classes.argmax(-1) * BIN - truth).abs().mean()


def soft_cross_entropy(
    logits: Float[Tensor, "... bins"], target: Float[Tensor, "..."], sigma: float = 0.7
) -> Float[Tensor, "..."]:
    """Cross-entropy against a Gaussian around a coordinate, in bins: one that is nearly right is
    nearly right."""
    bins = torch.arange(logits.shape[-1], device=logits.device)
    soft = torch.softmax(-((bins - target.unsqueeze(-1)) ** 2) / (2 * sigma**2), -1)
    return -(soft * logits.log_softmax(-1)).sum(-1)


def present_loss(
    heads: DenseHeads, cls: Float[Tensor, "B C"], names: Int[Tensor, "B N names"]
) -> Float[Tensor, ""]:
    """CLS tells which words elements of the page have: binary cross-entropy, those that are and are
    not alike."""
    truth = torch.zeros(len(cls), len(heads.ids) + 1, device=cls.device)
    truth.scatter_(1, heads.places(names).clamp(min=0).flatten(1), 1.0)
    truth = truth[:, 1:]
    logits = heads.present(cls).float()
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (loss * truth).sum() / truth.sum().clamp(min=1) / 2 + (
        loss * (1 - truth)
    ).mean() / 2 * 10


def total(terms: dict[str, Tensor]) -> Tensor:
    """The weighted sum of losses."""
    return torch.stack(
        [
            WEIGHTS[name.removeprefix("loss/")] * value
            for name, value in terms.items()
            if name.startswith("loss/")
        ]
    ).sum()
