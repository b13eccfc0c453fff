"""`python -m src.check`: what a run would do, before it does it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lvlm.real import CHECKPOINTS, described, real
from tests.lvlm.small import each_family, save_folder

from tprl.bench.devices import named
from tprl.build import choices, load_component
from tprl.commands.check import check_first, check_run, composed, model_of, report
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.runtime import distributed


@pytest.mark.parametrize("name", each_family())
def test_the_forecast_of_tokens_is_what_encoding_makes(name: str) -> None:
    text = report(composed([f"model={name}", "model.pretrained=null", "trainer=cpu"]))
    lvlm: FrozenLVLM = load_component("model", name, pretrained=None, dtype="float32")
    sample = load_component("dataset", "scenes", split="train")[0]
    encoded = lvlm.encode([sample])
    assert f"«{sample.question}»" in text
    columns = int((encoded.input_ids == lvlm.image_token).sum())
    assert f"tokens     {int(encoded.attention.sum()) - columns} of text, {columns} visual" in text
    assert "note: scenes are drawings" not in text  # a model of this size was made for them
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("ppo", "evaluation"))]


def test_no_weight_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    lvlm = model_of(composed([]))
    assert {weight.device.type for weight in lvlm.model.parameters()} == {"meta"}
    assert check_run([]) == 0
    printed = capsys.readouterr().out
    assert "'large' is scored as 'large' '</s>'" in printed
    assert "all of it" in printed


def test_mistakes_are_reported_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_run(["model=llava", "model.pretrained=/nowhere/at/all"]) == 2
    assert check_run(["model=toy"]) == 2
    assert check_run(["model.mikro_batch=3"]) == 2
    first, second, third = capsys.readouterr().err.strip().splitlines()
    assert "needs the weights '/nowhere/at/all'" in first
    assert "neither prompt nor weights" in second
    assert "mikro_batch" in third


def test_options_are_those_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_run(["stage=ppo", "stage.gamma=0.5"]) == 2
    assert check_run(["weights=yes"]) == 2
    assert check_run(["model=toy", "weights=True"]) == 2
    first, second, third = capsys.readouterr().err.strip().splitlines()
    assert first == "stage.gamma is not read: only advantage=gae has a critic; leave it out."
    assert second == "weights must be true or false, got yes."
    assert "neither prompt nor weights" in third


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "a.json"),
            "cannot read a.json (No such file or directory)",
        ),
        (
            OSError("Can't load the processor\nof a.\n"),
            "Can't load the processor of a: check the paths and names of ",
        ),
    ],
)
def test_missing_files_are_reported(
    error: OSError,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opened(words: list[str]) -> None:
        raise error

    monkeypatch.setattr("tprl.commands.check.composed", opened)
    assert check_run([]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(sentence)


def test_a_stage_without_a_cost_model_is_named() -> None:
    text = report(composed(["stage=pretrain", "trainer=cpu"]))
    assert text.endswith("costs      nobody has counted what stage pretrain takes")


def test_other_ranks_are_refused_for_the_reason_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "gathered", lambda reason: ["it does not fit.", reason])
    with pytest.raises(UserError, match=r"^it does not fit\.$"):
        check_first(composed(["model=llava", "model.pretrained=/nowhere/at/all", "trainer=cpu"]))


def test_what_cannot_fit_is_refused_with_an_option() -> None:
    config = composed(["model=llava", "model.pretrained=null", "trainer=cpu", "stage=ppo"])
    tiny = replace(named("H200"), memory=0.001)
    with pytest.raises(
        UserError, match=r"stage ppo needs about .* H200 has 0\.0: set .*model\.load_in=4bit"
    ):
        report(config, tiny)
    report(config, named("H200"))


def test_it_is_printed_before_the_first_run_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    save_folder(load_component("model", "llava", pretrained=None, dtype="float32"), folder)
    words = [
        "model=llava",
        f"model.pretrained={folder}",
        "trainer=cpu",
        f"cache={tmp_path / 'cache'}",
    ]
    check_first(composed(words))
    assert "prompts read" in capsys.readouterr().out
    check_first(composed(words))
    check_first(composed([f"cache={tmp_path / 'cache'}"]))  # ships with TPRL
    assert not capsys.readouterr().out
    monkeypatch.setattr("tprl.commands.check.at_hand", lambda on_cpu: named("H200"))
    check_first(composed(words))  # what fits there may not fit here
    assert "H200 has 131 GiB" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache")
    check_first(composed(words))
    assert "prompts read" in capsys.readouterr().out


def test_weights_are_compared_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_run(["weights=true", "trainer=cpu"]) == 0
    assert "differ from the stock class's by 0" in capsys.readouterr().out


@real
@pytest.mark.parametrize(("folder", "name"), CHECKPOINTS.items())
def test_published_settings(folder: str, name: str, tmp_path: Path) -> None:
    """The real sizes, templates and processors, without weights."""
    described(folder, tmp_path / folder)
    recipe = (
        [f"experiment={name}"]
        if name in choices("experiment")
        else ["experiment=large", f"model={name}"]
    )
    text = report(composed([*recipe, f"model.pretrained={tmp_path / folder}"]), named("H200"))
    shapes = {
        line.split("x")[0].strip(): line for line in text.splitlines() if line[:5].strip().isdigit()
    }
    seen, tokens = shapes["640"], int(shapes["640"].split()[3])
    bounds = {
        "llava": 576,
        "llava_next": 576 + 36 * 48 + 36,
        "qwen2_5_vl": 391,
        "internvl3": 7 * 256,
        "smolvlm2": 5 * 81,
    }
    assert tokens == bounds.get(name, tokens)
    assert ("75 %" in seen) == (name == "llava")
    assert "datasets" not in text
