"""`tprl.prune` on models that something is wrapped around."""

import os
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tests.lvlm.test_families import FAMILIES, SAMPLES
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import tprl
from tprl.bench.parity import stock_inputs
from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.wrappers import stock_model


class Tuner(nn.Module):
    """As peft's LoraModel: between the wrapper and the stock model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["model"], name)


class PeftLike(nn.Module):
    """As peft's PeftModel."""

    def __init__(self, model: nn.Module, learns_prompt: bool = False) -> None:
        super().__init__()
        self.base_model = Tuner(model)
        self.peft_config = {"default": SimpleNamespace(is_prompt_learning=learns_prompt)}

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base_model"], name)

    def generate(self, *args: Any, **options: Any) -> Tensor:
        return self.get_base_model().generate(*args, **options)


class Proxy:
    """No module: it hands everything on."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)


class Captured(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.generate = model, model.generate


class FullyShardedDataParallel(Tuner):
    """By its name."""


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest) -> FrozenLVLM:
    return load_component("model", request.param, pretrained=None, dtype="float32")


@pytest.fixture(scope="module")
def llava() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32")


def answer(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model.generate(**batch, max_new_tokens=3, do_sample=False)


class Answers(NamedTuple):
    """What is generated, and how many tokens of each image were kept for it."""

    ids: list[list[int]]
    kept: list[int] | None = None


def answered(model: Any, batch: dict[str, Tensor], pruning: tprl.Pruning | None = None) -> Answers:
    ids = answer(model, batch).tolist()
    if pruning is None:
        return Answers(ids)
    return Answers(ids, [len(images[0].indices) for images in pruning.kept])


def stock(lvlm: FrozenLVLM) -> tuple[Answers, Answers, Answers]:
    """Of the stock model: before it is pruned, while it is, and afterwards."""
    batch = stock_inputs(lvlm, SAMPLES[:2])
    before = answered(lvlm.model, batch)
    with tprl.prune(lvlm.model, "divprune", keep_ratio=0.3) as pruning:
        during = answered(lvlm.model, batch, pruning)
    return before, during, before


def wrapped(lvlm: FrozenLVLM, wrapper: Any, by: Any = None) -> tuple[Answers, Answers, Answers]:
    """The same of a wrapper that is pruned, asked through `by`. The model inside cannot be pruned
    a second time meanwhile, and nothing is left on it."""
    batch, caller = stock_inputs(lvlm, SAMPLES[:2]), wrapper if by is None else by
    before, state = answered(caller, batch), dict(vars(lvlm.model))
    with tprl.prune(wrapper, "divprune", keep_ratio=0.3) as pruning:
        during = answered(caller, batch, pruning)
        with pytest.raises(UserError, match="pruned already"):
            tprl.prune(lvlm.model, "divprune", keep_ratio=0.3)
    assert vars(lvlm.model) == state
    return before, during, answered(caller, batch)


def test_adapters_around_every_family(lvlm: FrozenLVLM) -> None:
    assert wrapped(lvlm, PeftLike(lvlm.model)) == stock(lvlm)
    assert stock_model(lvlm.model) is lvlm.model


@pytest.mark.parametrize(
    "wrap", [Tuner, Proxy, lambda m: torch.compile(PeftLike(m), backend="eager")]
)
def test_other_wrappers(llava: FrozenLVLM, wrap: Any) -> None:
    assert wrapped(llava, wrap(llava.model)) == stock(llava)


def test_compiled_models(llava: FrozenLVLM) -> None:
    assert wrapped(llava, torch.compile(llava.model, backend="eager")) == stock(llava)


def test_data_parallel_models(llava: FrozenLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", torch.distributed.is_initialized)
    expected = stock(llava)
    assert wrapped(llava, DataParallel(llava.model), by=llava.model) == expected
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        llava.model.lm_head.weight.requires_grad_(True)
        parallel = DistributedDataParallel(llava.model)
        assert wrapped(llava, parallel, by=parallel.module) == expected
    finally:
        llava.model.requires_grad_(False)
        torch.distributed.destroy_process_group()


def test_hooks_of_accelerate(llava: FrozenLVLM) -> None:
    expected = stock(llava)
    add_hook_to_module(llava.model, ModelHook())
    try:
        assert wrapped(llava, llava.model) == expected
    finally:
        remove_hook_from_module(llava.model)


def test_weights_that_a_hook_brings() -> None:
    lvlm = load_component("model", "llava", pretrained=None, dtype="float32")
    batch = stock_inputs(lvlm, SAMPLES[:2])
    with tprl.prune(lvlm.model, "divprune", keep_ratio=0.3):
        expected = answer(lvlm.model, batch)
    away = cpu_offload(lvlm.model, execution_device=torch.device("cpu"))
    assert away.device.type == "meta"
    with tprl.prune(away, "divprune", keep_ratio=0.3):
        assert torch.equal(answer(away, batch), expected)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda m: PeftLike(m, learns_prompt=True),
            r"adapter 'default' of PeftLike is a SimpleNamespace.*such as LoRA",
        ),
        (FullyShardedDataParallel, "FullyShardedDataParallel shards the weights"),
        (
            lambda m: PeftLike(FullyShardedDataParallel(m)),
            "FullyShardedDataParallel in PeftLike shards",
        ),
        (Captured, "Captured still calls the generate that its model had.*wrap it afterwards"),
        (
            lambda m: nn.ModuleList([m, load_component("model", "llava", pretrained=None).model]),
            "holds 2 models",
        ),
        (lambda m: nn.Linear(2, 2), r"Linear \(model_type Linear\) has no image tokens"),
    ],
)
def test_refused_at_prune(llava: FrozenLVLM, wrap: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tprl.prune(wrap(llava.model), "divprune", keep_ratio=0.3)
    assert "generate" not in vars(llava.model)
