"""The page, in gradio. Nothing is computed here, and nothing is fetched from elsewhere: no
analytics, no fonts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]  # the extra "demo"
from gradio.themes import Default  # pyright: ignore[reportMissingImports]
from PIL import Image

from tprl.demo.cards import STYLE, cards
from tprl.demo.compare import MAX_CHARACTERS, AnyPruner, Comparison, compare_pruners
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.types import Sample

FONTS: Mapping[str, Any] = {
    "font": ["system-ui", "sans-serif"],
    "font_mono": ["ui-monospace", "monospace"],
}
LOOK: Mapping[str, Any] = {
    "css": STYLE,
    "theme": Default(primary_hue="orange", **FONTS),
    "footer_links": [],
}
UPLOAD: Mapping[str, Any] = {
    "sources": ["upload", "clipboard"],
    "format": "png",  # without loss
    "image_mode": None,
}

THUMBNAILS: Mapping[str, Any] = {
    "label": "Examples",
    "show_label": False,
    "columns": 3,
    "height": 238,
    "allow_preview": False,
    "format": "png",
    "buttons": [],
}


@dataclass(frozen=True)
class Example:
    """An image and the questions that are asked about it."""

    image: Image.Image
    questions: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], count: int) -> list["Example"]:
        """The first `count` images of those samples that have one each."""
        groups: dict[bytes, tuple[Image.Image, list[str]]] = {}
        for sample in samples:
            if len(sample.images) == 1:
                (image,) = sample.images
                groups.setdefault(image.tobytes(), (image, []))[1].append(sample.question)
        return [
            cls(image, tuple(dict.fromkeys(asked)))
            for image, asked in list(groups.values())[:count]
        ]


def make_page(
    lvlm: FrozenLVLM,
    pruners: Mapping[str, AnyPruner],
    examples: Sequence[Example],
    begin: Comparison,
    keep_ratio: float,
) -> gr.Blocks:
    """The page, which opens with the comparison `begin` of the first example.

    Args:
        lvlm: the frozen model.
        pruners: to choose from, by name.
        examples: to pick from.
        begin: what is shown first.
        keep_ratio: where the slider stands.
    """

    def answer(
        image: str | None, question: str | None, names: Sequence[str] | None, ratio: float
    ) -> str:
        try:
            chosen = {name: pruners[name] for name in names or ()}
            return cards(compare_pruners(lvlm, chosen, image, question or "", float(ratio)))
        except UserError as error:
            raise gr.Error(str(error), title="Not answered", print_exception=False) from error

    def pick(event: gr.SelectData) -> tuple[Image.Image, Any, str]:
        example = examples[int(event.index)]
        return example.image, gr.Radio(list(example.questions), value=None), example.questions[0]

    first, compared = examples[0], [item.pruner for item in begin.pruned]
    with gr.Blocks(
        title="TPRL: which visual tokens does an answer need?", analytics_enabled=False
    ) as page:
        gr.Markdown(
            f"# Which visual tokens does an answer need?\nAsk {lvlm.name} about an image: "
            "it answers with all of the image's tokens, and with those that a pruner keeps."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    first.image, type="filepath", label="Image", height=240, buttons=[], **UPLOAD
                )
                # `compare` says what is wrong with a file
                image.preprocess = lambda payload: payload and payload.path
                gr.Markdown("or one of these:")
                gallery = gr.Gallery([item.image for item in examples], **THUMBNAILS)
                question = gr.Textbox(
                    first.questions[0], label="Question", max_lines=3, max_length=MAX_CHARACTERS
                )
                suggested = gr.Radio(list(first.questions), label="Suggestions", value=None)
                ratio = gr.Slider(
                    0.02, 1.0, keep_ratio, step=0.01, label="Kept fraction of the visual tokens"
                )
                names = gr.Dropdown(
                    list(pruners), value=compared, multiselect=True, label="Pruners"
                )
                button = gr.Button("Ask", variant="primary")
            with gr.Column(scale=5, min_width=320):
                answers = gr.HTML(cards(begin))
        inputs = [image, question, names, ratio]
        # others would slow the clocks down
        how: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        picked = gallery.select(pick, None, [image, suggested, question], api_visibility="private")
        suggestion = suggested.input(
            lambda text: text, suggested, question, api_visibility="private"
        )
        for event in (picked, suggestion):
            event.then(answer, inputs, answers, api_visibility="private", **how)
        triggers = [button.click, question.submit, ratio.release, names.input]
        # Without always_last, a click while an answer is being computed would be lost.
        gr.on(triggers, answer, inputs, answers, api_name="ask", trigger_mode="always_last", **how)
    return page
