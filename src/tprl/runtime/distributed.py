"""The processes of one run, its ranks: who starts them, what each of them works on, and what they
tell one another.

A single process is rank 0 of 1, and nothing here changes or costs anything then. Everything that is
shared out is shared out by position (`share`), and every mean over a batch is put together again
with `weight`, so that a run on n ranks is the run on one, up to rounding.
"""

import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import BatchSampler, Sampler

from tprl.errors import UserError

T = TypeVar("T")
# options of Lightning's Trainer that say where ranks run
PLACES = ("accelerator", "devices", "num_nodes")
PATIENCE = timedelta(hours=3)  # others wait while rank 0 draws a report's pictures with its LVLM
STARTED = "TPRL_STARTED"  # conf/*.yaml name the run's directory after it


def rank() -> int:
    """The number of this process; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


# --- how a run gets its ranks ---------------------------------------------------------------------


def join() -> None:
    """Meet the processes that torchrun or srun started beside this one, if they did.

    It comes before Hydra, because all of them have to name the run's directory after the same
    moment: rank 0's, which they find in the environment variable TPRL_STARTED.
    """
    # Late, as below: pruners do without Lightning.
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    launcher = next(
        (kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None
    )
    if launcher is None or launcher.world_size() == 1:
        return
    # Lightning and torch read these, whoever started the processes.
    os.environ |= {
        "MASTER_ADDR": launcher.main_address,
        "MASTER_PORT": str(launcher.main_port),
        "RANK": str(launcher.global_rank()),
        "LOCAL_RANK": str(launcher.local_rank()),
        "WORLD_SIZE": str(launcher.world_size()),
    }
    _use_own_gpu()
    dist.init_process_group(
        _backend(), timeout=PATIENCE, rank=launcher.global_rank(), world_size=launcher.world_size()
    )
    # Clocks of machines differ: rank 0's moment names the directory of all.
    os.environ[STARTED] = gathered(os.environ.get(STARTED) or time.strftime("%Y-%m-%d_%H-%M-%S"))[0]


def launch_ranks(trainer: Mapping[str, Any]) -> None:
    """Have the ranks that `trainer` (options of Lightning's Trainer) asks for, before anything
    heavy is loaded.

    With strategy=ddp Lightning starts this command once more per further device, unless torchrun or
    srun did.

    Raises:
        UserError: there are several ranks and the strategy is another, or they cannot be had.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    # Several processes without DDP would each write the whole run.
    if trainer.get("strategy") != "ddp":
        if count() > 1:
            raise UserError(
                f"{count()} processes were started, and this trainer is for one: set trainer=ddp."
            )
        return
    # Ranks start here, before models are loaded; the Trainer then finds them started.
    places = {name: trainer[name] for name in PLACES if name in trainer}
    try:
        strategy = DDPStrategy(process_group_backend=_backend(), timeout=PATIENCE)
        Fabric(**places, strategy=strategy).launch()
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        asked = ", ".join(f"trainer.{name}={value}" for name, value in places.items())
        raise UserError(
            f"ranks cannot start with {asked} ({' '.join(str(error).split())}): on CPUs set "
            "trainer.accelerator=cpu trainer.devices=<processes>; under torchrun or srun set "
            "devices and num_nodes as given there."
        ) from error


def _backend() -> str:
    """Gloo carries what is on a CPU, NCCL what is on a GPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _use_own_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


# --- what each of them works on -------------------------------------------------------------------


def share(batch: Any) -> Any:
    """This rank's part of a batch (a list or a tensor): every `count()`-th entry.

    Where none is left for it, the first one, whose `weight` is 0: a rank that left a step out would
    stop all others.
    """
    # Dealt out in turns, so that shares differ by one entry at most.
    local = batch[rank() :: count()]
    return local if len(local) else batch[:1]


def local_part(part: Int[Tensor, " M"]) -> tuple[Int[Tensor, " m"], float]:
    """(where this rank has the prompts of a minibatch, the weight of their mean); of a part that is
    all others', the first prompt without weight (see `share`)."""
    # `share` dealt prompt p to rank p mod R, as its number p div R.
    local = part[part % count() == rank()] // count()
    weight = len(local) * count() / len(part)
    return (local if len(local) else torch.zeros(1, dtype=torch.long)), weight


def weight(size: int) -> float:
    """Of a mean over `share(batch)`, such that the mean over ranks is the mean over the batch of
    `size` entries."""
    return len(range(rank(), size, count())) * count() / size


class Shares(Sampler[list[int]]):
    """This rank's part of every batch of a batch sampler, which all ranks have to seed alike."""

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(share(batch)) for batch in self.batches)


# --- what they tell one another -------------------------------------------------------------------


def stacked(value: Float[Tensor, "*S"]) -> Float[Tensor, "R *S"]:
    """The tensors of all ranks, which have one shape."""
    if count() == 1:
        return value.unsqueeze(0)
    out = [torch.empty_like(value) for _ in range(count())]
    dist.all_gather(out, value.contiguous())
    return torch.stack(out)


def gathered_rows(value: Shaped[Tensor, "n *S"]) -> Shaped[Tensor, "N *S"]:
    """The rows of all ranks, which may have different numbers of them, one rank after another."""
    return torch.cat(gathered(value.cpu())).to(value.device)


def gathered(value: T) -> list[T]:
    """The objects of all ranks, small ones, without tensors on a GPU."""
    if count() == 1:
        return [value]
    out: list[Any] = [None] * count()
    dist.all_gather_object(out, value)
    return out


def barrier() -> None:
    """Until all ranks are here."""
    if count() > 1:
        dist.barrier()
