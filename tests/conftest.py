"""Set before anything is imported: no test may reach the network or an account."""

import gc
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TPRL_CACHE": "",  # no test finds what another one left
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.pop("WANDB_API_KEY", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Rewriting asserts and type checks anew takes each process 18 s: the bytecode is kept, also where
# PYTHONDONTWRITEBYTECODE is set. git ignores it, `make clean` deletes it.
sys.dont_write_bytecode = False

# Files of few tests that take long: begun first, or a process waits for the other at the end.
DEAR = (
    "test_train.py",
    "test_ranks.py",
    "test_run_custom.py",
    "test_ppo_learning.py",
    "test_refusals.py",
    "test_wandb_run.py",
    "test_train_families.py",
    "test_checkpoint.py",
    "test_devices.py",
    "test_ppo_checkpoints.py",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules and tests live to the end: the garbage collector would look at them again and again,
    while they are collected and in every test, and find nothing."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file share a process, and with it the runs, configs and data that they are
    about."""
    if config.getoption("dist") != "load":  # another way was asked for
        return None
    config.option.loadscopereorder = False  # `pytest_collection_modifyitems` has ordered them
    return import_module("xdist.scheduler").LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Dear files first, then those of many tests; the tests of a file stay together."""
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in DEAR, -counts[item.path]))


@pytest.fixture(autouse=True)
def _clean_hydra() -> Iterator[None]:
    """Hydra's global state and its log handlers do not leak from one test into the next."""
    before = logging.root.handlers[:]
    yield
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    for handler in logging.root.handlers[:]:
        if isinstance(handler, logging.FileHandler) and handler not in before:
            handler.close()
    logging.root.handlers[:] = before


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless chromium; skips without one, or fails where NEED_BROWSER is set."""
    missing = pytest.fail if os.environ.get("NEED_BROWSER") else pytest.skip
    try:
        api: Any = import_module("playwright.sync_api")  # an extra
    except ImportError:
        missing("playwright is not installed: pip install -c constraints.txt -e '.[browser]'")
    with api.sync_playwright() as playwright:
        packaged = playwright.chromium.executable_path
        path = os.environ.get("CHROMIUM") or next(
            filter(None, map(shutil.which, BROWSERS)), packaged
        )
        if not Path(path).exists():
            missing(
                f"there is no {path}: install chromium (apt install chromium, or python -m "
                "playwright install chromium), or name one with CHROMIUM=/path/to/chromium."
            )
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
