"""The page, in gradio. Nothing is computed here, and nothing leaves the machine: no analytics, no fonts from the web."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from tprl.demo.cards import cards, sentence
from tprl.demo.compare import Comparison, compare
from tprl.errors import UserError
from tprl.lvlm.layer_drop import LayerPruner
from tprl.scoring import Scorer
from tprl.types import Pruner, Sample

STYLE = """
.answers .cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
.answers .card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .9rem }
.answers h3 { margin: 0 0 .6rem; font-size: 1rem; font-weight: 650 }
.answers figure { margin: 0 } .answers img { width: 100%; display: block; border-radius: 4px; margin: 0 }
.answers figcaption, .answers .fine, .answers .same { color: var(--body-text-color-subdued); font-size: .8rem }
.answers .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem }
.answers .said { font-size: 1.15rem; margin: .7rem 0 .4rem; overflow-wrap: anywhere }
.answers .asked { font-size: 1.15rem; margin: 0 0 .8rem }
.answers table { width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; border-collapse: collapse }
.answers th { text-align: left; font-weight: 400; color: var(--body-text-color-subdued) }
.answers td { text-align: right; padding: .15rem 0 .15rem .8rem; white-space: nowrap }
.answers .wrong { border-left: 4px solid #c2410c; padding: .6rem .9rem; font-size: 1.05rem }
"""
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
LOOK: Mapping[str, Any] = {"css": STYLE, "theme": gr.themes.Default(primary_hue="orange", **FONTS)}


@dataclass(frozen=True)
class Example:
    """An image and questions that are asked about it."""

    image: Image.Image
    questions: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], count: int) -> list["Example"]:
        """The first `count` images of some samples that have one each."""
        found: dict[bytes, tuple[Image.Image, list[str]]] = {}
        for sample in samples:
            if len(sample.images) == 1:
                (image,) = sample.images
                found.setdefault(image.tobytes(), (image, []))[1].append(sample.question)
        return [cls(image, tuple(dict.fromkeys(asked))) for image, asked in list(found.values())[:count]]


def make_page(
    scorer: Scorer,
    pruners: Mapping[str, Pruner | LayerPruner],
    examples: Sequence[Example],
    begin: Comparison,
    keep_ratio: float,
) -> gr.Blocks:
    """The page, which opens with the comparison `begin` of the first example.

    Args:
        scorer: of the LVLM.
        pruners: to choose from, by name.
        examples: to pick from.
        begin: what is shown first.
        keep_ratio: where the slider stands.
    """

    def ask(image: str | None, question: str, names: Sequence[str], ratio: float) -> str:
        try:
            return cards(compare(scorer, {name: pruners[name] for name in names}, image, question or "", float(ratio)))
        except UserError as error:
            return sentence(str(error))

    def pick(event: gr.SelectData) -> tuple[Image.Image, Any, str]:
        example = examples[int(event.index)]  # type: ignore[arg-type]
        return example.image, gr.Radio(list(example.questions), value=None), example.questions[0]

    with gr.Blocks(title="TPRL: prune visual tokens", analytics_enabled=False) as page:
        gr.Markdown(f"# Which visual tokens does an answer need?\n{scorer.lvlm.name} answers with all, and with few.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    examples[0].image, type="filepath", label="Image", height=260, sources=["upload", "clipboard"]
                )
                gallery = gr.Gallery(
                    [one.image for one in examples], label="Examples", columns=6, height=96, allow_preview=False
                )
                question = gr.Textbox(examples[0].questions[0], label="Question", lines=1, max_lines=3)
                suggested = gr.Radio(list(examples[0].questions), label="Suggestions", value=None)
                ratio = gr.Slider(0.02, 1.0, keep_ratio, step=0.01, label="Kept fraction of the visual tokens")
                names = gr.CheckboxGroup(list(pruners), value=[one.pruner for one in begin.pruned], label="Pruners")
                button = gr.Button("Ask", variant="primary")
            with gr.Column(scale=5, min_width=320):
                answers = gr.HTML(cards(begin))
        gallery.select(pick, None, [image, suggested, question], api_name=False)
        suggested.input(lambda text: text, suggested, question, api_name=False)
        inputs = [image, question, names, ratio]
        gr.on([button.click, question.submit, ratio.release], ask, inputs, answers, api_name="ask", concurrency_limit=1)
    return page
