"""Sizes of a model and of a typical prompt, and bytes of what a training does with them: formulas
of the code as it is."""

from dataclasses import dataclass, replace

from tprl import cost
from tprl.bench.devices import Device
from tprl.cost import LVLMShape
from tprl.lvlm.frozen import WORKERS
from tprl.lvlm.gates import graph_bytes
from tprl.runtime import memory

# seconds (0.15 to 0.26 were measured) of an image of so many pixels or more
PREPARATION, PHOTOGRAPH = 0.2, 1e5


@dataclass(frozen=True)
class TypicalQuestion:
    """A typical prompt: tokens, and the patches of the passes of the tower."""

    text: int
    visual: int
    answer: int
    tiles: tuple[cost.Grid, ...]
    words: int = 12  # of the question, which the policy reads

    @property
    def length(self) -> int:
        return self.text + self.visual

    def preparation(self, patch: int) -> float:
        """Seconds of one core until an image is pixel values; `patch` is the side of a patch in
        pixels."""
        pixels = sum(rows * columns for rows, columns in self.tiles) * patch**2
        return PREPARATION * min(1.0, pixels / PHOTOGRAPH)


@dataclass(frozen=True)
class Model:
    """Sizes of a frozen model and of the policy that is trained for it."""

    shape: LVLMShape
    weights: int  # bytes, as loaded
    number: int  # bytes of one activation
    micro_batch: int
    policy: int  # parameters
    policy_width: int
    policy_layers: int
    code_width: int
    select: str = "dpp"  # what the policy serves by
    working: float = memory.WORKING * memory.GIB  # bytes, see `runtime.memory`
    workers: int | None = None  # threads that prepare images; None: what the device's kind takes

    def workers_on(self, device: Device) -> int:
        """Threads that prepare images while this device computes; 0: it waits for them."""
        if self.workers is not None:
            return self.workers
        return 0 if device.name == "CPU" else WORKERS


def seeing_bytes(model: Model, question: TypicalQuestion) -> float:
    """Of one image in the tower."""
    v = model.shape.vision
    tokens = sum(rows * columns + v.cls for rows, columns in question.tiles)
    return float(tokens * cost.patch_bytes(v, model.number))


def reading_bytes(model: Model, question: TypicalQuestion) -> float:
    """Of a micro-batch in the language model, with all visual tokens: the widest layer's work,
    logits of the answers in three precisions, and the cache of an answer that is written."""
    lm, count = model.shape.lm, model.micro_batch
    tokens = question.length + question.answer
    # Per token: residual and norm, three matrices of the MLP, queries and keys with values.
    widths = 2 * lm.width + 3 * lm.ffn + 2 * (lm.heads + lm.kv_heads) * lm.head_dim
    layer = tokens * model.number * widths
    logits = (question.answer + 1) * lm.vocab * (model.number + 4 + 4)
    cache, embeds = cost.kv_bytes(lm, tokens, model.number), tokens * lm.width * model.number
    return float(count * (layer + logits + cache + embeds))


def policy_bytes(model: Model, question: TypicalQuestion, rows: int) -> float:
    """Weights, gradients and two moments of the policy, and what its backward pass keeps of `rows`
    questions."""
    sequence = question.visual + question.words
    # 14 activations of the policy's width per token and layer in float32; 4 copies of parameters.
    kept = sequence * model.policy_width * 14 * model.policy_layers * 4
    return float(4 * 4 * model.policy + rows * kept)


def gradient_bytes(
    model: Model, question: TypicalQuestion, rows: int, visual: int, adapted: bool = False
) -> float:
    """Of a gradient through the language model for so many prompts at once, `visual` tokens in
    each: all activations where they fit into the working memory. Else a layer keeps what it reads,
    and is computed again with all its activations, twice over."""
    lm, tokens = model.shape.lm, question.text + visual + question.answer
    rows = min(rows, model.micro_batch)
    # On a GPU gates are in the mask, prompts of adapters have none.
    whole = graph_bytes(lm, rows, tokens, folded=adapted, adapted=adapted)
    answers = 3 * rows * (question.answer + 1) * lm.vocab * 4
    if whole <= model.working:
        return float(whole + answers)
    share = tokens / (question.length + question.answer)
    again = reading_bytes(replace(model, micro_batch=rows), question)
    return lm.layers * rows * tokens * lm.width * model.number + 2 * share * again


def adapter_bytes(model: Model, rank: int) -> float:
    """Weights, gradients and two moments of adapters on all linear layers of the decoder, in
    float32."""
    numbers = 0
    for layer, _ in model.shape.lm.blocks:
        queries, values = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        attention = 2 * (layer.width + queries) + 2 * (layer.width + values)
        numbers += attention + (3 if layer.gated else 2) * (layer.width + layer.ffn)
    return float(4 * 4 * rank * numbers)
