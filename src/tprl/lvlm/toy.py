"""A vision-language model without learned weights, for tests and demonstrations in seconds.

It reads what is really in the prompt: it answers right if the one visual token that holds the
answer is among those that survived, and otherwise it says that it does not know.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tprl.cost import LMShape, LVLMShape, VisionShape
from tprl.data.toy import CELL, COLUMNS, KINDS, ROWS, VALUES, read_cells
from tprl.errors import UserError
from tprl.lvlm.base import BaseLVLM
from tprl.lvlm.batching import divergence
from tprl.lvlm.regions import region_rank
from tprl.types import Encoded, Prompt, Sample

UNKNOWN = "unknown"  # the answer without evidence
WORDS = ("<pad>", "<image>", "USER:", "ASSISTANT:", "what", "is", "the", "value", "of", "?", *KINDS)
EXTRAS = frozenset({"cls_attention", "vision_features", "region"})


class ToyLVLM(BaseLVLM):
    """A frozen LVLM for `ToyDataset`: 24 visual tokens, no vision tower, no language model.

    A token of an object is the sum of a direction of its kind, one of its value and a little noise;
    a noise token lies outside of these. A kind's word points along the kind's direction. The
    evidence for a value is the largest projection of any visual token of the prompt on kind +
    value: 2 where the named object is in the prompt, about 1 otherwise. The answer's distribution
    is a softmax of `sharpness` times the evidence, with 1.5 for "unknown".

    Args:
        name: how results call this model.
        width: D, at least the number of kinds and values and 6 more for noise.
        sharpness: about 2 x the gap in nats between a prompt with the answer and one without.
        device: where encodings live.

    Raises:
        UserError: the width is too small.
    """

    known_extras = EXTRAS

    def __init__(
        self, name: str = "toy", width: int = 32, sharpness: float = 8.0, device: str = "cpu"
    ) -> None:
        coded = len(KINDS) + len(VALUES)
        if width < coded + 6:
            raise UserError(
                f"model.width={width} cannot hold {coded} "
                f"codes and noise: give at least {coded + 6}."
            )
        self.name, self.width, self.sharpness = name, width, sharpness
        self.device = torch.device(device)
        # What is counted as FLOPs: a notional transformer of one layer, since nothing is really
        # multiplied here.
        vision = VisionShape(
            1, width, 4 * width, 1, patches=ROWS * COLUMNS, patch_size=CELL, cls=False
        )
        self.shape = LVLMShape(
            vision, (width, width), LMShape(1, width, 4 * width, 1, 1, width, len(VALUES) + 1)
        )
        # Kinds, values and noise are orthogonal: one says nothing of another.
        draw = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(
            torch.randn(width, width, dtype=torch.float64, generator=draw)
        ).Q.float()
        self._kinds, self._values, noise_basis = basis.split(
            [len(KINDS), len(VALUES), width - coded]
        )
        # One noise vector per shade and one per word, of the length of an object's token.
        noise = torch.nn.functional.normalize(
            torch.randn(256 + len(WORDS), len(noise_basis), generator=draw), dim=-1
        )
        self._noise = 2**0.5 * noise @ noise_basis
        self._words = torch.cat(
            [self._noise[256 : 256 + len(WORDS) - len(KINDS)], 2**0.5 * self._kinds]
        )

    def check_extras(self, extras: frozenset[str], known: frozenset[str]) -> None:
        """Refuse extras that are not among `known` ones.

        Raises:
            UserError: there is one.
        """
        if missing := sorted(extras - known):
            raise UserError(
                f"{self.name} cannot provide {missing}: it knows {sorted(known)}; "
                "use e.g. pruner=cls_attention."
            )

    def encode(self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()) -> Encoded:
        """Everything up to the language model's input; `extras` among cls_attention (higher on
        objects than on noise), vision_features (the tokens themselves) and region.

        Raises:
            UserError: an extra that this model does not have.
        """
        self.check_extras(extras, self.known_extras)
        seen = [self._see(sample) for sample in samples]
        tokens = torch.stack([token for token, _ in seen])
        n = ROWS * COLUMNS
        # Left-padded lines: USER: <image> x n, question, ASSISTANT:.
        texts = [sample.question.split() for sample in samples]
        length = n + 2 + max(map(len, texts))
        # Padding is id 0, the first of `WORDS`.
        ids = torch.zeros(len(samples), length, dtype=torch.long)
        question = torch.zeros_like(ids, dtype=torch.bool)
        visual_at = torch.zeros(len(samples), n, dtype=torch.long)
        for row, words in enumerate(texts):
            line = ["USER:", *["<image>"] * n, *words, "ASSISTANT:"]
            start = length - len(line)
            ids[row, start:] = torch.tensor([WORDS.index(word) for word in line])
            question[row, start + 1 + n : -1] = True
            visual_at[row] = torch.arange(n) + start + 1
        # [B S D] words, visual tokens in place of the placeholders.
        embeds = self._words[ids].scatter(
            1, visual_at.unsqueeze(-1).expand(-1, -1, self.width), tokens
        )
        grids = tuple((((ROWS, COLUMNS),),) for _ in samples)
        attention = ids > 0
        # "cls_attention" favors objects and says nothing of the question, as in a real tower.
        available = {
            "cls_attention": torch.stack([(2.0 * is_object).softmax(0) for _, is_object in seen]),
            "vision_features": tokens,
            "region": region_rank(samples, grids, n) if "region" in extras else tokens,
        }
        return Encoded(
            uids=tuple(sample.uid for sample in samples),
            input_ids=ids.to(self.device),
            embeds=embeds.to(self.device),
            attention=attention.to(self.device),
            positions=(attention.long().cumsum(1) - 1).clamp(min=0).unsqueeze(0).to(self.device),
            visual_at=visual_at.to(self.device),
            visual_mask=torch.ones_like(visual_at, dtype=torch.bool).to(self.device),
            image_of=torch.zeros_like(visual_at).to(self.device),
            grids=grids,
            tiles=grids,
            question=question.to(self.device),
            extras={name: available[name].to(self.device) for name in sorted(extras)},
            project=self.project,
            questions=tuple(sample.question for sample in samples),
        )

    def _see(self, sample: Sample) -> tuple[Float[Tensor, "V D"], Float[Tensor, " V"]]:
        """Visual tokens of a picture, and 1.0 on those that are objects."""
        kind, value, shade = torch.tensor(read_cells(sample.images[0])).T
        is_object = kind >= 0
        code = (
            self._kinds[kind.clamp(min=0)]
            + self._values[value.clamp(min=0)]
            + 0.2 * self._noise[shade]
        )
        return torch.where(is_object.unsqueeze(1), code, self._noise[shade]), is_object.float()

    def project(self, vision_features: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The identity: this model has no projector."""
        return vision_features

    def answer(self, prompt: Prompt) -> list[str]:
        """The likeliest word: a value, or "unknown"."""
        return [(*VALUES, UNKNOWN)[i] for i in self._log_probs(prompt).argmax(1).tolist()]

    def score(
        self, prompt: Prompt, answers: Sequence[str]
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """Log-probability (an answer is one token) and whether it is the likeliest."""
        log_probs = self._log_probs(prompt)
        ids = torch.tensor(
            [(*VALUES, UNKNOWN).index(answer) for answer in answers], device=log_probs.device
        )
        return log_probs.gather(1, ids.unsqueeze(1)).squeeze(1), log_probs.argmax(1) == ids

    def distributions(self, prompt: Prompt, answers: Sequence[str]) -> Float[Tensor, "B 1 A"]:
        """Log-probabilities of all answers; each is one token."""
        return self._log_probs(prompt).unsqueeze(1)

    def divergence(
        self,
        prompt: Prompt,
        answers: Sequence[str],
        reference: Float[Tensor, "R 1 A"],
        index: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """See `batching.divergence`."""
        return divergence(reference[index], self.distributions(prompt, answers))

    def answer_length(self, answer: str) -> int:
        """Tokens of any answer."""
        return 1

    def _log_probs(self, prompt: Prompt) -> Float[Tensor, "B A"]:
        """Over the values and "unknown", from the embeddings in the prompt."""
        kinds, values = self._kinds.to(prompt.embeds), self._values.to(prompt.embeds)
        # [B S A] projection of every token on the kind that is asked for, plus on each value.
        asked = kinds[self._asked(prompt)]
        on_kind = (prompt.embeds * asked.unsqueeze(1)).sum(-1, keepdim=True)
        evidence = prompt.embeds @ values.T + on_kind
        # The best visual token speaks for each value: about 2 with the object, about 1 without.
        best = evidence.masked_fill(~prompt.visual.unsqueeze(-1), 0.0).amax(1)
        unknown = torch.full_like(best[:, :1], 1.5)
        return (self.sharpness * torch.cat([best, unknown], 1)).log_softmax(1)

    def _asked(self, prompt: Prompt) -> Int[Tensor, " B"]:
        """Index of the kind that the text names."""
        return (prompt.input_ids - WORDS.index(KINDS[0])).amax(1)
