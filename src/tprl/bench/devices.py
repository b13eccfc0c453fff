"""Published speeds and memories of devices, for forecasts."""

import os
import time
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What a forecast needs to know of a device.

    Args:
        name: as tables show it.
        tflops: dense bfloat16, or float32 on a CPU (measured).
        bandwidth: TB/s of its memory.
        memory: GiB.
    """

    name: str
    tflops: float
    bandwidth: float
    memory: float


# Data sheets; of a family the commonest form (SXM).
KNOWN = (
    Device("H200", 989.0, 4.8, 131.0),
    Device("H100", 989.0, 3.35, 80.0),
    Device("A100", 312.0, 2.0, 80.0),
    Device("L40", 181.0, 0.86, 48.0),
    Device("A10", 125.0, 0.6, 24.0),
    Device("4090", 165.0, 1.0, 24.0),
    Device("V100", 125.0, 0.9, 32.0),
    Device("T4", 65.0, 0.32, 16.0),
)
STATED = ("H200", "A100")  # what recipes are stated for, whatever is at hand


def at_hand(on_cpu: bool = False) -> Device:
    """The device that a run here would use; the speed of a GPU that is not known is taken from an
    A100's."""
    if torch.cuda.is_available() and not on_cpu:
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / GIB
        known = next((device for device in KNOWN if device.name in name), None)
        twin = known or next(device for device in KNOWN if device.name == "A100")
        label = name if known else f"{name} (speed of an {twin.name})"
        return Device(label, twin.tflops, twin.bandwidth, memory)
    # A CPU's memory bandwidth is a guess: no data sheet is asked for it.
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("CPU", _measured_tflops(), 0.02, pages / GIB)


def named(name: str) -> Device:
    """A device of `KNOWN`."""
    return next(device for device in KNOWN if device.name == name)


def _measured_tflops(size: int = 768) -> float:
    """Of a matrix product here, in float32: the best of three."""
    a, b = torch.randn(2, size, size).unbind()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
