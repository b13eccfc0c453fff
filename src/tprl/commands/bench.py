"""Speed and exactness: `python -m src.bench latency`, `parity` and `selectors`.

`python -m src.eval mode=latency` and the like, as they were typed before, do the same.
"""

import logging
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from tprl.bench import selectors
from tprl.bench.latency import Setting, measure_latency, untrained
from tprl.bench.parity import parity, parity_table, varied
from tprl.build import load_component
from tprl.commands.options import checked
from tprl.commands.plan import check_logger
from tprl.commands.setup import asked_entries, make_dataset, make_lvlm, one_process, plain, start
from tprl.commands.threads import use_threads
from tprl.data.taking import nothing_left, take
from tprl.errors import UserError
from tprl.evaluation.evaluator import check_entries
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.learned import LearnedPruner
from tprl.report import latency
from tprl.runtime.files import write_atomically
from tprl.runtime.progress import Progress

log = logging.getLogger(__name__)


def bench(cfg: DictConfig, directory: Path) -> None:
    """Measure what `mode` names, into `directory`.

    Raises:
        UserError: bad input, or nothing that is measured here.
    """
    cfg = checked(cfg, "eval")
    check_logger(plain(cfg))
    if cfg.mode not in BENCHES:
        raise UserError(
            f"mode={cfg.mode} is not a benchmark: use {', '.join(BENCHES)}, or python -m src.eval."
        )
    BENCHES[cfg.mode](cfg, directory)


def _latency(cfg: DictConfig, directory: Path) -> None:
    """Milliseconds of every pruner, stage by stage, against what its FLOPs predict."""
    one_process("latency")
    # The setting is built first: its own checks need neither entries nor a model.
    settings = plain(cfg)
    setting = Setting(**settings["latency"])
    cfg, entries, _ = asked_entries(cfg, settings)
    start(cfg, directory)
    lvlm = make_lvlm(cfg.model)
    use_threads(cfg, directory, lvlm)
    if not isinstance(lvlm, FrozenLVLM):
        raise UserError(
            f"model={lvlm.name} has no vision tower and "
            "language model to time: use model=tiny_llava."
        )
    # A random model has another width than trained pruners: untrained networks of their size
    # replace them.
    if cfg.model.get("pretrained", "") is None:  # sizes are timed, not weights
        entries = [
            replace(entry, pruner=untrained(entry.pruner, lvlm.width))
            if isinstance(entry.pruner, LearnedPruner)
            else entry
            for entry in entries
        ]
    # Entries are checked in their final form, with the widths that are timed.
    check_entries(entries, lvlm)
    with Progress("latency") as tick:
        lines = measure_latency(lvlm, entries, setting, tick=tick)
    latency.write_latency(lines, lvlm, setting, directory)


def _parity(cfg: DictConfig, directory: Path) -> None:
    """Compare the model, or small random builds of `models`, with its stock class; prints and
    writes a table."""
    start(cfg, directory)
    # Small random builds in float32: differences are then of rounding alone.
    lvlms = [
        load_component("model", name, pretrained=None, dtype="float32") for name in cfg.models or []
    ]
    results = {}
    lvlms = lvlms or [make_lvlm(cfg.model)]
    use_threads(cfg, directory, lvlms[0])  # the others are as small
    for lvlm in lvlms:
        questions = make_dataset(cfg.dataset, lvlm, cfg.split)
        # Six questions by default: two for each of the three image shapes of `varied`.
        asked = range(min(cfg.limit or 6, len(questions)))
        samples = varied(take(questions, asked))
        if not samples:
            raise nothing_left(questions, len(asked), "to compare")
        if not isinstance(lvlm, FrozenLVLM):
            raise UserError(
                f"model={lvlm.name} has no stock class to compare with: use model=tiny_llava."
            )
        results[lvlm.name] = parity(lvlm, samples)
        log.info("%s: %s", lvlm.name, results[lvlm.name])
    write_atomically(directory / "parity.md", parity_table(results) + "\n")
    print(parity_table(results))


def _selectors(cfg: DictConfig, directory: Path) -> None:
    """The table of docs/baselines.md."""
    start(cfg, directory)
    use_threads(cfg, directory)
    # No model and no dataset: selectors are timed on synthetic batches.
    text = selectors.selector_table(selectors.measure_selectors())
    write_atomically(directory / "selectors.md", text + "\n")
    print(text)


BENCHES = {"latency": _latency, "parity": _parity, "selectors": _selectors}
