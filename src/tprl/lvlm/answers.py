"""Token ids of answers: what a model is made to read after its prompt, as its chat template writes
it."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from tprl.lvlm.prompting import AT_ONCE
from tprl.types import Utterance

# no template changes or holds such letters
ASKED, ANSWERED = "Tprl0question0words", "Tprl0answer0words"
REMEMBERED = 1 << 16  # answers whose ids are kept: labels repeat


class AnswerTurn:
    """Writes answers as the chat template's assistant turn does, token by token.

    Templates differ in what stands between the words that open an answer and the answer: nothing,
    or the space of SmolVLM2's "Assistant: red". A tokenizer makes other tokens of the same word
    with and without it, so both are read off a conversation that the template renders, and the
    end token is the one that the template writes after an answer.

    Args:
        tokenizer: of the model.
        template: its chat template; None: answers follow as they are.
        ends: ids that end a generation.
        prompt: `model.prompt`, which replaces the template's question; None: there is none.
    """

    def __init__(
        self, tokenizer: Any, template: str | None, ends: Sequence[int], prompt: str | None
    ) -> None:
        self.tokenizer = tokenizer
        self.context, self.lead, self.end = "", "", self._usual_end(ends)
        if template is not None:
            self._learn(template, ends)
        if prompt is not None:
            self._follow(prompt)
        self.row = lru_cache(REMEMBERED, typed=True)(self._row)

    def _usual_end(self, ends: Sequence[int]) -> int:
        usual = self.tokenizer.eos_token_id
        return usual if usual in ends or not ends else ends[0]

    def _learn(self, template: str, ends: Sequence[int]) -> None:
        """What the template writes between a question and an answer, and after it."""
        question = {"role": "user", "content": [{"type": "text", "text": ASKED}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWERED}]}

        def render(turns: list[dict[str, Any]], opens: bool) -> str:
            return self.tokenizer.apply_chat_template(
                turns,
                chat_template=template,
                add_generation_prompt=opens,
                tokenize=False,
                **AT_ONCE,
            )

        try:
            opened, whole = render([question], True), render([question, answer], False)
        # it renders no such turns, and its prompts are not these either
        except (TemplateError, TypeError):
            return
        # Between question and answer stands `context`, then `lead`, which no prompt includes.
        self.context = opened.rpartition(ASKED)[2]
        before, _, after = whole.rpartition(ANSWERED)
        lead = before.removeprefix(opened)
        # More than white space, such as empty thoughts, is not what an answer begins with.
        if lead != before and not lead.strip():
            self.lead = lead
        # A line break may follow the end token: the first token that ends a generation is it.
        written = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        self.end = next((token for token in written if token in ends), self.end)

    def _follow(self, prompt: str) -> None:
        """After a prompt of the user's own an answer begins as after the template's, where both
        end in the middle of a line."""
        open_ended = self.context == self.context.rstrip() and prompt == prompt.rstrip()
        self.lead = self.lead if open_ended else ""
        self.context = prompt.rpartition("{question}")[2] if self.lead else ""

    def _row(self, answer: str) -> list[int]:
        """Ids of one answer with the end token.

        An `Utterance` is tokens already written, white space included; a reference is words."""
        if isinstance(answer, Utterance) or not self.context:
            return [*self._ids(answer), self.end]
        # In context, because many tokenizers make another token of a word that begins a text.
        context, whole = self._ids(self.context), self._ids(self.context + self.lead + answer)
        if whole[: len(context)] == context:
            return [*whole[len(context) :], self.end]
        # The tokenizer would join the answer with the words before it, and a generation cannot.
        return [*self._ids(answer), self.end]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
