"""A comparison as HTML: what was kept, both answers, what they took."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from tprl.cost import CONVENTION
from tprl.demo.compare import Comparison, Result
from tprl.evaluation import figures

SIDE = 480  # pixels of the longer side of a picture


def cards(found: Comparison) -> str:
    """The result with all tokens, then one card per pruner."""
    parts = [_card(found, found.full, _picture(figures.plain_picture(found.image, SIDE), "The image, whole"))]
    parts += [_card(found, one, _pictures(found, one)) for one in found.pruned]
    note = (
        "Bright patches are those that the language model saw. The map shows the policy's probabilities, each stretched "
        "to its own range. Milliseconds: from the image to the answer, the faster of two runs on this machine, one at "
        f"a time. {CONVENTION}"
    )
    question = f'<p class="asked">{escape(found.question)}</p>'
    return f'<div class="answers">{question}<div class="cards">{"".join(parts)}</div><p class="fine">{note}</p></div>'


def sentence(text: str) -> str:
    """Something that is wrong with the input."""
    return f'<div class="answers"><p class="wrong" role="alert">{escape(text)}</p></div>'


def _card(found: Comparison, one: Result, pictures: str) -> str:
    same = "" if one is found.full or one.answer != found.full.answer else ' <span class="same">the same answer</span>'
    rows = [
        ("visual tokens", f"{one.kept:.0f} of {found.total}", _share(one.kept / max(found.total, 1), one, found)),
        ("FLOPs", flops_text(one.flops), _share(one.flops / found.full.flops, one, found)),
        ("time", f"{one.milliseconds:.0f} ms", _share(one.milliseconds / found.full.milliseconds, one, found)),
    ]
    numbers = "".join(f"<tr><th>{name}</th><td>{value}</td><td>{share}</td></tr>" for name, value, share in rows)
    return (
        f'<section class="card"><h3>{escape(one.pruner.replace("keep_all", "all tokens"))}</h3>{pictures}'
        f'<p class="said">“{escape(one.answer)}”{same}</p><table>{numbers}</table></section>'
    )


def _share(ratio: float, one: Result, found: Comparison) -> str:
    return "" if one is found.full else f"{100 * ratio:.0f} %"


def _pictures(found: Comparison, one: Result) -> str:
    if one.keep is None:
        whole = _picture(figures.plain_picture(found.image, SIDE), "The image, whole")
        return f'{whole}<p class="fine">Tokens are merged, or dropped between layers: no patch is left out for good.</p>'
    alt = f"{int(one.keep.sum())} of {one.keep.size} patches kept"
    shown = [_picture(figures.mask_picture(found.image, one.keep, SIDE), alt)]
    if one.probability is not None:
        heat = figures.probability_picture(found.image, one.probability, SIDE)
        low, high = float(one.probability.min()), float(one.probability.max())
        shown.append(_picture(heat, "Keep probability of every patch", f"{low:.2g} (dark) to {high:.2g} (bright)"))
    return f'<div class="pair">{"".join(shown)}</div>' if len(shown) > 1 else shown[0]


def _picture(picture: Image.Image, alt: str, caption: str = "") -> str:
    out = io.BytesIO()
    picture.save(out, format="PNG")
    data = base64.b64encode(out.getvalue()).decode()
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">{under}</figure>'


def flops_text(flops: float) -> str:
    """With a prefix: 12.3 GFLOPs."""
    names: Sequence[tuple[float, str]] = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    size, name = next(((size, name) for size, name in names if flops >= size), (1e3, "K"))
    return f"{flops / size:.3g} {name}FLOPs"
