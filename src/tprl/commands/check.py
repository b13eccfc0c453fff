"""`python -m src.check`: does this model, with this data, do what the run expects of it, and does
it fit?"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tprl.bench import checkup
from tprl.bench.devices import Device, at_hand
from tprl.bench.parity import parity
from tprl.build import conf_dir, target_at
from tprl.commands.costs import costs, parameter_count, refuse_what_cannot_fit
from tprl.commands.entry import addable, option_of
from tprl.commands.options import checked
from tprl.commands.plan import check_plan
from tprl.commands.sentences import explain, unreadable
from tprl.commands.setup import make_dataset, make_lvlm, plain
from tprl.commands.shell import value_of
from tprl.commands.unread import check_read
from tprl.data.base import BaseDataset
from tprl.data.boxes import COORDINATES
from tprl.data.taking import take
from tprl.errors import UserError
from tprl.kinds import flag
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import ASSETS, find_model
from tprl.lvlm.weightless import weightless
from tprl.runtime import distributed
from tprl.runtime.files import write_atomically
from tprl.runtime.packages import check_torchvision
from tprl.types import Sample

USAGE = """\
python -m src.check model=... dataset=... [stage=...] [any option of src.train] [weights=true]

Without weights, in seconds: the prompt with the question and the tokens of the answer marked,
visual tokens of three shapes of images, what the processor crops, and what every stage takes in
memory, FLOPs and hours. With weights=true the model is loaded and two questions are compared with
the stock class in the run's dtype."""
PLAIN = Sample("example", (), "what is in the picture?", ("a red square",))
WEIGHTS = "weights="


def check_run(words: Sequence[str]) -> int:
    """Print the report; 2 if something is wrong, with one sentence on stderr."""
    if {"-h", "--help"} & {*words}:
        print(USAGE)
        return 0
    try:
        # A wrong torchvision breaks every processor, so it is the first thing to say.
        check_torchvision()
        with_weights = _with_weights(words)
        # The cheap report comes first: with a bad config no weights are loaded.
        config = composed([word for word in words if not word.startswith(WEIGHTS)])
        print(report(config))
        if with_weights:
            print(compared(config))
    except Exception as error:
        sentence = explain(error, unreadable)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        return 2
    return 0


def _with_weights(words: Sequence[str]) -> bool:
    """What the last `weights=` says, as Hydra reads it."""
    values = [value_of(word) for word in words if word.startswith(WEIGHTS)]
    return flag("weights", values[-1]) if values else False


def composed(words: Sequence[str]) -> DictConfig:
    """The config that `python -m src.train` would run with the same options."""
    # The checks of src.train in their order, so that what passes here passes there.
    overrides = [addable(word) for word in words]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = compose("train", overrides=overrides)
    check_read("train", config, [option_of(word) for word in overrides])
    config = checked(config, "train")
    check_plan(plain(config))
    return config


def report(config: DictConfig, device: Device | None = None) -> str:
    """The whole report as text.

    Raises:
        UserError: what would go wrong in the run, and what would help.
    """
    # The model has shapes but no weights: everything below is read or counted, nothing is computed.
    lvlm = model_of(config)
    dataset, trouble = _dataset(config, lvlm)
    sample = _sample(dataset)
    parts = [_about(lvlm, config, dataset, trouble), _prompt(lvlm, sample), _shapes(lvlm, sample)]
    parts.append(costs(config, lvlm, dataset, sample, device))
    try:
        # The reader sees the table before the refusal, because the table shows what to change.
        refuse_what_cannot_fit(config, lvlm, dataset, sample, device)
    except UserError:
        print("\n\n".join(parts), flush=True)
        raise
    return "\n\n".join(parts)


def model_of(config: DictConfig) -> FrozenLVLM:
    """The model of a config without its weights.

    Raises:
        UserError: it is none of a stock class, or cannot be read.
    """
    # Only a stock class has a prompt and weights to check; the toy has neither.
    family = target_at(config.model["_target_"])
    options = {key: value for key, value in plain(config.model).items() if not key.startswith("_")}
    if not (isinstance(family, type) and issubclass(family, FrozenLVLM)):
        raise UserError(
            f"model={config.model.get('name')} has neither "
            "prompt nor weights to check: use model=llava."
        )
    return weightless(family, options)


def _dataset(config: DictConfig, lvlm: FrozenLVLM) -> tuple[BaseDataset | None, str]:
    """The training split as the run opens it, or why it cannot be opened."""
    try:
        return make_dataset(config.dataset, lvlm, "train"), ""
    except UserError as error:
        return None, str(error)


def _sample(dataset: BaseDataset | None) -> Sample:
    """The first question that has an image, or one of our own about a photograph's blank."""
    from PIL import Image

    # The first rows may be damaged or text only, so a few are tried.
    for sample in take(dataset, range(min(8, len(dataset)))) if dataset is not None else ():
        if sample.images:
            return sample
    return PLAIN._replace(images=(Image.new("RGB", checkup.SHAPES[0]),))


# --- the report -----------------------------------------------------------------------------------


def _about(lvlm: FrozenLVLM, config: DictConfig, dataset: BaseDataset | None, trouble: str) -> str:
    # Versions and classes go with every report: most mismatches are mismatches of packages.
    source = config.model.get("pretrained") or "random weights"
    kinds = f"{type(lvlm.processor).__name__}, {type(lvlm.processor.image_processor).__name__}"
    versions = ", ".join(f"{name} {number}" for name, number in checkup.packages().items())
    lines = [
        (
            f"model      {lvlm.name}: {type(lvlm.model).__name__} of "
            f"{source}, {parameter_count(lvlm) / 1e9:.2f} billion weights"
        ),
        (
            f"processor  {kinds}; tokenizer {type(lvlm.tokenizer).__name__} "
            f"of {len(lvlm.tokenizer)} tokens"
        ),
        f"packages   {versions}",
        f"boxes      written {COORDINATES[lvlm.coordinates]}",
    ]
    if dataset is None:
        lines.append(f"dataset    cannot be opened: {trouble}")
    else:
        example = take(dataset, range(1))
        pictures = example[0].images if example else ()
        size = (
            f", the first image is {pictures[0].width} x {pictures[0].height}" if pictures else ""
        )
        lines.append(f"dataset    {dataset.name}: {len(dataset)} training questions{size}")
        lines += _warnings(lvlm, dataset)
    return "\n".join(lines)


