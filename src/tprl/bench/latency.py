"""Seconds, not only FLOPs: what every pruner takes from pixels to its last token on this machine,
stage by stage, and which share of the speed-up that its FLOPs predict it really gets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from tprl import cost
from tprl.bench.parity import stock_inputs
from tprl.budget import need_ratio
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry, Tick, feasible
from tprl.evaluation.results import FULL
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPlan, LayerPruner
from tprl.pruners.learned import LearnedPruner, check_family
from tprl.runtime.progress import seconds
from tprl.scoring.flops import question_parts
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Prompt, Pruner, Sample, TokenSelection

STAGES = ("vision", "selector", "prefill", "decode")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """What is asked and how often.

    Args:
        batch_sizes: prompts that are read together.
        repeats: measured rounds; in each of them every pruner runs once at every keep ratio.
        warmup: rounds before them that do not count.
        text_tokens: tokens of a prompt that are not its image's: template and question.
        new_tokens: generated tokens; the first one belongs to the prefill.
        image: width and height in pixels of the picture of each prompt.

    Raises:
        UserError: a number below 1 (0 for warm-up rounds).
    """

    batch_sizes: Sequence[int] = (1, 8)
    repeats: int = 10
    warmup: int = 2
    text_tokens: int = 64
    new_tokens: int = 16
    image: Sequence[int] = (672, 672)

    def __post_init__(self) -> None:
        for name, low in (("repeats", 1), ("warmup", 0), ("text_tokens", 1), ("new_tokens", 1)):
            if getattr(self, name) < low:
                raise UserError(
                    f"latency.{name}={getattr(self, name)} is too small: give at least {low}."
                )
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError(
                f"latency.batch_sizes={list(self.batch_sizes)} names no batch: give e.g. [1, 8]."
            )


class Reading(NamedTuple):
    """One pass of a batch, in milliseconds."""

    vision: float  # tower, projector, what the pruner reads off them, and the prompt put together
    selector: float  # choosing tokens and removing the others; methods inside the model have none
    prefill: float  # up to the first answer token; with the rankings of methods inside the model
    decode: float  # the further ones
    # bytes of device memory at most, weights included; None: not known on this device
    peak: int | None = None

    @property
    def total(self) -> float:
        """From pixels to the last token."""
        return self.vision + self.selector + self.prefill + self.decode


class Spread(NamedTuple):
    """Of the rounds: the median, and the 10 and 90 % quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
        return cls(median, low, high)


@dataclass(frozen=True)
class Line:
    """A pruner at one keep ratio and batch size. `full` is the same batch with all tokens in the
    same rounds."""

    pruner: str
    keep_ratio: float | None
    batch: int
    visual_tokens: float  # of a prompt
    kept_tokens: float  # of a prompt; mean over layers of what each one computes
    kv_bytes: int  # of the batch, after the last token
    flops: Mapping[str, int]  # of the batch, by stage
    full_flops: Mapping[str, int]
    readings: Sequence[Reading]
    full: Sequence[Reading]

    def milliseconds(self, stage: str) -> Spread:
        """Of a stage, or the total."""
        return Spread.of([getattr(reading, stage) for reading in self.readings])

    def speedup(self, stage: str = "total") -> Spread:
        """How many times faster than not pruning; rounds are compared with themselves, so what
        slows a whole round down does not count."""
        pairs = zip(self.full, self.readings, strict=True)
        return Spread.of(
            [getattr(all_, stage) / getattr(reading, stage) for all_, reading in pairs]
        )

    def predicted(self, stage: str = "total") -> float:
        """The ratio of FLOPs: the speed-up on a machine whose time is proportional to them."""
        return self.full_flops[stage] / self.flops[stage]

    def share(self, stage: str = "total") -> float:
        """Measured over predicted speed-up: 1 is ideal."""
        return self.speedup(stage).median / self.predicted(stage)

    @property
    def peak(self) -> int | None:
        """Bytes of device memory at most."""
        peaks = [reading.peak for reading in self.readings if reading.peak is not None]
        return max(peaks, default=None)


def stopwatch(device: torch.device) -> Clock:
    """Milliseconds after everything queued on the device is done."""
    return lambda: 1e3 * seconds(device)


class Asked(NamedTuple):
    """A batch of prompts on its way from pixels to answers."""

    encoded: Encoded
    # everything for methods inside the model, which drop tokens as `plan` says
    selection: TokenSelection
    plan: LayerPlan | None
    ids: Int[Tensor, "B A"]  # of the answers
    reading: Reading


