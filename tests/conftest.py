"""Set before anything is imported: no test may reach the network or an account."""

import logging
import os
from collections.abc import Iterator

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
