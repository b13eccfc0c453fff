"""Answers that a frozen LVLM is made to read (teacher forcing): their likelihood, its
distributions, and gradients."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tprl.cost import FULL, LVLMShape, layer_kinds
from tprl.errors import UserError
from tprl.lvlm.answers import AnswerTurn
from tprl.lvlm.batching import (
    axes,
    divergence,
    mean_log_prob,
    micro_batches,
    padded_ids,
    retry_smaller,
)
from tprl.lvlm.gates import Gates, gated, gates_of, graph_bytes
from tprl.lvlm.layer_drop import LayerPlan, dropping
from tprl.lvlm.overflow import check_rows, finite_logits
from tprl.runtime import memory
from tprl.types import Encoded, Prompt


class AnswerReading:
    """The half of `FrozenLVLM` that reads answers; the other half sees, renders and writes."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any
    prompt: str | None
    device: torch.device
    micro_batch: int
    deepstack: Callable[..., AbstractContextManager[None]]
    inputs_beside: Callable[..., dict[str, Tensor]]

    @property
    @abstractmethod
    def shape(self) -> LVLMShape:
        """What decides its FLOPs: see `FrozenLVLM`."""

    @retry_smaller
    def score(
        self, prompt: Prompt, answers: Sequence[str], plan: LayerPlan | None = None
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """Teacher-forced mean log-probability (nats per token, end token included), and whether
        every token of the answer is the arg-max, which is what greedy decoding needs to produce
        it."""
        log_probs = torch.zeros(len(answers), device=self.device)
        exact = torch.zeros(len(answers), dtype=torch.bool, device=self.device)
        for rows, logits, ids in self._read(prompt, answers, plan):
            log_probs[rows] = mean_log_prob(logits, ids)
            exact[rows] = ((logits.argmax(-1) == ids) | (ids < 0)).all(1)
        return log_probs, exact

    @retry_smaller
    def distributions(self, prompt: Prompt, answers: Sequence[str]) -> Float[Tensor, "B A N"]:
        """Log-probabilities of every vocabulary entry at each token of the answers (end token
        included), teacher-forced; nan where an answer is shorter."""
        width = max(self.answer_length(answer) for answer in answers)
        log_probs = torch.full((len(answers), width, 1), torch.nan, device=self.device)
        for rows, logits, ids in self._read(prompt, answers):
            # The vocabulary's width is known with the first logits alone.
            if log_probs.shape[2] == 1:
                log_probs = log_probs.expand(-1, -1, logits.shape[2]).contiguous()
            padding = (ids < 0).unsqueeze(2)
            log_probs[rows, : ids.shape[1]] = logits.log_softmax(-1).masked_fill(padding, torch.nan)
        return log_probs

    @retry_smaller
    def divergence(
        self,
        prompt: Prompt,
        answers: Sequence[str],
        reference: Float[Tensor, "R A N"],
        index: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """See `OpenLVLM`; a micro-batch at a time, because distributions over a vocabulary are
        large."""
        kl, same = torch.zeros(2, len(answers), device=self.device)
        for rows, logits, ids in self._read(prompt, answers):
            # [R a N] of each row's question, as long as the answers of this micro-batch.
            there = reference[index.to(rows.device)[rows], : ids.shape[1]]
            kl[rows], same[rows] = divergence(there, logits.log_softmax(-1))
        return kl, same

    def _read(
        self, prompt: Prompt, answers: Sequence[str], plan: LayerPlan | None = None
    ) -> Iterator[tuple[Int[Tensor, " R"], Float[Tensor, "R A N"], Int[Tensor, "R A"]]]:
        """Rows, logits and ids of the answers, teacher-forced, micro-batch by micro-batch; ids are
        -1 on padding.

        Raises:
            UserError: after the last of them, logits or the likelihood of an answer are not finite.
        """
        finite = torch.ones(len(answers), dtype=torch.bool, device=self.device)
        for rows, numbers, part in micro_batches(prompt, self.micro_batch):
            ids = self.answer_ids([answers[number] for number in numbers])
            logits = self._teach(part, ids, plan)
            # An answer token at minus infinity is likelihood zero: a mean over it says nothing.
            written = logits.gather(2, ids.clamp(min=0).unsqueeze(2)).squeeze(2).isfinite()
            finite[rows] = ((written & finite_logits(logits)) | (ids < 0)).all(1)
            yield rows, logits, ids

        def again(row: int) -> None:
            # Alone and without padding, as long as the prompt is.
            index = torch.tensor([row], device=prompt.attention.device)
            part = prompt.rows(index, int(prompt.attention[row].sum()))
            self._teach(part, self.answer_ids([answers[row]]), plan)

        check_rows(self, finite, prompt.uids, again, "language model")

    def _teach(
        self, part: Prompt, ids: Int[Tensor, "R A"], plan: LayerPlan | None
    ) -> Float[Tensor, "R A N"]:
        """Logits at the places of the answers' tokens."""
        # Answers go on from the prompt's last position, in every axis of M-RoPE.
        real, width = ids >= 0, ids.shape[1]
        after = part.positions[..., -1:] + 1 + torch.arange(width, device=self.device)
        with self.deepstack(part.deep, part.visual), dropping(self.model, part, plan):
            out = self.model(
                inputs_embeds=self._with_answer(part.embeds, ids),
                attention_mask=torch.cat([part.attention, real], 1).long(),
                position_ids=axes(torch.cat([part.positions, after], -1)),
                logits_to_keep=width + 1,
                use_cache=False,
                **self.inputs_beside(torch.cat([part.input_ids, ids.clamp(min=0)], 1), part.visual),
            )
        # The logits before a token predict it: width + 1 columns, less what follows the last.
        return out.logits[:, :-1].float()

    def taught_log_prob(self, prompt: Prompt, answers: Sequence[str]) -> Float[Tensor, " B"]:
        """`score`'s log-probability with gradients, to whatever of the model or the prompt takes
        some. The batch is one graph; where it would not fit into `working_gib`, a layer's own
        activations are computed again in the backward pass."""
        ids = self.answer_ids(answers)
        length = prompt.attention.shape[1] + ids.shape[1]
        keep = self._holds(len(ids), length, folded=True, adapted=True)
        with gated(self._language.layers, None, keep):
            return mean_log_prob(self._teach(prompt, ids, None), ids)

    @property
    def _language(self) -> Any:
        """The language model without its head."""
        parts = self.model.model
        return parts.language_model if hasattr(parts, "language_model") else parts.text_model

    def prefill(self, prompt: Prompt, plan: LayerPlan | None = None) -> None:
        """Read a prompt as `generate` does, and write nothing."""
        with self.deepstack(prompt.deep, prompt.visual), dropping(self.model, prompt, plan):
            self.model(
                inputs_embeds=prompt.embeds,
                attention_mask=prompt.attention.long(),
                position_ids=axes(prompt.positions),
                logits_to_keep=1,
                use_cache=True,
                **self.inputs_beside(prompt.input_ids, prompt.visual),
            )

    def check_written(
        self,
        finite: Bool[Tensor, " R"] | None,
        prompt: Prompt,
        plan: LayerPlan | None,
        names: Sequence[str],
    ) -> None:
        """Refuse rows of a batch that was generated and was not finite.

        Raises:
            UserError: there is one.
        """
        if finite is None:
            return

        def again(row: int) -> None:
            index = torch.tensor([row], device=prompt.attention.device)
            self.prefill(prompt.rows(index, int(prompt.attention[row].sum())), plan)

        check_rows(self, finite, names, again, "language model, while it wrote the answer,")

    def gated_log_prob(
        self, encoded: Encoded, gate: Float[Tensor, "B V"], answers: Sequence[str]
    ) -> Float[Tensor, " B"]:
        """Teacher-forced mean log-probability of the answers with attention to visual token j
        weighted by gate j, in every layer; differentiable in the gates. Gates of 0 and 1 give what
        `score` gives after pruning.

        Implemented as log(gate) added to the attention logits, with gates above 1e-6. The batch is
        one graph; where it would not fit into `working_gib`, a layer's own activations are computed
        again in the backward pass.

        Raises:
            UserError: a gate of 0 would not be pruning in all layers (`check_gates`).
        """
        ids = self.answer_ids(answers)
        real, width = ids >= 0, ids.shape[1]
        # The highest position of any axis, plus one: an image may end above the last text.
        last = encoded.positions.amax((0, 2), keepdim=True)
        after = last + 1 + torch.arange(width, device=gate.device)
        positions = torch.cat([encoded.positions, after.expand(len(encoded.positions), -1, -1)], -1)
        # The language model alone takes a mask of four axes.
        language = self._language
        gates = self.gates(encoded, gate, real)
        folded = self.device.type == "cpu" and language.config._attn_implementation == "sdpa"
        mask = gates.seen() if folded else gates.bias()
        prompts, columns = gates.real.shape
        keep = self._holds(prompts, columns, folded)
        with (
            self.deepstack(encoded.deep, encoded.is_visual),
            gated(language.layers, gates if folded else None, keep),
        ):
            out = language(
                inputs_embeds=self._with_answer(encoded.embeds, ids),
                attention_mask=self.mask_of_layers(mask),
                position_ids=axes(positions),
                use_cache=False,
            )
        # Called past the outermost hook of a model that is cut, it answers where its last layer is.
        logits = self.model.lm_head(out.last_hidden_state[:, -width - 1 : -1]).to(self.device)
        return mean_log_prob(logits.float(), ids)

    def _holds(self, rows: int, length: int, folded: bool, adapted: bool = False) -> bool:
        """Whether the graph of so many rows of `length` tokens fits into the working memory."""
        try:
            lm = self.shape.lm
        except UserError:  # the cost model does not know it
            return False
        return graph_bytes(lm, rows, length, folded, adapted) <= memory.working_bytes(self)

    def check_gates(self) -> None:
        """Refuse to weigh visual tokens by gates where layers do not attend to all tokens.

        Raises:
            UserError: this model has such layers.
        """
        kinds = set(layer_kinds(self.model.config.text_config)) - {FULL}
        if kinds:
            raise UserError(
                f"{self.name} has layers of {min(kinds).replace('_', ' ')}, where a gate of 0 is "
                "not pruning: train with stage=lfd and stage=ppo instead of distill."
            )

    def gates(
        self, encoded: Encoded, gate: Float[Tensor, "B V"], real: Bool[Tensor, "B A"]
    ) -> Gates:
        """What the layers attend by; of the answers, `real` tokens are seen.

        Raises:
            UserError: see `check_gates`.
        """
        self.check_gates()
        return gates_of(encoded, gate, real)

    def mask_of_layers(self, mask: Shaped[Tensor, "B 1 S1 S1"]) -> Any:
        """The same mask for all layers, as the language model takes it."""
        return mask

    def answer_length(self, answer: str) -> int:
        """Tokens of an answer, end token included."""
        return len(self.answer_row(answer))

    def answer_row(self, answer: str) -> list[int]:
        """Token ids of an answer as the model would write it, end token included."""
        return self._turn.row(answer)

    def answer_ids(self, answers: Sequence[str]) -> Int[Tensor, "B A"]:
        """Token ids of the answers with the end token as the model would write them, right-padded
        with -1."""
        return padded_ids([self._turn.row(answer) for answer in answers], self.device)

    @cached_property
    def _turn(self) -> AnswerTurn:
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        return AnswerTurn(self.tokenizer, template, self.ends, self.prompt)

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer which is generated; none where the checkpoint names none."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _with_answer(
        self, embeds: Float[Tensor, "B S D"], ids: Int[Tensor, "B A"]
    ) -> Float[Tensor, "B S1 D"]:
        return torch.cat([embeds, self.words(ids.clamp(min=0))], 1)

    def words(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """Embeddings of tokens, on the device of the prompts: those of a model that is cut may be
        elsewhere."""
        return self.model.get_input_embeddings()(ids).to(self.device)
