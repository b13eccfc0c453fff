"""From a composed config to the page of `python -m src.demo`; with `run.py` and `run_eval.py` the only code that sees a
DictConfig."""

import importlib.util
import signal
import threading
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tprl.budget import check_keep_ratio
from tprl.build import build, load_component
from tprl.data.benchmark import take
from tprl.demo.compare import compare
from tprl.errors import UserError
from tprl.evaluation.evaluator import check_cost
from tprl.lvlm.layer_drop import LayerPruner
from tprl.run_eval import make_dataset, start
from tprl.scoring import Scorer
from tprl.types import Pruner

MISSING = (
    "python -m src.demo needs gradio, which is not installed: `make try` makes an environment with it and starts the "
    "page, or pip install 'tprl[demo]'."
)


def demo(cfg: DictConfig, directory: Path) -> Path:
    """Serve the page until Ctrl-C, and return `directory`.

    Raises:
        UserError: no gradio, bad input, or no free port.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError(MISSING)
    from tprl.demo.page import Example, make_page

    check_keep_ratio(cfg.keep_ratio)
    start(cfg, directory)
    lvlm = build(cfg.model)
    check_cost(lvlm)
    dataset = make_dataset(cfg.dataset, lvlm, cfg.split)
    first: Pruner | LayerPruner = build(cfg.pruner)
    pruners = {first.name: first} | {name: load_component("pruner", name) for name in cfg.pruners}
    scorer = Scorer(lvlm, dataset)
    examples = Example.of(take(dataset, range(min(len(dataset), 20 * cfg.examples))), cfg.examples)
    if not examples:
        raise UserError(f"dataset {dataset.name} has no question about an image to begin with: choose another.")
    chosen = {first.name: first}
    begin = compare(scorer, chosen, examples[0].image, examples[0].questions[0], cfg.keep_ratio)  # also warms up
    serve(make_page(scorer, pruners, examples, begin, cfg.keep_ratio), cfg.host, cfg.port)
    return directory


def serve(page: Any, host: str, port: int | None) -> None:
    """Until Ctrl-C or SIGTERM; says where.

    Raises:
        UserError: the port is taken, or there is no such host.
    """
    from tprl.demo.page import LOOK

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, ssr_mode=False, **LOOK
        )
    except OSError as error:
        raise UserError(f"the page cannot be served on {host}, port {port or '7860 to 7959'} ({error}).") from error
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    stop.wait()
    page.close()
