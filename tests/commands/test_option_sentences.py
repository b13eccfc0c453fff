"""What single options become, and the one sentence that refuses each value that its reader could
not use."""

from typing import Any

import pytest
from omegaconf import OmegaConf
from tests.commands.configs import config, refused

from tprl.commands.options import checked
from tprl.commands.stages import in_full


@pytest.mark.parametrize(
    ("command", "key", "value", "becomes"),
    [
        ("eval", "keep_ratios", 0.333, [0.333]),
        ("eval", "seeds", 3, [3]),
        ("eval", "pruners", "uniform", ["uniform"]),
        ("eval", "models", "llava", ["llava"]),
        ("eval", "latency.batch_sizes", 1, [1]),
        ("eval", "latency.image", 336, [336, 336]),
        ("train stage=all", "stage.evaluation.seeds", 1, [1]),
        ("train stage=all", "stage.evaluation.keep_ratios", 1, [1]),
        ("train stage=all", "stage.evaluation.pruners", "random", ["random"]),
        ("train stage=all", "stage.baselines", "mlp", ["mlp"]),
        ("train stage=all", "stage.adapt.keep_ratios", 0.2, [0.2]),
        ("train stage=ppo", "stage.served.keep_ratios", 0.2, [0.2]),
        ("train stage=ppo", "stage.temperature", 0.5, [0.5, 0.5]),
        ("train stage=all", "stage.chain", "lfd", ["lfd"]),
        ("train stage=ppo", "stage.keep_ratio", 0.2, 0.2),
        ("train stage=lfd", "stage.progressive", 0.8, [0.8]),
        ("train stage=lfd", "stage.calibrate", 0.5, [0.5]),
        ("train stage=lfd", "stage.calibrate", [], []),
        ("train stage=lfd", "stage.save_every", None, None),
        ("eval", "run", 2024, "2024"),
    ],
)
def test_a_single_value_where_a_list_is_meant(
    command: str, key: str, value: Any, becomes: Any
) -> None:
    instance = checked(
        config(*command.split(), **{key.replace(".", "__"): value}), command.split()[0]
    )
    assert OmegaConf.select(instance, in_full(key)) == becomes


