"""Adapters: merged or as hooks they are the same model, hooks come off exactly, and what belongs to
another model is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tprl
from tprl.bench.parity import stock_inputs
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.adapters import (
    ABOUT,
    CONFIG,
    WEIGHTS,
    Pair,
    add_adapter,
    merge_adapter,
    read_adapter,
    write_adapter,
)
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.recognition import model_print
from tprl.splice import keep_all, splice

NAME = "model.language_model.layers.1.self_attn.q_proj"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}


def small(**options: Any) -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32", **options)


@pytest.fixture(scope="module")
def llava() -> FrozenLVLM:
    return small()


def pair(width: int = 48) -> Pair:
    draw = torch.Generator().manual_seed(0)
    return Pair(torch.randn(2, width, generator=draw), torch.randn(width, 2, generator=draw))


@pytest.fixture
def folder(llava: FrozenLVLM, tmp_path: Path) -> Path:
    about = {"print": model_print(llava.model), "model": "llava"}
    write_adapter(tmp_path / "adapter", {NAME: pair()}, PLAIN, about)
    return tmp_path


def answers(lvlm: FrozenLVLM) -> Tensor:
    encoded = lvlm.encode([Scenes("test")[i] for i in range(3)])
    return lvlm.score(splice(encoded, keep_all(encoded)), ["red", "7", "left"])[0]


def test_merged_and_hooked_are_the_same_model(llava: FrozenLVLM, folder: Path) -> None:
    start, before = answers(llava), model_print(llava.model)
    take_off = add_adapter(llava.model, folder)
    hooked, other = answers(llava), model_print(llava.model)
    take_off()
    assert torch.equal(answers(llava), start)
    assert model_print(llava.model) == before != other
    merged = small(adapter=str(folder))
    assert torch.allclose(answers(merged), hooked, atol=1e-6)
    assert not torch.allclose(hooked, start)
    assert model_print(merged.model) == other
    # The weight itself, by the formula of LoRA with a scale of 8 / 2.
    weight = dict(llava.model.named_parameters())[f"{NAME}.weight"]
    changed = dict(merged.model.named_parameters())[f"{NAME}.weight"]
    assert torch.allclose(changed, weight + 4 * pair().up @ pair().down, atol=1e-6)


def test_hooks_over_a_merge_come_off_and_the_merge_stays(folder: Path) -> None:
    """A merge gives nothing to take off: that would restore the print alone, not the weights."""
    lvlm = small()
    assert merge_adapter(lvlm.model, folder) is None
    merged, name = answers(lvlm), model_print(lvlm.model)
    (folder / "adapter" / ABOUT).unlink()  # it says which weights the adapter is for
    take_off = add_adapter(lvlm.model, folder)
    assert not torch.allclose(answers(lvlm), merged)
    take_off()
    assert torch.equal(answers(lvlm), merged)
    assert model_print(lvlm.model) == name


def test_prune_adds_it_until_undo(llava: FrozenLVLM, folder: Path) -> None:
    inputs = stock_inputs(llava, [Scenes("test")[0]])
    how = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}

    def logits(model: Any) -> Tensor:
        return model.generate(**inputs, **how).logits[0]

    merged = small(adapter=str(folder))
    with tprl.prune(merged.model, "uniform", keep_ratio=0.25):
        expected = logits(merged.model)
    start = logits(llava.model)
    with tprl.prune(llava.model, "uniform", keep_ratio=0.25):
        assert not torch.allclose(logits(llava.model), expected, atol=1e-4)
    with tprl.prune(llava.model, "uniform", keep_ratio=0.25, adapter=folder):
        assert torch.allclose(logits(llava.model), expected, atol=1e-5)
    assert torch.equal(logits(llava.model), start)
    with pytest.raises(UserError, match="keep_ratio must be"):
        tprl.prune(llava.model, "uniform", keep_ratio=3.0, adapter=folder)
    assert torch.equal(logits(llava.model), start)


def test_what_belongs_to_another_model_is_refused(llava: FrozenLVLM, folder: Path) -> None:
    other = load_component("model", "llava_next", pretrained=None, dtype="float32")
    with pytest.raises(
        UserError,
        match=r"adapter was trained on other weights than this model's \(on llava\): load those",
    ):
        tprl.prune(other.model, "uniform", keep_ratio=0.25, adapter=folder)
    with pytest.raises(UserError, match="trained on other weights"):
        merge_adapter(other.model, folder)
    # peft alone says nothing of weights: names and sizes tell.
    (folder / "adapter" / ABOUT).unlink()
    add_adapter(other.model, folder)()
    attention = NAME.rpartition(".")[0]
    for name, sizes, what in (
        (NAME, (40,), "of another size"),
        (f"{NAME}x", (), "missing"),
        (attention, (), "no linear layer"),
    ):
        write_adapter(folder / "adapter", {name: pair(*sizes)}, PLAIN, {})
        with pytest.raises(UserError, match=f"does not fit this model: {name} is {what}"):
            add_adapter(llava.model, folder)


def test_what_cannot_be_read(folder: Path) -> None:
    place = folder / "adapter"
    with pytest.raises(UserError, match=r"adapter must be a run of stage=tune .*, got 3; use"):
        read_adapter(3)
    with pytest.raises(UserError, match=r"nowhere holds no adapter \(adapter_config\.json and"):
        read_adapter("nowhere")
    write_adapter(place, {NAME: pair()}, {**PLAIN, "r": 0}, {})
    with pytest.raises(UserError, match=r"is damaged .*: copy it again, or train it again"):
        read_adapter(folder)
    for change in ({"use_dora": True}, {"peft_type": "IA3"}):
        write_adapter(place, {NAME: pair()}, {**PLAIN, **change}, {})
        with pytest.raises(UserError, match=r"is more than a plain LoRA .*: load it with peft"):
            read_adapter(folder)
    write_adapter(place, {NAME: pair()}, PLAIN, {})
    (place / WEIGHTS).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"adapter is damaged \(its content differs"):
        read_adapter(folder)
    (place / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    (place / ".sums" / f"{CONFIG}.sha256").unlink()
    with pytest.raises(UserError, match="adapter is damaged"):
        read_adapter(folder)