@torch.no_grad()
def ask(
    lvlm: FrozenLVLM,
    encode: Callable[[], Encoded],
    pruner: Pruner | LayerPruner,
    ratio: float | None,
    now: Clock,
    max_new_tokens: int,
    **options: Any,
) -> Asked:
    """Encode, choose, and generate greedily, with the time of each stage; `options` are those of
    the stock generate."""
    plan = None
    # Methods inside the model choose during its prefill, and their time is counted there.
    if isinstance(pruner, LayerPruner):
        plan = LayerPlan.of(pruner, need_ratio(pruner.name, ratio), lvlm.layers)
    start = now()
    encoded = encode()
    seen = now()
    # Neither chooses nor copies anything before the language model.
    if isinstance(pruner, LayerPruner) or pruner.name == FULL:
        selection, chosen = keep_all(encoded), 0.0
        prompt = splice(encoded, selection)
    else:
        selection = pruner.select(encoded, ratio)
        prompt = splice(encoded, selection)
        chosen = now() - seen
    ids, prefill, decode = _generate(lvlm, prompt, plan, now, max_new_tokens, **options)
    return Asked(encoded, selection, plan, ids, Reading(seen - start, chosen, prefill, decode))


def _generate(
    lvlm: FrozenLVLM,
    prompt: Prompt,
    plan: LayerPlan | None,
    now: Clock,
    max_new_tokens: int,
    **options: Any,
) -> tuple[Int[Tensor, "B A"], float, float]:
    """Ids, and milliseconds to the first answer token and from there to the last."""
    times: list[float] = []

    def token_is_there(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        # Never stops anything: a criterion is called after each token, which is when to look.
        if ids.shape[1] in (1, max_new_tokens):  # asking the time waits for the device
            times.append(now())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    start = now()
    ids = lvlm.generate(
        prompt, plan, max_new_tokens=max_new_tokens, stopping_criteria=[token_is_there], **options
    )
    if ids.shape[1] not in (1, max_new_tokens):  # it ended early
        times.append(now())
    return ids, times[0] - start, times[-1] - times[0]


@torch.no_grad()
def measure_latency(
    lvlm: FrozenLVLM,
    entries: Sequence[Entry],
    setting: Setting,
    now: Clock | None = None,
    tick: Tick = lambda done, total: None,
) -> list[Line]:
    """Every entry at every keep ratio and batch size, in turns.

    A round runs each of them once, starting with another one every time, so that what disturbs the
    machine disturbs all alike. The first entry whose name is `FULL` is what the others are compared
    with.

    Raises:
        UserError: a pruner was trained for another LVLM, or reads what this one does not have.
    """
    cases = [(entry, ratio) for entry in feasible(entries, lvlm) for ratio in entry.keep_ratios]
    for entry, _ in cases:
        check_family(entry.pruner, lvlm)
    (reference,) = [number for number, (entry, _) in enumerate(cases) if entry.name == FULL]
    # Turns, not blocks: a machine that slows down would else slow whichever came last.
    rounds, lines, done = setting.warmup + setting.repeats, list[Line](), 0
    for batch in setting.batch_sizes:
        bench = Bench(lvlm, setting, batch, now or stopwatch(lvlm.device))
        readings: list[list[Reading]] = [[] for _ in cases]
        costs: dict[int, dict[str, Any]] = {}
        for turn in range(rounds):
            # Another first in every round, so that none is always measured on a cold cache.
            for number in (*range(turn % len(cases), len(cases)), *range(turn % len(cases))):
                entry, ratio = cases[number]
                reading, costs[number] = bench.run(entry.pruner, ratio)
                if turn >= setting.warmup:
                    readings[number].append(reading)
            done += 1
            tick(done, rounds * len(setting.batch_sizes))
        lines += [
            Line(
                entry.name, ratio, batch, readings=readings[i], full=readings[reference], **costs[i]
            )
            for i, (entry, ratio) in enumerate(cases)
        ]
    return lines


class Bench:
    """A batch of prompts, and one pruner after another on it."""

    def __init__(self, lvlm: FrozenLVLM, setting: Setting, batch: int, now: Clock) -> None:
        self.lvlm, self.setting, self.now = lvlm, setting, now
        samples = prompts(lvlm, setting, batch)
        self.inputs = stock_inputs(lvlm, samples)
        self.question = lvlm.encode(samples).question

    def run(self, pruner: Any, ratio: float | None) -> tuple[Reading, dict[str, Any]]:
        """One pass, and the fields of its `Line` that are computed, not measured."""
        if self.lvlm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.lvlm.device)

        def encode() -> Encoded:
            return self.lvlm.encode_inputs(self.inputs, pruner.extras, self.question)

        count = self.setting.new_tokens  # generation never ends early
        asked = ask(
            self.lvlm, encode, pruner, ratio, self.now, max_new_tokens=count, min_new_tokens=count
        )
        peak = None
        if self.lvlm.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.lvlm.device)
        kept = asked.selection.per_image(asked.encoded)
        costs = self._cost(pruner, asked.encoded, kept, asked.plan)
        return asked.reading._replace(peak=peak), costs

    def _cost(
        self, pruner: Any, encoded: Encoded, kept: Sequence[Sequence[int]], plan: LayerPlan | None
    ) -> dict[str, Any]:
        # FLOPs and cache are counted, question by question, from what was really kept.
        count, lm = self.setting.new_tokens, self.lvlm.shape.lm
        pairs = [
            question_parts(self.lvlm, encoded, i, count, pruner, kept[i], plan)
            for i in range(len(kept))
        ]
        text = encoded.attention.sum(1) - encoded.visual_mask.sum(1)
        layers = [plan.counts(*images) if plan else [sum(images)] * lm.layers for images in kept]
        width, kv_bytes = self.lvlm.model.dtype.itemsize, 0
        for words, counts in zip(text.tolist(), layers, strict=True):
            # The last token is never read.
            kv_bytes += cost.kv_bytes(lm, [words + n + count - 1 for n in counts], width)
        return {
            "visual_tokens": float(encoded.visual_mask.sum(1).double().mean()),
            "kept_tokens": float(np.mean([cost.layer_mean(counts) for counts in layers])),
            "kv_bytes": kv_bytes,
            "flops": _by_stage([pruned for pruned, _ in pairs], count, plan is not None),
            "full_flops": _by_stage([full for _, full in pairs], count, False),
        }


