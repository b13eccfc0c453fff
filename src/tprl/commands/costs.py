"""What a run takes in memory, FLOPs and hours, stage by stage, for `python -m src.check`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from tprl.bench import checkup, forecast
from tprl.bench.devices import GIB, STATED, Device, at_hand, named
from tprl.build import build
from tprl.commands.setup import plain
from tprl.data.base import BaseDataset
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.runtime.memory import WORKING
from tprl.types import Sample

QUESTIONS = 5000  # of an evaluation, where the dataset cannot be opened
POLICY_OPTIONS = ("width", "layers", "code_width")


def costs(
    config: DictConfig,
    lvlm: FrozenLVLM,
    dataset: BaseDataset | None,
    sample: Sample,
    device: Device | None = None,
) -> str:
    """The table of stages."""
    # Counted once for the sizes of this model and question, then timed on every device.
    place = device or at_hand(config.trainer.accelerator == "cpu")
    model, question = sizes(config, lvlm), typical(lvlm, sample)
    stage, open_ended = plain(config.stage), _open_ended(dataset, sample)
    uncounted = forecast.uncounted(stage)
    needs = forecast.stage_needs(stage, model, question, open_ended, QUESTIONS)
    if not needs:
        return f"costs      nobody has counted what stage {', '.join(uncounted)} takes"
    # This machine first, then well-known GPUs for comparison.
    places = [place, *(named(name) for name in STATED if name not in place.name)]
    titles = "".join(f"{place.name[:12]:>13}" for place in places)
    lines = [
        (
            f"{'stage':12} {'images':>9} {'prompts read':>13} "
            f"{'written':>9} {'PFLOPs':>9} {'GiB':>6}   hours:{titles}"
        ),
    ]
    for need in needs:
        hours = "".join(f"{need.hours(place, model, question):>13.2f}" for place in places)
        lines.append(
            f"{need.name:12} {need.encodes:>9} {need.reads:>13} {need.written:>9} "
            f"{need.flops / 1e15:>9.1f} {need.device_bytes / GIB:>6.1f}         {hours}"
        )
    # Stages run one after the other, so hours and FLOPs add up; memory does not.
    sums = [_total_hours(needs, place, model, question) for place in places]
    totals = "".join(f"{hours:>13.2f}" for hours in sums)
    lines.append(
        f"{'all':54}  {sum(need.flops for need in needs) / 1e15:>9.1f} {'':6}         {totals}"
    )
    lines += _footnotes(needs, model, question, place, dataset is None)
    if uncounted:
        lines.append(f"not counted: stage {', '.join(uncounted)}")
    if dataset is not None and _unlimited(stage):
        lines.append(f"{QUESTIONS} questions are assumed where limit=null takes a whole split")
    return "\n".join(lines)


def _unlimited(stage: Mapping[str, Any]) -> bool:
    """Whether a limit of a stage, or of one of its chain, is null."""
    tables = [value for value in stage.values() if isinstance(value, Mapping)]
    return any(table.get("limit", 0) is None or _unlimited(table) for table in tables)


def _total_hours(
    needs: Sequence[forecast.Need],
    place: Device,
    model: forecast.Model,
    question: forecast.TypicalQuestion,
) -> float:
    return sum(need.hours(place, model, question) for need in needs)


def _footnotes(
    needs: Sequence[forecast.Need],
    model: forecast.Model,
    question: forecast.TypicalQuestion,
    place: Device,
    guessed: bool,
) -> list[str]:
    # The largest stage decides over memory and disk.
    most = max(needs, key=lambda need: need.device_bytes)
    disk = max(needs, key=lambda need: need.disk_bytes)
    utilization = f"{100 * forecast.UTILIZATION:.0f} % of a GPU's peak"
    lines = [
        (
            f"memory: {model.weights / GIB:.1f} GiB of weights; most is stage "
            f"{most.name} ({most.largest}); {place.name} has {place.memory:.0f} GiB"
        ),
        (
            f"hours: at {utilization}, prompts of {question.text} + "
            f"{question.visual} tokens, answers of {question.answer}; images take a core "
            f"{_preparing(needs, model, question):.1f} h ({_beside(model, place)})"
        ),
    ]
    if most.device_bytes / GIB > place.memory:
        lines.append(
            "micro-batches are halved until they fit; a smaller model.micro_batch saves the tries"
        )
    if disk.disk_bytes > GIB:
        lines.append(
            f"disk: stage {disk.name} writes {disk.disk_bytes / GIB:.1f} GiB of visual tokens "
            "into TMPDIR, for each rank"
        )
    if guessed:
        lines.append(
            f"the dataset could not be opened: {QUESTIONS} questions of an evaluation are assumed"
        )
    return lines


def _beside(model: forecast.Model, place: Device) -> str:
    """Who prepares images, and when."""
    workers = model.workers_on(place)
    if not workers:
        return f"on {place.name} the model waits for it"
    return f"on {place.name} {workers} of them meanwhile: model.workers"


def _preparing(
    needs: Sequence[forecast.Need], model: forecast.Model, question: forecast.TypicalQuestion
) -> float:
    """Hours."""
    return (
        sum(need.encodes for need in needs)
        * question.preparation(model.shape.vision.patch_size)
        / 3600
    )


def _open_ended(dataset: BaseDataset | None, sample: Sample) -> bool:
    return dataset is None or not dataset.teacher_forced(sample)


def parameter_count(lvlm: FrozenLVLM) -> int:
    return sum(weight.numel() for weight in lvlm.model.parameters())


def sizes(config: DictConfig, lvlm: FrozenLVLM) -> forecast.Model:
    """What the forecast needs of model and policy."""
    from torch import device

    # Quantization touches matrices inside layers alone; embeddings and norms keep the dtype.
    number = next(lvlm.model.parameters()).dtype.itemsize
    inner = sum(
        w.numel() for name, w in lvlm.model.named_parameters() if w.ndim > 1 and ".layers." in name
    )
    # scales included
    each = {"4bit": 0.55, "8bit": 1.05}.get(config.model.get("load_in") or "", float(number))
    weights = (parameter_count(lvlm) - inner) * number + inner * each
    # The policy is built without memory, since only its sizes count.
    with device("meta"):
        policy = build(config.policy, token_width=lvlm.width)
    options = {
        name: getattr(policy, "config", {}).get(name, config.policy.get(name, 0))
        for name in POLICY_OPTIONS
    }
    return forecast.Model(
        lvlm.shape, int(weights), number, lvlm.micro_batch,
        sum(w.numel() for w in policy.parameters()), options["width"] or 64, options["layers"] or 1,
        options["code_width"] or lvlm.width, policy.serving.select,
        float(config.model.get("working_gib", WORKING)) * GIB, config.model.get("workers"),
    )  # fmt: skip


def typical(lvlm: FrozenLVLM, sample: Sample) -> forecast.TypicalQuestion:
    """The question that stands for all: as long as the first one, about an image of its shape."""
    # Without a reference answer the longest allowed one is assumed.
    reading = checkup.read(lvlm, sample)
    answer = len(reading.answer) or lvlm.max_new_tokens
    words = len(lvlm.tokenizer(sample.question, add_special_tokens=False)["input_ids"])
    return forecast.TypicalQuestion(
        reading.text, reading.visual, answer, checkup.tiles_of(lvlm, sample), words
    )


def refuse_what_cannot_fit(
    config: DictConfig,
    lvlm: FrozenLVLM,
    dataset: BaseDataset | None,
    sample: Sample,
    device: Device | None = None,
) -> None:
    """Refuse a run of which a stage does not fit into the device's memory even with one prompt at a
    time: micro-batches are halved by themselves.

    Raises:
        UserError: with the option that would make it fit.
    """
    place = device or at_hand(config.trainer.accelerator == "cpu")
    model = replace(sizes(config, lvlm), micro_batch=1)
    # Sharded weights lie on several devices: the memory of a single device says nothing.
    if config.model.get("placement") == "shard":
        return
    stage, open_ended = plain(config.stage), _open_ended(dataset, sample)
    question = typical(lvlm, sample)
    for need in forecast.stage_needs(stage, model, question, open_ended, QUESTIONS):
        required = need.device_bytes / GIB
        if required > place.memory:
            options = forecast.remedies(need, model, plain(config.model))
            raise UserError(
                f"stage {need.name} needs about {required:.1f} GiB ({need.largest} "
                f"on top of {model.weights / GIB:.1f} GiB of weights), and "
                f"{place.name} has {place.memory:.1f}: set {', or '.join(options)}."
            )
