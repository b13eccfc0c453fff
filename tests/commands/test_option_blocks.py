"""Where hyper-parameters stand: in the block of their stage, typed without it, or missing from old
settings."""

import copy
from typing import Any

import pytest
from omegaconf import OmegaConf
from tests.commands.configs import sentence_of
from tests.configs import composed

from tprl.build import conf_dir
from tprl.commands.options import checked
from tprl.commands.stages import RUNNER, in_full, in_two_blocks, needs, stages_of
from tprl.kinds import typed
from tprl.runtime.quoting import in_short
from tprl.stages.base import Stage
from tprl.stages.ppo import PPO


def test_a_stage_that_hands_options_on_needs_what_its_base_needs() -> None:
    class Later(PPO):
        def __init__(self, later: int, **options: Any) -> None:
            super().__init__(**options)

    assert needs(Later) == needs(PPO) | {"later"}


def test_what_the_runner_reads_is_listed_where_stages_are_described() -> None:
    page = (conf_dir().parent / "docs" / "howto-stage.md").read_text()
    for text in (page, Stage.__doc__ or ""):
        assert [name for name in RUNNER if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("typed_word", "full"),
    [
        ("stage.lr_actor=0.1", "stage.module.lr_actor=0.1"),
        ("++stage.ppo.lr_actor=0.1", "++stage.ppo.module.lr_actor=0.1"),
        ("stage.module.lr_actor=0.1", "stage.module.lr_actor=0.1"),
        ("stage.ppo.served.limit=3", "stage.ppo.served.limit=3"),
        ("stage.init_from=a/b.c=d", "stage.init_from=a/b.c=d"),
        ("stage.evaluation.limit=3", "stage.evaluation.limit=3"),
        ("stage=ppo", "stage=ppo"),
        ("model.lr=1", "model.lr=1"),
    ],
)
def test_a_hyper_parameter_is_typed_without_its_block(typed_word: str, full: str) -> None:
    assert in_full(typed_word) == full
    assert in_full(in_short(full)) == full


def test_a_hyper_parameter_beside_its_block_is_refused() -> None:
    changed = composed("train", "stage=ppo", "+stage.iterations=3")
    assert sentence_of(checked, changed, "train") == (
        "stage.iterations=3 stands beside the block `module` of stage, where hyper-parameters are: "
        "write {module: {iterations: 3}} in a yaml, or stage.iterations=3 on the command line."
    )


@pytest.mark.parametrize(
    ("stage", "option"), [("ppo", "law"), ("ppo", "credit_blocks"), ("lfd", "loss")]
)
def test_settings_older_than_an_option_are_refused(stage: str, option: str) -> None:
    before = copy.deepcopy(composed("train", f"stage={stage}"))
    OmegaConf.set_struct(before, False)
    today = before.stage.module.pop(option)
    assert sentence_of(checked, before, "train").endswith(
        f" has no default for it: give stage.{option}=<value>; "
        f"conf/stage/{stage}.yaml has {typed(today)}."
    )
    OmegaConf.update(before, f"stage.module.{option}", today, force_add=True)
    assert checked(before, "train").stage.name == stage


def test_a_stage_may_join_the_chain() -> None:
    joined = composed("train", "+stage@stage.distill=distill", "stage.chain=[lfd,distill]")
    assert list(stages_of(OmegaConf.to_container(joined, resolve=True))) == [
        "stage.lfd",
        "stage.distill",
    ]  # type: ignore[arg-type]
    assert checked(copy.deepcopy(joined), "train") == joined


@pytest.mark.parametrize("stage", ["ppo", "all"])
def test_settings_without_blocks_are_converted(stage: str) -> None:
    today = composed("train", f"stage={stage}")
    before = copy.deepcopy(today)
    OmegaConf.set_struct(before, False)
    parts = (
        [before.stage]
        if stage == "ppo"
        else [before.stage[name] for name in before.stage.pop("chain")]
    )
    for part in parts:
        part.update(part.pop("module"))
    assert in_two_blocks(before).stage == today.stage