def _by_stage(parts: Sequence[Mapping[str, int]], new_tokens: int, inside: bool) -> dict[str, int]:
    """FLOPs of a batch by what a `Reading` times; rankings `inside` the model are part of its
    prefill."""
    total = dict.fromkeys((*parts[0], "selector"), 0)
    for part in parts:
        for name in total:
            total[name] += part.get(name, 0)
    # The prefill makes the first token, decoding the others: the LM head is split likewise.
    head = total["lm_head"] // new_tokens
    # Names as in `Reading`, so that measured and counted stages can be divided.
    stages = {
        "vision": total["vision"] + total["projector"],
        "selector": 0 if inside else total["selector"],
        "prefill": total["prefill"] + head + (total["selector"] if inside else 0),
        "decode": total["decode"] + head * (new_tokens - 1),
    }
    return {**stages, "total": sum(stages.values())}


def prompts(lvlm: FrozenLVLM, setting: Setting, batch: int) -> list[Sample]:
    """Questions about a picture of noise each, `text_tokens` long with their template.

    Raises:
        UserError: the template alone is longer, or the tokenizer has no question of that length.
    """
    width, height = setting.image
    draw = np.random.default_rng(0)
    pictures = [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for _ in range(batch)
    ]
    question = _question(lvlm, Sample("", (pictures[0],), "a", ()), setting.text_tokens)
    return [Sample(str(i), (picture,), question, ()) for i, picture in enumerate(pictures)]


def _question(lvlm: FrozenLVLM, shortest: Sample, wanted: int) -> str:
    ids = stock_inputs(lvlm, [shortest])["input_ids"]
    # Tokens that the processor writes beside the rendered text, such as marks of tiles.
    plain = lvlm.tokenizer(lvlm.render(shortest))["input_ids"]
    template = int((ids != lvlm.image_token).sum()) - len(plain)
    for words in range(1, wanted + 1):
        # the latter where a space is a token
        for question in (" ".join("a" * words), "a" + " ".join("a" * words)):
            text = lvlm.render(shortest._replace(question=question))
            if template + len(lvlm.tokenizer(text)["input_ids"]) == wanted:
                return question
    least = int((ids != lvlm.image_token).sum()) - 1
    raise UserError(
        f"{lvlm.name} has no prompt of latency.text_tokens={wanted}: its template alone takes "
        f"{least}; give another number above {least}."
    )


def untrained(pruner: LearnedPruner, width: int) -> LearnedPruner:
    """The same sizes with random weights for tokens of another width: what choosing takes does not
    depend on them."""
    fresh = type(pruner)(**{**pruner.config, "token_width": width}, **asdict(pruner.serving))
    return fresh.eval()
