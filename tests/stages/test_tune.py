"""Stage `tune`: only adapters learn, a resumed run is the run that was not stopped, and what is
left can be read by anybody."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.helpers import untrained_policy
from tests.scoring.shouting import Shouting
from tests.stages.plain import build_stage
from tests.stages.toy_runs import Metrics, SaveAt, fit
from tests.stages.toy_runs import lvlm as toy
from torch import Tensor

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.lvlm.adapters import FOLDER, add_adapter, read_adapter
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.gates import graph_bytes
from tprl.pruners.attention_dpp import AttentionDPPPruner
from tprl.pruners.fastv import FastVPruner
from tprl.pruners.keep_all import KeepAll
from tprl.scoring.ahead import Ready
from tprl.scoring.identity import of_lvlm
from tprl.scoring.validation import ServedScore
from tprl.splice import keep_all, splice
from tprl.stages.tune import Tune

RULE = AttentionDPPPruner()


@pytest.fixture(scope="module")
def llava() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32")


@pytest.fixture(scope="module")
def served(llava: FrozenLVLM) -> ServedScore:
    return ServedScore(llava, Scenes("val"), [0.25], 2, extras=RULE.extras)


@pytest.fixture(autouse=True)
def _as_before(llava: FrozenLVLM) -> Iterator[None]:
    yield
    for stage in STAGES:
        stage.take_off()
    STAGES.clear()


STAGES: list[Tune] = []


def tune(llava: FrozenLVLM, served: ServedScore, selector: Any = RULE, **options: Any) -> Tune:
    live = {"lvlm": llava, "dataset": Scenes("train"), "served": served, "selector": selector}
    STAGES.append(build_stage(Tune, **(live | options)))
    return STAGES[-1]


def test_where_memory_is_short_layers_are_computed_again(
    llava: FrozenLVLM, served: ServedScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tune(llava, served)
    encoded = llava.encode(samples := [Scenes("val")[i] for i in range(3)])
    prompt, answers = splice(encoded, keep_all(encoded)), [sample.answers[0] for sample in samples]
    length = prompt.attention.shape[1] + llava.answer_ids(answers).shape[1]
    for adapter in module.adapters:
        torch.nn.init.normal_(adapter, std=0.1)
    weights = {weight.untyped_storage().data_ptr() for weight in llava.model.parameters()}
    held, slopes = [], []
    for gib in (2.0, 0.0):
        monkeypatch.setattr(llava, "working_gib", gib)
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = llava.taught_log_prob(prompt, answers).sum()
        slopes.append(torch.autograd.grad(value, tuple(module.adapters)))
        held.append(sum(kept.values()))
    torch.testing.assert_close(*slopes)
    assert held[1] < held[0] / 2
    assert held[0] < graph_bytes(llava.shape.lm, 3, length, folded=True, adapted=True)


def logits(lvlm: FrozenLVLM) -> torch.Tensor:
    encoded = lvlm.encode([Scenes("test")[i] for i in range(2)])
    return lvlm.score(splice(encoded, keep_all(encoded)), ["red", "blue"])[0]


def test_adapters_learn_and_nothing_else_moves(llava: FrozenLVLM, served: ServedScore) -> None:
    before = {name: value.clone() for name, value in llava.model.named_parameters()}
    start = logits(llava)
    stage = tune(llava, served, iterations=6)
    assert torch.equal(logits(llava), start)  # an adapter adds nothing at the start
    metrics = Metrics()
    fit(stage, metrics)
    assert metrics["tune/loss"][-1] < metrics["tune/loss"][0] - 0.5
    assert not torch.allclose(logits(llava), start)
    stage.take_off()
    after = dict(llava.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits(llava), start)
    assert [x for x, _ in stage.curve] == [0.0, 24.0]


def test_it_learns_under_the_prompts_that_the_pruner_leaves(
    llava: FrozenLVLM, served: ServedScore
) -> None:
    """With everything kept, as in the control, the first loss is that of the whole prompt."""
    samples = [Scenes("train")[i] for i in range(4)]
    answers = [sample.answers[0] for sample in samples]
    encoded = llava.encode(samples, RULE.extras)
    for selector in (RULE, KeepAll()):
        stage = tune(llava, served, selector)
        stage._validate = lambda: None  # type: ignore[method-assign]
        stage.log = lambda *x, **y: None  # type: ignore[assignment, method-assign]
        loss = stage.training_step(Ready(samples), 0)
        prompt = splice(encoded, selector.select(encoded, 0.25))
        assert float(loss.detach()) == pytest.approx(
            -float(llava.score(prompt, answers)[0].mean()), abs=1e-5
        )
        # In parts, each computed again in the backward pass: the same loss.
        llava.micro_batch, whole = 3, llava.micro_batch
        parted = stage.training_step(Ready(samples), 0)
        llava.micro_batch = whole
        assert float(parted.detach()) == pytest.approx(float(loss.detach()), abs=1e-5)
        stage.take_off()


class Shouted(Shouting, Scenes):
    """References spelled as the model never writes."""


def test_references_are_taught_in_the_words_of_the_model(
    llava: FrozenLVLM, served: ServedScore
) -> None:
    shouted = Shouted("train")
    samples = [shouted[i] for i in range(4)]
    encoded = llava.encode(samples)
    words = llava.answer(splice(encoded, keep_all(encoded)))
    # Two questions that the model answers right but for the case, and two that it does not.
    for row in (0, 2):
        samples[row] = samples[row]._replace(answers=(words[row].upper(),))
    stage = tune(llava, served, answers="reference", dataset=shouted)
    references = [sample.answers[0] for sample in samples]
    expected = [words[0], references[1], words[2], references[3]]
    assert stage._answers(samples, encoded) == expected
    assert expected != references


@pytest.mark.slow
def test_own_answers_are_those_without_adapters(llava: FrozenLVLM, served: ServedScore) -> None:
    samples = [Scenes("train")[i] for i in range(3)]
    encoded = llava.encode(samples)
    expected = llava.answer(splice(encoded, keep_all(encoded)))
    stage = tune(llava, served, answers="own")
    with torch.no_grad():
        for parameter in stage.adapters:
            parameter.normal_()
    assert llava.answer(splice(encoded, keep_all(encoded))) != expected
    assert stage._answers(samples, encoded) == expected
    assert all(parameter.requires_grad for parameter in stage.adapters)
    assert not Tune.reads_answers(None, {"answers": "own"})
    assert Tune.reads_answers(None, {"answers": "reference"})


def test_a_resumed_run_is_the_run_that_was_not_stopped(
    llava: FrozenLVLM, served: ServedScore, tmp_path: Path
) -> None:
    whole = tune(llava, served, iterations=4)
    fit(whole, SaveAt(2, tmp_path / "last.ckpt"))
    expected = [parameter.detach().clone() for parameter in whole.adapters]
    whole.take_off()
    again = tune(llava, served, iterations=4)
    fit(again, ckpt_path=tmp_path / "last.ckpt")
    assert all(map(torch.equal, again.adapters, expected))


@pytest.mark.slow
def test_the_projector_may_learn_too(llava: FrozenLVLM, served: ServedScore) -> None:
    stage = tune(llava, served, projector=True, iterations=2)
    fit(stage)
    moved = [
        name
        for name, value in zip(stage.names, stage.adapters, strict=True)
        if "multi_modal_projector" in name and "lora_B" in name and bool(value.any())
    ]
    assert len(moved) == 2


def test_what_it_leaves(llava: FrozenLVLM, served: ServedScore, tmp_path: Path) -> None:
    policy = untrained_policy(llava.width)
    stage = tune(llava, served, policy, iterations=1)
    fit(stage)
    stage.save(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.scale == 2.0
    assert len(adapter.pairs) == 7 * llava.layers
    assert adapter.about["model"] == "llava"
    assert adapter.about["pruner"] == "tprl"
    assert (tmp_path / "pruner" / "model.safetensors").is_file()
    peft: Any = pytest.importorskip("peft")
    tuned = logits(llava)
    stage.take_off()
    wrapped = peft.PeftModel.from_pretrained(llava.model, tmp_path / FOLDER)
    assert torch.allclose(logits(llava), tuned, atol=1e-6)
    wrapped.unload()


def test_it_goes_on_from_an_adapter(llava: FrozenLVLM, served: ServedScore, tmp_path: Path) -> None:
    first = tune(llava, served, iterations=1)
    with torch.no_grad():
        for adapter in first.adapters:
            adapter.normal_(std=0.2)
    tuned = logits(llava)
    first.save(tmp_path)
    first.take_off()
    adapter = read_adapter(tmp_path)
    second = tune(llava, served, iterations=1, adapter=adapter)
    assert torch.allclose(logits(llava), tuned, atol=1e-6)
    second.save(tmp_path / "again")
    assert read_adapter(tmp_path / "again").about["iterations"] == 2
    assert read_adapter(tmp_path / "again").print == adapter.print
    second.take_off()
    # Stored results of the model with and without it are kept apart.
    base = of_lvlm(llava, {})
    take_off = add_adapter(llava.model, tmp_path)
    assert of_lvlm(llava, {}) != base
    take_off()
    assert of_lvlm(llava, {}) == base
    with pytest.raises(UserError, match=r"stage\.rank=2: give stage\.rank=4\."):
        tune(llava, served, rank=2, alpha=4.0 * 2, adapter=adapter)
    assert not any("lora" in name for name, _ in llava.model.named_modules())


def test_what_it_refuses(
    llava: FrozenLVLM, served: ServedScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="adapts a stock language model, and toy has none"):
        build_stage(Tune, lvlm=toy(), dataset=ToyDataset(), served=served, selector=RULE)
    with pytest.raises(UserError, match="pruner=fastv drops tokens between its layers"):
        tune(llava, served, FastVPruner())
    with pytest.raises(UserError, match="reads tokens of width 16, and those of this LVLM have 48"):
        tune(llava, served, untrained_policy(16))
    monkeypatch.setattr("tprl.runtime.packages.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"stage=tune needs the package peft: pip install"):
        tune(llava, served)
    assert not any("lora" in name for name, _ in llava.model.named_modules())


def test_it_is_a_lightning_module_of_adapters_alone(llava: FrozenLVLM, served: ServedScore) -> None:
    stage = tune(llava, served, untrained_policy(llava.width))
    assert isinstance(stage, pl.LightningModule)
    assert all(name.startswith("adapters.") for name in stage.state_dict())
