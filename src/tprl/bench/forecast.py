"""What a composed training will take, stage by stage: passes, FLOPs, hours and bytes, from shapes
alone.

FLOPs are those of `tprl.cost`. Hours divide them by a share of the device's peak, and add the
memory traffic of writing answers token by token. Bytes are weights and the largest of the things
that a stage holds at once; they are formulas of the code as it is, tested against hand counts, and
at LLaVA's widths against a measured peak (experiments/memory).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tprl import cost
from tprl.bench.devices import Device
from tprl.bench.sizes import (
    Model,
    TypicalQuestion,
    adapter_bytes,
    gradient_bytes,
    policy_bytes,
    reading_bytes,
    seeing_bytes,
)
from tprl.runtime import memory
from tprl.scoring.scorer import AT_ONCE
from tprl.stages import adapt, autoencoder, demonstrations
from tprl.stages.ppo_settings import blocks_read

UTILIZATION = 0.4  # of a GPU's peak; prefills of hundreds of tokens reach 0.3 to 0.6 in practice
CPU_UTILIZATION = 0.8  # of the speed of a matrix product (measured: 0.83 to 0.93, docs/latency.md)
GRADIENTS = "gradients through the language model"
ALLOCATOR = 1.05  # of blocks that are not used whole


@dataclass(frozen=True)
class Need:
    """What one stage takes."""

    name: str
    encodes: int  # images through the tower
    reads: int  # prompts through the language model
    written: int  # of them, answers that are generated
    flops: float
    device_bytes: float
    disk_bytes: float  # of a temporary file
    largest: str  # what holds most of the device's memory beside the weights

    def hours(self, device: Device, model: Model, question: TypicalQuestion) -> float:
        """On a device: FLOPs at a share of its peak, for every token written the weights through
        its memory, and images prepared before that, or meanwhile by `workers`."""
        # Decoding one token reads every weight once: its time is memory traffic, not FLOPs.
        share = CPU_UTILIZATION if device.name == "CPU" else UTILIZATION
        steps = self.written / model.micro_batch * max(question.answer - 1, 0)
        computing = self.flops / (device.tflops * 1e12 * share)
        writing = steps * model.weights / (device.bandwidth * 1e12)
        preparing = self.encodes * question.preparation(model.shape.vision.patch_size)
        if workers := model.workers_on(device):
            return max(computing + writing, preparing / workers) / 3600
        return (computing + writing + preparing) / 3600


def stage_needs(
    stage: Mapping[str, Any],
    model: Model,
    question: TypicalQuestion,
    open_ended: bool,
    questions: int,
) -> list[Need]:
    """Of every part of a composed `stage`, in order.

    Args:
        stage: the plain config of `stage`.
        model, question: see there.
        open_ended: answers are generated and judged, not read.
        questions: of validation and evaluation, where a limit does not say.
    """
    known = [_settled(part, model, questions) for part in _parts(stage) if part["name"] in _COUNTS]
    rows = [_part(part, model, question, open_ended) for part in known]
    if "chain" in stage:
        rows.append(_evaluation(stage, model, question, open_ended, questions))
    return rows


def uncounted(stage: Mapping[str, Any]) -> list[str]:
    """Names of the parts of a composed `stage` that `stage_needs` leaves out: nobody has counted
    what they take."""
    return [part["name"] for part in _parts(stage) if part["name"] not in _COUNTS]


def _parts(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of every stage that runs, both blocks of each in one table."""
    parts = [stage]
    if "chain" in stage:
        parts = [stage[name] for name in stage["chain"]] * stage.get("rounds", 1)
    return [{**part, **part.get("module", {})} for part in parts]


def _settled(part: Mapping[str, Any], model: Model, questions: int) -> dict[str, Any]:
    """The settings of a stage, with what null means in them."""
    settings = dict(part)
    if part["name"] == "ppo":
        settings["credit_blocks"] = blocks_read(part, model.select)
    if served := part.get("served"):
        settings["served"] = {**served, "limit": served.get("limit") or questions}
    return settings


# --- passes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Passes:
    """Of one stage: (prompts, kept fraction) of reads, and further sums."""

    encodes: int
    reads: tuple[tuple[int, float], ...]
    written: int = 0
    # forward passes of the policy over one image; with gradient they count three times
    policy: int = 0
    batch: int = 1  # questions encoded at once
    held: int = 0  # questions whose encodings stay in memory
    # kept fraction of the longest prompt with a gradient through the language model; 0: none has
    gradient: float = 0.0
    bounded: bool = True  # the budget of bytes makes the batch smaller


def _served(
    part: Mapping[str, Any], times: int, open_ended: bool
) -> tuple[tuple[tuple[int, float], ...], int, int]:
    """Reads, written answers and held questions of the validation of a stage."""
    served = part.get("served") or {}
    limit, ratios = served.get("limit") or 0, served.get("keep_ratios") or []
    reads = tuple((limit * times, ratio) for ratio in ratios)
    written = limit * (1 + times * len(ratios)) if open_ended else 0
    return (*reads, (limit if open_ended else 0, 1.0)), written, limit


