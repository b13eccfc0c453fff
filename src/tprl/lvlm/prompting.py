"""How a frozen LVLM writes a prompt: the template, what stands for an image, and what cannot be
asked."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from tprl.errors import UserError
from tprl.lvlm.batching import check_images
from tprl.lvlm.texts import Misreader, Placed, placed
from tprl.types import Sample

# Templates of models that may think are asked for an answer at once; others do not read it.
AT_ONCE: dict[str, Any] = {"enable_thinking": False}


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer begins every text with its BOS."""
    begin = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and list(begin) == [tokenizer.bos_token_id]


class Prompting:
    """The text side of an LVLM with a stock processor.

    Attributes:
        prompt: template around `{question}`, "<image>" marks the image; None takes the processor's
            chat template.
    """

    name: str
    processor: Any
    tokenizer: Any
    image_token: int
    prompt: str | None

    def prompts_of(self, samples: Sequence[Sample]) -> list[Placed]:
        """The prompts of samples as texts.

        Raises:
            UserError: a sample with more or fewer images than the prompt shows, a question that the
                tokenizer refuses or reads as something else than text, or a template that changes
                it.
        """
        check_images(samples, self.prompt, self.name)
        for sample in samples:
            if (bad := self._misreader.fault(sample.question, "question")) is not None:
                raise UserError(f"{self.name} cannot be asked {sample.uid}, {bad[0]}: {bad[1]}.")
        prompts = [placed(self.render, sample, self.name) for sample in samples]
        for sample, prompt in zip(samples, prompts, strict=True):
            self._check_written(sample, prompt.text)
        return prompts

    def _check_written(self, sample: Sample, text: str) -> None:
        """Refuse prompts that do not show their images: a model would answer as if there were
        none."""
        count = text.count(self.placeholder)
        if count != len(sample.images):
            raise UserError(
                f"the chat template of {self.name} writes {count} image "
                f"placeholders {self.placeholder} for sample {sample.uid}, "
                f"which has {len(sample.images)} images: set model.prompt, e.g. "
                "'USER: <image> {question} ASSISTANT:', or mend the template."
            )

    def refusal(self, sample: Sample) -> tuple[str, str] | None:
        """Why the texts of a sample cannot be read, as (reason, detail); None where they can."""
        return self._misreader.refuses(sample)

    @cached_property
    def _misreader(self) -> Misreader:
        return Misreader(self.processor)

    @property
    def placeholder(self) -> str:
        """What stands for an image in a prompt before the processor expands it."""
        return self.tokenizer.convert_ids_to_tokens(self.image_token)

    @property
    def image_text(self) -> str:
        """What `<image>` in `model.prompt` becomes."""
        return self.placeholder

    @property
    def remedy(self) -> str:
        """How to set a processor so that it writes as many placeholders as the vision tower makes
        features."""
        settings = ", ".join(f"{name}={value}" for name, value in self.processor_settings().items())
        return (
            f"give the processor {settings or 'the sizes of images and patches'} "
            "as the model's config says"
        )

    def processor_settings(self) -> dict[str, Any]:
        """What of the processor decides how many placeholders it writes, from the model's config;
        for errors."""
        return {}

    def render(self, sample: Sample) -> str:
        """The prompt as text, image placeholders not yet expanded."""
        if self.prompt is not None:
            return self.prompt.replace("<image>", self.image_text).replace(
                "{question}", sample.question
            )
        # One user turn, images before the question, as LVLMs are taught.
        content = [
            *({"type": "image"} for _ in sample.images),
            {"type": "text", "text": sample.question},
        ]
        turns = [{"role": "user", "content": content}]
        template = self.processor.chat_template or self.tokenizer.chat_template
        if template is None:
            raise UserError(
                f"{self.name} has no chat template: set "
                f"model.prompt, e.g. 'USER: <image> {{question}}'."
            )
        # The tokenizer renders: some processors ask their video half for settings first.
        try:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=True, tokenize=False, **AT_ONCE
            )
        # TypeError: it joins texts, and content is a list here, in which images have places
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"the chat template of {self.name} cannot write sample {sample.uid} ({error}): set "
                "model.prompt, e.g. 'USER: <image> {question} ASSISTANT:', or mend the template."
            ) from error
        # Of a folder that was exported for an engine the template writes the BOS, and the tokenizer
        # would add another.
        return text.removeprefix(self.tokenizer.bos_token) if self._adds_bos else text

    @cached_property
    def _adds_bos(self) -> bool:
        return adds_bos(self.tokenizer)
