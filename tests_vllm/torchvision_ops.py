"""PyPI's torchvision beside a CPU build of torch, which lacks two operators that it registers
kernels for at import.

`make test-vllm` puts this file and a `.pth` that imports it into the site-packages of `.venv-vllm`,
so that every process there declares the operators before torchvision is imported. They stay without
an implementation: nothing that is served calls them.
"""

import sys
from typing import Any


class BeforeTorchvision:
    """An importer that imports nothing: it is asked for every module, and acts on one."""

    def __init__(self) -> None:
        self.library: Any = None  # its declarations end with it

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Declare what torchvision misses, once; None lets the usual importers go on."""
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, BeforeTorchvision())