def _autoencoder(part: Mapping[str, Any], open_ended: bool) -> _Passes:
    return _Passes(part["images"], (), batch=autoencoder.AT_ONCE)


def _lfd(part: Mapping[str, Any], open_ended: bool) -> _Passes:
    reads, written, held = _served(part, part["epochs"] + 1, open_ended)
    # An epoch trains on every demonstration at every ratio, forward and backward: 3 passes.
    count = part["demonstrations"]
    ratios = part["keep_ratio"] if isinstance(part["keep_ratio"], list) else [part["keep_ratio"]]
    steps = part["epochs"] * len(ratios) * 3
    return _Passes(
        count + held, reads, written, policy=count * steps, batch=demonstrations.AT_ONCE, held=held
    )


def _ppo(part: Mapping[str, Any], open_ended: bool) -> _Passes:
    rounds, prompts, group = part["iterations"], part["prompts"], part["group"]
    ratios = part["keep_ratio"] if isinstance(part["keep_ratio"], list) else [part["keep_ratio"]]
    mean = sum(ratios) / len(ratios)
    # Each prompt is answered by `group` episodes at every step, plus reads for credit.
    episodes = rounds * prompts
    drawn = (episodes * (group * part["steps"] + part["credit_blocks"]), mean)
    # One before training, then one every so many rounds, rounded up.
    validations = 1 + -(-rounds // part["validate_every"])
    served, written, held = _served(part, validations, open_ended)
    written += episodes if open_ended else 0  # the model's own answers with all tokens
    # One pass to draw, and three (forward, backward) per epoch of updates.
    policy = episodes * part["steps"] * (1 + 3 * part["update_epochs"])
    reads = (drawn, (episodes * (2 if open_ended else 1), 1.0), *served)
    return _Passes(episodes + held, reads, written, policy, prompts, held, bounded=False)


def _distill(part: Mapping[str, Any], open_ended: bool) -> _Passes:
    count = part["iterations"] * part["prompts"]
    validations = 1 + -(-part["iterations"] // part["validate_every"])
    served, written, held = _served(part, validations, open_ended)
    reads = ((3 * count, 1.0), *served)
    batch = part["prompts"]
    return _Passes(
        count + held, reads, written, 4 * count, batch, held, gradient=1.0, bounded=False
    )


def _tune(part: Mapping[str, Any], open_ended: bool) -> _Passes:
    count = part["iterations"] * part["prompts"]
    ratios = part["keep_ratio"] if isinstance(part["keep_ratio"], list) else [part["keep_ratio"]]
    # Pruned and with all tokens: every so many iterations, and at the end.
    validations = 1 + -(-part["iterations"] // part["validate_every"])
    served, written, held = _served(part, validations, open_ended)
    whole = (held * validations, 1.0)
    written += held * validations if open_ended else 0
    # Forward, backward through frozen weights, and layers that are computed again.
    reads = ((3 * count, sum(ratios) / len(ratios)), whole, *served)
    # What the model says with all tokens is written: as targets, or to word a reference.
    worded = part["answers"] == "own"
    written += count if worded or open_ended else 0
    return _Passes(
        count + held, reads, written, 0, part["prompts"], held, gradient=max(ratios), bounded=False
    )


def _adapt(part: Mapping[str, Any], open_ended: bool) -> _Passes:
    _, written, held = _served(part, 0, open_ended)
    count = part["questions"]
    reads = (*((count + held, ratio) for ratio in part["budgets"]), (count, 1.0))
    return _Passes(
        count + held, reads, written + (count if open_ended else 0), count, adapt.AT_ONCE, held
    )


_COUNTS = {
    "autoencoder": _autoencoder,
    "lfd": _lfd,
    "ppo": _ppo,
    "distill": _distill,
    "adapt": _adapt,
    "tune": _tune,
}


def _part(
    part: Mapping[str, Any], model: Model, question: TypicalQuestion, open_ended: bool
) -> Need:
    # Only the autoencoder keeps tokens of all its images at once, in a file.
    passes = _COUNTS[part["name"]](part, open_ended)
    stage_bytes = _bytes_of(part, passes, model, question)
    disk = 0.0
    if part["name"] == "autoencoder":  # in half precision
        disk = float(part["images"] * question.visual * model.shape.lm.width * 2)
    return _need(part["name"], passes, model, question, stage_bytes, disk)


def _evaluation(
    stage: Mapping[str, Any],
    model: Model,
    question: TypicalQuestion,
    open_ended: bool,
    questions: int,
) -> Need:
    settings = stage["evaluation"]
    # All tokens once, then every line of the table at every ratio.
    count = settings.get("limit") or questions
    ratios, ours = settings["keep_ratios"], 3 + len(stage.get("baselines") or [])
    lines = len(settings["pruners"]) + ours
    reads = ((count, 1.0), *((count * lines, ratio) for ratio in ratios))
    written = count * (1 + lines * len(ratios)) if open_ended else 0
    policy, batch = ours * len(ratios) * count, settings["batch_size"]
    passes = _Passes(count, reads, written, policy, batch, bounded=False)
    return _need("evaluation", passes, model, question, _bytes_of({}, passes, model, question), 0.0)


def _need(
    name: str,
    passes: _Passes,
    model: Model,
    question: TypicalQuestion,
    held: Mapping[str, float],
    disk: float,
) -> Need:
    see = cost.vision_flops(model.shape, question.tiles)
    see += cost.projector_flops(model.shape, question.tiles)
    # Tower per image, prefill and LM head per read, decoding per written answer, then the policy.
    flops = float(passes.encodes * see)
    for count, ratio in passes.reads:
        kept = max(1, round(ratio * question.visual))
        flops += count * cost.prefill_flops(model.shape, question.text + question.answer, kept)
        flops += count * cost.lm_head_flops(model.shape, question.answer)
    flops += passes.written * cost.decode_flops(
        model.shape, question.text, question.visual // 3, question.answer - 1
    )
    sequence = question.visual + question.words
    # The policy's layers dominate its cost: inputs and heads are left out.
    layer = cost.encoder_layer_flops(model.policy_width, 4 * model.policy_width, sequence)
    flops += passes.policy * model.policy_layers * layer
    # Activities come one after the other, but encodings for validation stay all the time.
    largest = max(held, key=lambda key: held[key])
    total = model.weights + max(held.values()) + held.get("encodings of validation questions", 0.0)
    reads = sum(count for count, _ in passes.reads)
    return Need(
        name, passes.encodes, reads, passes.written, flops, ALLOCATOR * total, disk, largest
    )


# --- bytes ----------------------------------------------------------------------------------------


def _bytes_of(
    part: Mapping[str, Any], passes: _Passes, model: Model, question: TypicalQuestion
) -> dict[str, float]:
    """Bytes of the device that each activity of a stage holds beside the weights."""
    lm, number = model.shape.lm, model.number
    # Embeddings of a prompt: [S D] numbers.
    encoding = question.length * lm.width * number
    each = question.length * lm.width * (2 * number + 2 * 4)
    batch = max(1, passes.batch)
    if passes.bounded:
        batch = memory.how_many(model.working, each, batch)
    # The tower gets as many images at once as the budget holds; their tokens are of the batch.
    seen = min(
        batch * seeing_bytes(model, question), max(model.working, seeing_bytes(model, question))
    )
    observed = lm.width * (number + 4) + 4 * model.code_width + 2048
    held = {
        "encoding images": seen + 2 * batch * encoding,
        "observing tokens": batch * (question.visual * observed + encoding),
        "encodings of validation questions": min(float(passes.held * encoding), model.working),
    }
    if passes.reads:
        # The questions as encoded, and as spliced for the language model.
        held["reading prompts"] = reading_bytes(model, question) + 2 * batch * encoding
    if part.get("name") == "ppo":
        # Episodes of an iteration, or those less a block; as many as `scorer.selected` splices.
        sampled = part["prompts"] * max(part["group"] * part["steps"], part["credit_blocks"])
        at_once = memory.how_many(model.working, 2 * encoding, min(AT_ONCE, sampled))
        held["selecting prompts"] = 2 * at_once * encoding + batch * encoding
        rows = max(1, part["minibatch"] // part["group"])
        held["updating the policy"] = policy_bytes(model, question, rows) + batch * encoding
    if passes.gradient:
        # Gates see all tokens, adapters what the pruner keeps.
        tuned = part.get("name") == "tune"
        visual = round(passes.gradient * question.visual)
        graph = gradient_bytes(model, question, part["prompts"], visual, adapted=tuned)
        held[GRADIENTS] = graph + batch * encoding
        if tuned:
            held[GRADIENTS] += adapter_bytes(model, part["rank"])
    if part.get("name") == "lfd":
        held["updating the policy"] = policy_bytes(model, question, part["batch_size"])
    return held


# --- advice ---------------------------------------------------------------------------------------


def remedies(need: Need, model: Model, options: Mapping[str, Any]) -> Sequence[str]:
    """Options that make a stage smaller, the least change first; `options` are those of the
    model."""
    helpful = []
    if (
        need.largest in ("encoding images", "selecting prompts", "updating the policy")
        and need.name == "ppo"
    ):
        helpful.append("fewer stage.ppo.prompts")
    if options.get("dtype") in (None, "float32"):
        helpful.append("model.dtype=bfloat16")
    if options.get("load_in") is None:
        helpful.append("model.load_in=4bit")
    return [*helpful, "model.placement=shard over several GPUs"]
