"""From a composed config to a folder that an engine serves: `python -m src.export`."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tprl.commands.engines import STARTS
from tprl.commands.entry import chosen
from tprl.commands.options import checked
from tprl.commands.setup import make_lvlm, start, with_run_config
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.base import make_pruner
from tprl.pruners.learned import load_pruner
from tprl.serving.folder import settings_for, write_folder
from tprl.serving.versions import check_vllm, vllm_version


def export(cfg: DictConfig, directory: Path) -> None:
    """Write `<directory>/<target>`.

    Raises:
        UserError: bad input, or something that the engine could not serve.
    """
    cfg = checked(cfg, "export")
    if cfg.run and chosen("pruner"):
        raise UserError("run and pruner both name the pruner: leave one out.")
    # A folder for vLLM is written anywhere; where vLLM is installed, its version must fit.
    if cfg.target == "vllm" and vllm_version() is not None:
        check_vllm()
    if cfg.target == "openvino" and importlib.util.find_spec("openvino") is None:
        raise UserError(
            "target=openvino converts here, and openvino is not installed: `make "
            "test-openvino` makes an environment with it, or pip install 'tprl[openvino]'."
        )
    if cfg.run:
        cfg = with_run_config(cfg, Path(cfg.run))
    # The pruner first: it is small, and a mistake in it costs no loading of the model.
    start(cfg, directory)
    pruner = load_pruner(Path(cfg.run)) if cfg.run else make_pruner(cfg.pruner)
    lvlm = make_lvlm(cfg.model)
    if not isinstance(lvlm, FrozenLVLM):
        raise UserError(
            f"model={lvlm.name} has no weights of a stock class to export: use model=tiny_llava."
        )
    settings = settings_for(pruner, node_of(cfg), cfg.keep_ratio, cfg.positions)
    folder = STARTS[cfg.target].folder(directory)
    if cfg.target == "vllm":
        write_folder(lvlm, pruner, settings, folder)
    else:
        # late: openvino is an extra
        from tprl.serving.openvino.convert import convert

        convert(lvlm, pruner, settings, folder, cfg.weights)


def node_of(cfg: DictConfig) -> Mapping[str, Any]:
    """How the pruner of the config is built."""
    node = OmegaConf.to_container(cfg.pruner, resolve=True) if cfg.get("pruner") else {}
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}
