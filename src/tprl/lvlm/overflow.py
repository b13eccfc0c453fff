"""Numbers that a frozen model's dtype cannot hold: whose they are, where they begin, and what
helps.

Whether a batch is finite is one reduction, read once per batch. Only where it is not, the sample
runs again with a hook on every module, to name the first one whose output is not finite.
"""

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tprl.errors import UserError
from tprl.lvlm.batching import Seen

# Parts of a model by the paths of its modules, in the order in which they are tried.
PARTS = (
    (re.compile(r"merger|projector|connector|image_newline"), "projector"),
    (re.compile(r"vision|visual"), "vision tower"),
    (re.compile(r"embed_tokens|wte"), "token embeddings"),
    (re.compile(r"lm_head"), "output head"),
)
LAYER = re.compile(r"\.(?:layers?|blocks)\.(\d+)")
# what pruners read beside the tokens is computed by us, without modules
ATTENTION = "attention of the vision tower"


class _Begins(Exception):
    """Ends a pass at the first module whose output is not finite."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__(path)
        self.path, self.module = path, module


class _Ended(Exception):
    """Ends a generation whose prompts are not finite: what is drawn from them aborts a GPU's
    process."""


class Watch:
    """Which rows of the batch that a model is generating for have been finite in every step."""

    def __init__(self) -> None:
        self.finite: Bool[Tensor, " R"] | None = None

    def step(self, _: nn.Module, __: Any, out: Any) -> None:
        """A forward hook of the whole model. It waits for the device after the prompts alone."""
        logits = getattr(out, "logits", None)
        finite = finite_logits((out[0] if logits is None else logits)[:, -1].detach())
        if self.finite is not None:
            self.finite &= finite
            return
        self.finite = finite
        if not bool(finite.all()):
            raise _Ended


@contextmanager
def watched(model: nn.Module, watch: Watch | None = None) -> Generator[Watch, None, None]:
    """While it lasts, every forward pass of the model is looked at. It ends early where the first
    is not finite, and `Watch.finite` says so."""
    watch = watch or Watch()
    handle = model.register_forward_hook(watch.step)
    try:
        yield watch
    except _Ended:
        return
    finally:
        handle.remove()


def finite_logits(logits: Float[Tensor, "... N"]) -> Bool[Tensor, "..."]:
    """Whether there is a largest logit. One at minus infinity alone is a token that cannot be
    written."""
    return logits.amax(-1).isfinite()


def check_seen(
    lvlm: Any,
    seen: Seen,
    image_numbers: Sequence[Sequence[int]],
    names: Sequence[str],
    again: Callable[[int], Any],
) -> None:
    """Refuse visual tokens, and what pruners read beside them, that are not finite.

    Args:
        lvlm: whose they are.
        seen: of the images of a batch.
        image_numbers: the images of each sample.
        names: of the samples.
        again: sees one image again.

    Raises:
        UserError: one is not finite.
    """
    if not seen.tokens:
        return
    # Tokens first: an extra can be spoiled where the tokens are sound, by its own softmax.
    groups = [seen.tokens, *([] if seen.deep is None else [seen.deep]), *seen.extras.values()]
    # [groups images]: one number each, and one look at the device.
    flags = []
    for group in groups:
        flags.append(torch.stack([_finite(value, lvlm.device) for value in group]))
    finite = torch.stack(flags)
    if bool(finite.all()):
        return
    # The first bad image, and the first sample that shows it.
    image = int((~finite).any(0).nonzero()[0])
    sample = next(
        name for name, images in zip(names, image_numbers, strict=True) if image in images
    )
    default = "vision tower" if not bool(finite[0, image]) else ATTENTION
    raise not_finite(lvlm, sample, lambda: again(image), default)


def check_rows(
    lvlm: Any,
    finite: Bool[Tensor, " B"],
    names: Sequence[str],
    again: Callable[[int], Any],
    default: str,
) -> None:
    """Refuse what the language model has made of the rows of a batch that are not finite; looks at
    the device once.

    Args:
        lvlm: whose rows they are.
        finite: which rows are.
        names: of the samples; several rows of one sample follow each other.
        again: reads one sample again.
        default: the part that is named where nothing that runs again is to blame.

    Raises:
        UserError: one is not finite.
    """
    if bool(finite.all()):
        return
    # Rows of one sample follow each other, the same number for each.
    sample = int((~finite).nonzero()[0]) * len(names) // len(finite)
    raise not_finite(lvlm, names[sample], lambda: again(sample), default)


def not_finite(lvlm: Any, sample: str, again: Callable[[], Any], default: str) -> UserError:
    """What is said of a sample whose numbers are not finite."""
    # Run again module by module: where it begins tells the part, and whether weights are to blame.
    begins = _first(lvlm.model, again)
    part = part_of(begins.path) if begins else default
    dtype = str(lvlm.model.dtype).removeprefix("torch.")
    where = f"{lvlm.name}: the output of its {part} is not finite for sample {sample} in {dtype}"
    if begins and _spoiled(begins.module):
        return UserError(
            f"{where}, because weights of {begins.path} are not: copy the checkpoint again."
        )
    if dtype == "float32":
        return UserError(
            f"{where}: look at this sample, and at the weights "
            f"of {begins.path if begins else lvlm.name}."
        )
    # Sound weights overflow: only another number format helps.
    largest = f"{torch.finfo(lvlm.model.dtype).max:.5g}"
    other = "bfloat16 or float32" if dtype == "float16" else "float32"
    return UserError(
        f"{where}, whose largest number is {largest}: load the model "
        f"as {other} (model.dtype, or dtype= of from_pretrained)."
    )


def part_of(path: str) -> str:
    """The part of a model that a module belongs to, with the number of its layer where it is in
    one."""
    part = next((name for pattern, name in PARTS if pattern.search(path)), "language model")
    layer = LAYER.search(path)
    return (
        f"{part} layer {layer[1]}" if layer and part in ("vision tower", "language model") else part
    )


def _finite(value: Tensor, device: torch.device) -> Bool[Tensor, ""]:
    return value.detach().isfinite().all().to(device)


def _spoiled(module: nn.Module) -> bool:
    return any(
        not bool(weight.isfinite().all())
        for weight in module.parameters(recurse=False)
        if not weight.is_meta
    )


@torch.no_grad()
def _first(model: nn.Module, again: Callable[[], Any]) -> _Begins | None:
    """The first module, innermost first, whose output is not finite; None where all are."""

    def listen(path: str) -> Callable[..., None]:
        def look(module: nn.Module, _: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple | list) and out else out
            if not isinstance(first, Tensor) or not first.is_floating_point():
                return
            # Logits and scores may mask by infinities, hidden states may not.
            if not bool(first.isfinite().all()):
                raise _Begins(path, module)

        return look

    # Hooks of inner modules run before those of the modules around them: the first is innermost.
    handles = [
        module.register_forward_hook(listen(path)) for path, module in model.named_modules() if path
    ]
    try:
        again()
    except _Begins as begins:
        return begins
    finally:
        for handle in handles:
            handle.remove()
    return None