@pytest.mark.parametrize(
    ("command", "key", "value", "sentence"),
    [
        (
            "eval",
            "batch_size",
            0,
            "batch_size must be a whole number of at least 1, got 0; use e.g. 32.",
        ),
        (
            "eval",
            "batch_size",
            8.0,
            "batch_size must be a whole number of at least 1, got 8.0; use e.g. 32.",
        ),
        (
            "eval",
            "batch_size",
            "8",
            "batch_size must be a whole number of at least 1, got '8'; use e.g. 32.",
        ),
        (
            "eval",
            "batch_size",
            [8],
            "batch_size must be a whole number of at least 1, got [8]; use e.g. 32.",
        ),
        ("eval", "keep_ratios", [], "keep_ratios=[] leaves nothing to evaluate: name at least 1."),
        (
            "eval",
            "keep_ratios",
            [0.1, 0.1],
            "keep_ratios=[0.1,0.1] names 0.1 twice: name each once.",
        ),
        ("eval", "seeds", [-1], "seeds must be a whole number of at least 0, got -1; use e.g. 0."),
        ("eval", "pruners", "u", "pruners=u does not exist; choose one of: attention_color, "),
        ("eval", "pruners", ["u"], "pruners=u does not exist; choose one of: attention_color, "),
        ("eval", "mode", "fast", "mode must be accuracy, turns, calibrate, parity, selectors or "),
        (
            "eval",
            "model.max_new_tokens",
            0,
            "model.max_new_tokens must be a whole number of at least 1, got 0; ",
        ),
        ("eval", "model.dtype", "int8", "model.dtype must be float32, "),
        ("eval", "latency.image", [1, 2, 3], "latency.image=[1,2,3] has 3 values: name 2 of them."),
        (
            "eval",
            "dataset.limit",
            0,
            "dataset.limit must be a whole number of at least 1, got 0; use e.g. ",
        ),
        ("eval", "dataset.split", "val", "dataset.split=val would change nothing: it is set by "),
        (
            "eval",
            "served",
            1,
            "served is not an option: nothing reads it. Choose from: batch_size, calibrate, ",
        ),
        (
            "eval",
            "latency.rounds",
            1,
            "latency.rounds is not an option: nothing reads it. Choose from: batch_sizes, ",
        ),
        (
            "eval",
            "model.geometry",
            3,
            "model.geometry must be a table, got 3; write ",
        ),
        ("demo", "share", 1, "share must be true or false, got 1."),
        (
            "train stage=all",
            "stage.adapt.keep_ratios",
            [0.2, 0],
            "stage.adapt.keep_ratios must be a number in (0, 1], ",
        ),
        (
            "train stage=all",
            "stage.ppo.lr_actor",
            0,
            "stage.ppo.lr_actor must be a number above 0, got 0; use e.g. ",
        ),
        (
            "train stage=all",
            "stage.ppo.foo",
            0,
            "stage.ppo: tprl.stages.ppo.PPO has no argument foo; it takes: ",
        ),
        (
            "train stage=all",
            "stage.ppo.served.batch_size",
            3,
            "stage.ppo.served.batch_size is not an option: nothing ",
        ),
        (
            "train stage=all",
            "stage.evaluation.limit",
            0,
            "stage.evaluation.limit must be a whole number of ",
        ),
        (
            "train stage=ppo",
            "stage.seed",
            3,
            "stage.seed=3 would change nothing: it is set by seed. Leave it out.",
        ),
        (
            "train stage=ppo",
            "stage.reward",
            3,
            "stage.reward=3 would change nothing: it is set by the group reward. ",
        ),
        (
            "train stage=ppo",
            "stage.cache",
            "a",
            "stage.cache=a would change nothing: it is set by cache. Leave it out.",
        ),
        (
            "train stage=lfd",
            "stage.pruner",
            3,
            "stage.pruner=3 would change nothing: it is set by the group policy. ",
        ),
        (
            "train stage=lfd",
            "stage.demonstrator",
            3,
            "stage.demonstrator=3 would change nothing: it is set by the group ",
        ),
        (
            "train stage=ppo",
            "stage.trainer.max_steps",
            3,
            "stage.trainer.max_steps=3 would change nothing: it is set ",
        ),
        (
            "train stage=all",
            "stage.ppo.trainer.max_epochs",
            3,
            "stage.ppo.trainer.max_epochs=3 would change nothing: ",
        ),
        (
            "train stage=ppo",
            "stage.trainer.devices",
            2,
            "stage.trainer.devices=2 would change nothing: it is set by ",
        ),
        (
            "train stage=ppo",
            "stage.trainer.foo",
            2,
            "stage.trainer: lightning.pytorch.Trainer has no argument foo; it ",
        ),
        (
            "train stage=lfd",
            "stage.trainer.gradient_clip_val",
            2,
            (
                "stage.trainer.gradient_clip_val=2 contradicts "
                "stage.clip=1.0: leave it out, and set stage.clip."
            ),
        ),
        (
            "train stage=all",
            "stage.chain",
            ["lfd", "distill"],
            "stage.chain names distill, of which stage=all has no ",
        ),
        (
            "train stage=all",
            "stage.chain",
            ["lfd", "all"],
            "stage.chain=all is not a stage to run in a chain; choose one ",
        ),
        (
            "train stage=ppo",
            "stage.name",
            None,
            "stage has no name: write `name: <its name>` at the top of its yaml.",
        ),
        (
            "train stage=all",
            "stage.name",
            None,
            "stage has no name: write `name: <its name>` at the top of its yaml.",
        ),
        (
            "train stage=ppo",
            "stage.module",
            None,
            "stage (ppo) has no block `module` with its class and hyper-para",
        ),
        (
            "train stage=ppo",
            "stage.gamma",
            1.5,
            "stage.gamma must be a number in [0, 1], got 1.5; use e.g. 0.5.",
        ),
        (
            "train stage=ppo",
            "stage.temperature",
            [1, 0],
            "stage.temperature must be a number above 0, got 0; ",
        ),
        (
            "train stage=ppo",
            "stage.budget",
            "some",
            "stage.budget must be free, lagrange or exact_k, got some.",
        ),
        (
            "train stage=adapt",
            "stage.budgets",
            0.5,
            "stage.budgets=0.5 has 1 value: name at least 2.",
        ),
        (
            "train stage=pretrain",
            "stage.vision_steps",
            1.5,
            "stage.vision_steps must be a whole number of at ",
        ),
        (
            "train",
            "trainer.max_epochs",
            3,
            "trainer.max_epochs=3 would change nothing: it is set by the stage",
        ),
        (
            "train",
            "trainer.devices",
            0,
            "trainer.devices must be a whole number of at least 1, got 0; use ",
        ),
        (
            "train",
            "logger.overlays",
            -1,
            "logger.overlays must be a whole number of at least 0, got -1; ",
        ),
        (
            "train",
            "policy.select",
            "best",
            "policy.select must be topk, gumbel, dpp or threshold, got best.",
        ),
        (
            "train",
            "seed",
            2**32,
            "seed must be a whole number from 0 to 4294967295, got 4294967296; use e.g. 0.",
        ),
        ("train", "cache", True, "cache must be a text, got true; put quotes"),
    ],
)
def test_one_sentence(command: str, key: str, value: Any, sentence: str) -> None:
    assert refused(*command.split(), **{key.replace(".", "__"): value}).startswith(sentence)