def _warnings(lvlm: FrozenLVLM, dataset: BaseDataset) -> list[str]:
    """What is allowed and seldom meant."""
    # A large model on drawings runs well and measures nothing; it is a note, not an error.
    if dataset.name in ("scenes", "toy") and parameter_count(lvlm) > 10**8:
        return [
            (
                f"           note: {dataset.name} are drawings of 96 pixels, "
                f"made for the embedded model; for {lvlm.name} set dataset=gqa "
                "or textvqa, or an experiment of its own (experiment=llava)"
            )
        ]
    return []


def _prompt(lvlm: FrozenLVLM, sample: Sample) -> str:
    # The question is marked inside the prompt, where a wrong chat template shows.
    reading = checkup.read(lvlm, sample)
    answer = " ".join(map(repr, reading.answer))
    lines = [
        f"prompt     {reading.prompt!r}",
        f"question   {reading.question!r}, between «» above",
        (
            f"answer     {sample.answers[0] if sample.answers else '(none)'!r} "
            f"is scored as {answer or '(no reference)'}"
        ),
        (
            f"tokens     {reading.text} of text, {reading.visual} "
            "visual: as many placeholders as features"
        ),
    ]
    return "\n".join(lines)


def _shapes(lvlm: FrozenLVLM, sample: Sample) -> str:
    lines = ["image          visual tokens  passes of the tower  seen"]
    # Landscape, portrait and large: tiles, crops and bounds differ between them.
    for size in checkup.SHAPES:
        shape = checkup.shape_of(lvlm, size, sample.question)
        seen = (
            "all of it"
            if shape.seen >= 1
            else f"{100 * shape.seen:.0f} %, the rest is cropped away"
        )
        lines.append(f"{size[0]:>5} x {size[1]:<5}  {shape.tokens:>13}  {shape.tiles:>19}  {seen}")
    if lvlm.bounds:
        options = " or ".join(f"model.{bound}" for bound in sorted(lvlm.bounds))
        lines.append(f"fewer tokens: {options}")
    return "\n".join(lines)


def check_first(config: DictConfig) -> None:
    """Print the report before the first training with these model, dataset, stages and policy on
    this device, and remember in the run's cache that it was printed. Models that ship with TPRL,
    and small random ones, need none.

    Rank 0 reads, prints and remembers; every rank is refused for its reasons.

    Raises:
        UserError: the report's reasons.
    """
    family, pretrained = target_at(config.model["_target_"]), config.model.get("pretrained")
    # Every rank returns here or none does: the gather below waits for all.
    if not (isinstance(family, type) and issubclass(family, FrozenLVLM)) or pretrained is None:
        return
    reason = distributed.gathered("" if distributed.rank() else _first_report(config))[0]
    if reason:
        raise UserError(reason)


def _first_report(config: DictConfig) -> str:
    """Print the report unless the run's cache remembers it; returns why the run is refused, or
    nothing."""
    try:
        if ASSETS in find_model(config.model.pretrained).parents:
            return ""
        device = at_hand(config.trainer.accelerator == "cpu")
        record = _record(config, device)
        if record is not None and record.is_file():
            return ""
        text = report(config, device)
    except UserError as error:
        return str(error)
    # Remembered only after it was printed, so a refused run reports again.
    print(text, flush=True)
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, text + "\n")
    return ""


def _record(config: DictConfig, device: Device) -> Path | None:
    """Where the cache remembers a report: named after what it says, and the device on which a run
    must fit."""
    if not config.get("cache"):
        return None
    # Only what the report depends on: a new learning rate repeats nothing.
    about = {name: plain(config[name]) for name in ("model", "dataset", "stage", "policy")}
    about["device"] = {"name": device.name, "memory": round(device.memory)}
    digest = hashlib.blake2b(
        json.dumps(about, sort_keys=True, default=str).encode(), digest_size=8
    ).hexdigest()
    return Path(config.cache) / "checked" / f"{digest}.txt"


def compared(config: DictConfig) -> str:
    """Two questions on the loaded model, everything kept, against the stock class in the run's
    dtype."""
    # The run's own device and dtype: parity in float32 would not speak of bfloat16.
    on_cpu: Mapping[str, Any] = {"device": "cpu"} if config.trainer.accelerator == "cpu" else {}
    lvlm: Any = make_lvlm(config.model, **on_cpu)  # `src.check` has refused what has no stock class
    dataset, trouble = _dataset(config, lvlm)
    if dataset is None:
        raise UserError(f"two questions are needed to compare with the stock class: {trouble}")
    # Both questions need an image, since without an image there is nothing to prune.
    samples = [sample for sample in take(dataset, range(min(8, len(dataset)))) if sample.images][:2]
    gaps = parity(lvlm, samples, steps=2)
    verdict = "the same tokens" if gaps.same_ids else "DIFFERENT TOKENS: do not train on this"
    return (
        "weights    with everything kept logits differ from the stock "
        f"class's by {gaps.keep_all:.1e} (their spread is {gaps.std:.2f}), "
        f"pruned from masked by {gaps.pruned:.1e}: {verdict}"
    )
