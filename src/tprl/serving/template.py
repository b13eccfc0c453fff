"""A chat template that writes what the tokenizer would add: engines add nothing to a rendered
chat."""

from typing import Any

from tprl.lvlm.prompting import adds_bos

BOS = "{{- bos_token -}}"


def with_bos(processor: Any) -> str | None:
    """The chat template of a processor, beginning with the BOS that its tokenizer adds to texts;
    unchanged where the tokenizer adds none or the template writes it. None where there is none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if template is None:
        return None
    # Rendered once, because only its output says whether a template writes the BOS.
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    text = tokenizer.apply_chat_template(
        turns, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    if not adds_bos(tokenizer) or text.startswith(tokenizer.bos_token):
        return template
    return BOS + template
