"""From a composed config to the page of `python -m src.demo`."""

import importlib.util
import logging
import socket
import threading
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tprl.commands.entry import chosen
from tprl.commands.options import checked
from tprl.commands.setup import make_dataset, make_lvlm, start, with_run_config
from tprl.data.taking import nothing_left, take
from tprl.demo.compare import AnyPruner, compare_pruners
from tprl.errors import UserError
from tprl.evaluation.calibration import calibration_of
from tprl.evaluation.evaluator import check_cost
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.base import make_pruner, named_pruner
from tprl.pruners.learned import load_pruner
from tprl.runtime.signals import Stopped

log = logging.getLogger(__name__)
MISSING = (
    "python -m src.demo needs gradio, which is not installed: `make demo-page` "
    "installs it and starts the page, or pip install -c constraints.txt -e '.[demo]'."
)


def demo(cfg: DictConfig, directory: Path) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: no gradio, bad input, or no free port.
    """
    cfg = checked(cfg, "demo")
    # Host, names and gradio are checked first: loading the model takes longest.
    check_settings(cfg)
    if cfg.run:
        cfg = with_run_config(cfg, Path(cfg.run))
    if importlib.util.find_spec("gradio") is None:
        raise UserError(MISSING)
    from tprl.demo.page import Example, make_page

    start(cfg, directory)
    lvlm = make_lvlm(cfg.model)
    check_cost(lvlm)
    if not isinstance(lvlm, FrozenLVLM):
        raise UserError(
            f"model={lvlm.name} has no vision tower and "
            "language model to time: use model=tiny_llava."
        )
    pruners = make_pruners(cfg, lvlm)
    dataset = make_dataset(cfg.dataset, lvlm, cfg.split)
    # Twenty questions per example: examples are images, and datasets ask several questions about
    # each.
    asked = range(min(len(dataset), 20 * cfg.examples))
    samples = take(dataset, asked)
    if not samples:
        raise nothing_left(dataset, len(asked), "to begin with")
    examples = Example.of(samples, cfg.examples)
    if not examples:
        raise UserError(
            f"dataset {dataset.name} has no question about one image to begin with: choose another."
        )
    # The page opens with a finished comparison in place of empty cards.
    name, first = next(iter(pruners.items()))
    ratio = starting_ratio(cfg, lvlm, first, dataset.name)
    begin = compare_pruners(lvlm, {name: first}, examples[0].image, examples[0].questions[0], ratio)
    serve(make_page(lvlm, pruners, examples, begin, ratio), cfg.host, cfg.port, cfg.share)


def starting_ratio(cfg: DictConfig, lvlm: FrozenLVLM, first: AnyPruner, dataset: str) -> float:
    """Where the slider stands: `keep_ratio`, or what the first pruner's calibration says that
    `retention` takes.

    Raises:
        UserError: no calibration, or one that says nothing of this.
    """
    if cfg.retention is None:
        return cfg.keep_ratio
    # The slider has one scale for all pruners, so the promise becomes a mean ratio.
    calibration = calibration_of(first, cfg.calibration)
    calibration.check(lvlm.model, first, dataset)
    kept = calibration.serve(first, cfg.retention, cfg.confidence).kept
    log.info("retention=%g: %s keeps %.3g of the tokens", cfg.retention, first.name, kept)
    return kept


def check_settings(cfg: DictConfig) -> None:
    """Refuse what cannot be before anything is loaded.

    Raises:
        UserError: no such host, or `run` beside `pruner`.
    """
    try:
        # Resolved now: gradio would fail only after the model is loaded.
        socket.getaddrinfo(cfg.host, cfg.port)
    except OSError as error:
        raise UserError(
            f"host={cfg.host} is not an address of this machine ({error}): "
            "use 127.0.0.1 or 0.0.0.0."
        ) from error
    if cfg.run and chosen("pruner"):
        raise UserError(
            "run and pruner both name the first pruner: "
            "leave one out; more of them are pruners=[...]."
        )


def make_pruners(cfg: DictConfig, lvlm: FrozenLVLM) -> dict[str, AnyPruner]:
    """The pruner of `run`, or `pruner`; then those of `pruners` that can read what this LVLM
    has."""
    # The requested pruner must fit; further pruners of the list are left out if they do not.
    first = load_pruner(Path(cfg.run)) if cfg.run else make_pruner(cfg.pruner)
    lvlm.check_extras(first.extras, lvlm.known_extras)
    pruners: dict[str, AnyPruner] = {first.name: first}
    for name in cfg.pruners:
        pruner = named_pruner(name)
        try:
            lvlm.check_extras(pruner.extras, lvlm.known_extras)
        except UserError as error:
            log.info("left out: %s (%s)", name, error)
        else:
            pruners.setdefault(name, pruner)
    return pruners


def serve(page: Any, host: str, port: int | None, share: bool = False) -> None:
    """Until Ctrl-C or SIGTERM; says where.

    Raises:
        UserError: the port is taken, or there is no such host.
    """
    from tprl.demo.page import LOOK

    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
    # The launch returns at once, so that the address can be printed before waiting.
    how: dict[str, Any] = {
        "quiet": True,
        "prevent_thread_lock": True,
        "ssr_mode": False,
        "max_file_size": "100mb",
        **LOOK,
    }
    try:
        _, address, shared = page.launch(server_name=host, server_port=port, share=share, **how)
    except (OSError, ValueError) as error:
        where = f"port={port}" if port else "any port from 7860 to 7959"
        raise UserError(
            f"the page cannot be served on host={host}, {where} ({error}): choose another host or "
            "port."
        ) from error
    print(f"open {shared or address} in a browser; Ctrl-C ends it", flush=True)
    try:
        # Nothing sets the event: only a signal ends the wait.
        threading.Event().wait()
    except (KeyboardInterrupt, Stopped):
        page.close(verbose=False)
