"""How an exported folder is started; light, because every command line asks it what to type
next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tprl.runtime.quoting import quoted


class Start(NamedTuple):
    """Of one target."""

    name: str
    line: Callable[[Path, Any], str]  # the folder and the command's config -> what to type

    def folder(self, directory: Path) -> Path:
        """Where an export in a run's directory goes."""
        return directory / self.name


def _vllm(folder: Path, config: Any) -> str:
    # Left to itself, vLLM halves the precision of float32 weights.
    dtype = config.model.get("dtype") or "float32"
    server = "python -m vllm.entrypoints.openai.api_server --model"
    return f"{server} {quoted(str(folder))} --dtype {quoted(str(dtype))}"


def _openvino(folder: Path, config: Any) -> str:
    return f"python {quoted(str(folder / 'answer.py'))} <image> 'how many objects are there?'"


STARTS = {"vllm": Start("vllm", _vllm), "openvino": Start("openvino", _openvino)}


def next_line(config: Any, directory: Path) -> str:
    """What to type after an export."""
    start = STARTS[config.target]
    return start.line(start.folder(directory), config)
