"""What options may hold: single values become lists, and nothing else passes that its reader could
not use."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from tprl.build import build, choices, conf_dir
from tprl.commands.annotated import annotations_of, kind_of
from tprl.commands.option_kinds import KINDS, SET_BY
from tprl.commands.options import _kind, _options, checked
from tprl.commands.stages import RUNNER, in_full, in_two_blocks, needs, stages_of
from tprl.errors import UserError
from tprl.kinds import Number, typed
from tprl.runtime.quoting import in_short
from tprl.stages.base import Stage
from tprl.stages.ppo import PPO

NAN, INF = float("nan"), float("inf")
SIGNED = ("floor", "weight", "agreement", "devices")  # may be below 0
MAY_BE_NULL = ("limit", "save_every", "port", "tau", "theta", "gradient_clip_val")


@lru_cache
def composed(entry: str, *words: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose(entry, overrides=list(words))


def config(entry: str, *words: str, **values: Any) -> DictConfig:
    """A config with further values, `stage__lr=1` for `stage.lr=1`."""
    changed = copy.deepcopy(composed(entry, *words))
    for key, value in values.items():
        OmegaConf.update(
            changed, in_full(key.replace("__", ".")), value, merge=False, force_add=True
        )
    return changed


def refused(entry: str, *words: str, **values: Any) -> str:
    return sentence_of(checked, config(entry, *words, **values), entry)


def sentence_of(check: Callable[..., Any], *arguments: Any) -> str:
    """The one sentence of a refusal."""
    with pytest.raises(UserError) as caught:
        check(*arguments)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def numbers(entry: str, *words: str) -> Iterator[tuple[str, Callable[[str, Any], Any], Any]]:
    """Options that hold a number, with what checks them and what they hold."""
    plain = OmegaConf.to_container(composed(entry, *words), resolve=True)
    assert isinstance(plain, dict)
    for key, place, value, annotation in _options(plain, entry):
        if isinstance(value, int | float) and not isinstance(value, bool) and "[" not in key:
            yield key, _kind(key, place, annotation), value


def no_numbers(name: str) -> list[Any]:
    """Values that no option of this name takes."""
    bad: list[Any] = ["8", True, NAN, INF, 10**400]
    bad += [] if name in SIGNED else [-1, -0.5]
    return bad + ([] if name in MAY_BE_NULL else [None])


COMMANDS = [
    *(("train", f"stage={name}") for name in choices("stage")),
    ("eval", "pruner=random"),
    ("eval", "mode=latency"),
    ("demo", "model=toy"),
    ("export", "model=toy"),
]


class TestEveryOption:
    @pytest.mark.parametrize(
        "command", [*COMMANDS, ("train", "experiment=paper"), ("train", "debug=fast")]
    )
    def test_what_the_yamls_hold_passes_unchanged(self, command: tuple[str, ...]) -> None:
        before = composed(*command)
        assert checked(copy.deepcopy(before), command[0]) == before

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_number_is_nothing_else(self, command: tuple[str, ...]) -> None:
        options = list(numbers(*command))
        assert options
        changed = copy.deepcopy(composed(*command))
        for key, check, value in options:
            # A whole config is checked where the way to the option matters, and the option alone
            # for the rest.
            for bad in ("few", {"a": 1}, {}):
                OmegaConf.update(changed, in_full(key), bad, merge=False, force_add=True)
                message = sentence_of(checked, changed, command[0])
                assert message.startswith((f"{key}={typed(bad)} ", f"{key} must be ")), (
                    key,
                    bad,
                    message,
                )
            OmegaConf.update(changed, in_full(key), value, merge=False, force_add=True)
            for bad in no_numbers(key.rpartition(".")[2]):
                message = sentence_of(check, key, bad)
                assert message.startswith((f"{key}={typed(bad)} ", f"{key} must be ")), (
                    key,
                    bad,
                    message,
                )
        assert checked(changed, command[0])

    def test_every_number_of_every_class_in_conf_has_bounds(self) -> None:
        """A new argument needs a line in KINDS or an `Annotated`, or nobody says what is too small
        for it."""
        seen = 0
        for group in ("stage", "model", "dataset", "policy", "pruner", "reward"):
            for name in choices(group):
                node = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
                for target in targets(node):
                    for argument, annotation in annotations_of(target).items():
                        numeric = {int, float} & {annotation, *getattr(annotation, "__args__", ())}
                        live = f"{group}.{argument}" in SET_BY
                        if numeric and not live and argument not in RUNNER:
                            place = f"{name if group == 'stage' else group}.{argument}"
                            bounded = hasattr(annotation, "__metadata__")
                            assert bounded or _kind(place, place, annotation) in KINDS.values(), (
                                place
                            )
                            seen += 1
        assert seen > 100


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping) and "_target_" in node:
        yield node["_target_"]
    for child in (
        node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    ):
        yield from targets(child)


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
    made = checked(config(*command.split(), **{key.replace(".", "__"): value}), command.split()[0])
    assert OmegaConf.select(made, in_full(key)) == becomes


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
        ("eval", "pruners", "u", "pruners=u does not exist; choose one of: attention_dpp, "),
        ("eval", "pruners", ["u"], "pruners=u does not exist; choose one of: attention_dpp, "),
        ("eval", "mode", "fast", "mode must be accuracy, parity, selectors or latency, got fast."),
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
            "served is no option: nothing reads it. There are: batch_size, compare",
        ),
        (
            "eval",
            "latency.rounds",
            1,
            "latency.rounds is no option: nothing reads it. There are: batch_sizes, ",
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
            "stage.ppo.served.batch_size is no option: nothing ",
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
                "stage.trainer.gradient_clip_val=2 would stand against "
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
            "stage.chain=all is no stage to run in a chain; choose one ",
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


class TestPrompt:
    @pytest.mark.parametrize(
        "prompt",
        [
            "{question}",
            'USER: <image> {question} as {json} {"a": [1]} {{}} { ASSISTANT:',
            "} {0} {question}",
        ],
    )
    def test_braces_are_text(self, prompt: str) -> None:
        assert checked(config("eval", model__prompt=prompt), "eval").model.prompt == prompt

    @pytest.mark.parametrize(
        "prompt", ["<image> {questions}", "<image> {", "{question!r}", "", 5, ["{question}"]]
    )
    def test_a_question_needs_a_place(self, prompt: Any) -> None:
        assert "has no {question}, so nothing would be asked: write it" in refused(
            "eval", model__prompt=prompt
        )


def test_an_annotation_can_say_the_bounds() -> None:
    share = kind_of(Annotated[float, Number(0, 1)])
    assert share("pruner.share", 0.5) == 0.5
    with pytest.raises(UserError, match=r"pruner\.share must be a number in \[0, 1\], got 2"):
        share("pruner.share", 2)


def test_numbers_in_words() -> None:
    kinds = [
        Number(),
        Number(0, 1, above=True),
        Number(0, 1, below=True),
        Number(1, 9, whole=True),
        Number(0, above=True),
    ]
    shown = [
        "a number",
        "a number in (0, 1]",
        "a number in [0, 1)",
        "a whole number from 1 to 9",
        "a number above 0",
    ]
    assert [kind.in_words() for kind in kinds] == shown


def test_reward_terms_compose_on_the_command_line() -> None:
    words = (
        "stage=ppo",
        "reward=[log_likelihood,tokens_saved]",
        "reward.terms.tokens_saved.weight=0.2",
    )
    reward = build(checked(composed("train", *words), "train").reward)
    assert [(term.name, term.weight) for term in reward.terms] == [
        ("log_likelihood", 1.0),
        ("tokens_saved", 0.2),
    ]
    assert reward.limits_tokens
    bad = (*words[:2], "+reward.terms.0.weight=1")
    assert refused("train", *bad).startswith("reward.terms.0")


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


def test_a_hyper_parameter_beside_its_block_is_one_sentence() -> None:
    changed = composed("train", "stage=ppo", "+stage.iterations=3")
    assert sentence_of(checked, changed, "train") == (
        "stage.iterations=3 stands beside the block `module` of stage, where hyper-parameters are: "
        "write {module: {iterations: 3}} in a yaml, or stage.iterations=3 on the command line."
    )


@pytest.mark.parametrize(
    ("stage", "option"), [("ppo", "law"), ("ppo", "credit_blocks"), ("lfd", "loss")]
)
def test_settings_of_before_an_option_was_there_are_one_sentence(stage: str, option: str) -> None:
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
def test_the_settings_of_a_run_of_before_there_were_blocks_are_todays(stage: str) -> None:
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
