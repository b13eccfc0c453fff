"""What does not fit together is refused by its own name before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tests.commands.configs import config
from tests.configs import composed

from tprl.commands.options import checked
from tprl.commands.plan import check_plan
from tprl.errors import UserError
from tprl.stages.ppo_settings import check_scorer


def planned(*words: str, **values: Any) -> Any:
    """The settings of a training that is allowed."""
    plain = OmegaConf.to_container(
        checked(config("train", *words, **values), "train"), resolve=True
    )
    check_plan(plain)  # type: ignore[arg-type]
    return plain


@pytest.mark.parametrize(
    "words", [(), ("experiment=paper",), ("debug=fast",), ("stage=lfd",), ("stage=pretrain",)]
)
def test_what_ships_fits(words: tuple[str, ...]) -> None:
    assert planned(*words) == OmegaConf.to_container(config("train", *words), resolve=True)


@pytest.mark.parametrize(
    ("words", "values", "sentence"),
    [
        (
            "stage=all",
            {"stage__ppo__group": 1},
            "stage.ppo.advantage=rloo compares episodes of one question: set ",
        ),
        (
            "stage=ppo",
            {"stage__minibatch": 8},
            "stage.minibatch=8 is smaller than stage.group=16, whose episodes ",
        ),
        (
            "stage=all",
            {"stage__ppo__steps": 4},
            "stage.ppo.steps=4 are more steps than policy.max_steps=3: set policy",
        ),
        (
            "stage=lfd",
            {"stage__progressive": [0.9] * 5},
            "stage.progressive=[0.9,0.9,0.9,0.9,0.9] has more steps than ",
        ),
        (
            "stage=all",
            {"stage__adapt__keep_ratios": 0.9},
            "stage.adapt.keep_ratios=0.9 is not a mean of stage.adapt.budg",
        ),
        (
            "stage=all",
            {"stage__ppo__init_from": "runs/a"},
            "stage.ppo.init_from=runs/a would not be read: in stage=all",
        ),
        (
            "stage=all",
            {"stage__evaluation__pruners": "tprl"},
            "stage.evaluation.pruners=tprl has the name of a pruner",
        ),
        (
            "stage=ppo scorer=vllm",
            {},
            "vLLM is not installed here: `make test-vllm` makes an environment with ",
        ),
        (
            "stage=all policy=mlp",
            {},
            "stage.baselines=[mlp] names the policy itself (policy=mlp): leave it out.",
        ),
        (
            "stage=all pruner=oracle",
            {},
            "pruner=oracle knows where the answer is and cannot demonstrate: use another.",
        ),
        (
            "stage=all pruner=resize",
            {},
            "pruner=resize puts new tokens in the place of all that there are and cannot",
        ),
        (
            "stage=all pruner=fastv",
            {},
            "pruner=fastv drops tokens between the layers of the language model and cannot",
        ),
        (
            "stage=all",
            {"policy__heads": 7},
            "policy.width must be a multiple of policy.heads=7, got 64",
        ),
        (
            "stage=ppo",
            {"policy__select": "threshold"},
            "policy.select=threshold needs a threshold: set policy.tau, or",
        ),
        (
            "stage=ppo",
            {"stage__init_from": "/no/such"},
            "/no/such does not exist: give the directory that a training",
        ),
        (
            "stage=all",
            {"cache": "/proc/version/x"},
            "cache=/proc/version/x cannot be used (/proc/version is not a folder)",
        ),
        (
            "stage=all dataset=custom",
            {"dataset__labelled": False},
            (
                "stage=ppo reads answers, and dataset custom has none (dataset.labelled=false): "
                "use stage=lfd, and stage=ppo with rew"
            ),
        ),
        (
            "stage=adapt",
            {"stage__calibrate": [0.5]},
            "stage.calibrate=[0.5] is not read: stage=adapt holds the policy to ",
        ),
        (
            "stage=autoencoder",
            {"stage__served__limit": 3},
            "stage.served={limit:3} is not read: stage=autoencoder is ",
        ),
        (
            "stage=ppo",
            {"stage__blueprint": {"_target_": "tprl.pretraining.tiny_llava.build"}},
            (
                "stage.blueprint={_target_:tprl.pretraining.tiny_llava.build} "
                "is not read: stage=ppo builds no model"
            ),
        ),
        (
            "stage=ppo",
            {"stage__served": {}},
            "stage.served={} names no keep ratios to score on validation questions: ",
        ),
        (
            "stage=ppo",
            {"stage__credit_blocks": 1},
            "stage.credit_blocks=1 has no other block to share the credit with",
        ),
        (
            "stage=all",
            {"stage__ppo__credit_blocks": 3, "stage__ppo__ratio": "joint"},
            "stage.ppo.credit_blocks=3 needs",
        ),
        (
            "stage=all +stage@stage.pretrain=pretrain",
            {"stage__chain": ["lfd", "pretrain"]},
            (
                "stage.chain names pretrain, which trains no policy: "
                "leave it out, and run stage=pretrain alone."
            ),
        ),
        (
            "stage=distill dataset=custom reward=fidelity",
            {"dataset__labelled": False},
            "stage=distill reads answers, and dataset custom has none (dataset.labelled=false)",
        ),
    ],
)
def test_one_sentence(words: str, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(*words.split(), **values)
    assert str(caught.value).startswith(sentence)


def test_without_labels_fidelity_will_do() -> None:
    for words in (("stage=ppo", "reward=fidelity"), ("stage=lfd",)):
        assert (
            planned(*words, "dataset=custom", dataset__labelled=False)["dataset"]["labelled"]
            is False
        )


def test_an_engine_compares_no_distributions() -> None:
    config = composed("train", "stage=ppo", "scorer=vllm", "reward=fidelity")
    with pytest.raises(UserError, match="reward=fidelity compares whole distributions, and the e"):
        check_scorer({"scorer": config.scorer, "reward": config.reward})
    check_scorer({"scorer": config.scorer, "reward": composed("train").reward})


def test_a_mode_that_wandb_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "off")
    with pytest.raises(
        UserError,
        match="WANDB_MODE=off is unknown to W&B: set it to online, offline, disabled or sha",
    ):
        planned("stage=lfd")
    assert planned("stage=lfd", "logger=csv")["stage"]["name"] == "lfd"


def test_groups_cut_by_a_minibatch_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        planned("stage=ppo", stage__group=5)
    assert "stage.minibatch=384 holds 76 whole groups: 380 episodes" in caplog.text
