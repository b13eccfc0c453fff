"""What options may hold: every number has bounds, a prompt a place for the question."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf
from tests.commands.configs import config, refused, sentence_of
from tests.configs import composed

from tprl.build import build, choices, conf_dir
from tprl.commands.annotated import annotations_of, kind_of
from tprl.commands.option_kinds import KINDS, SET_BY
from tprl.commands.options import _kind, _options, checked
from tprl.commands.stages import RUNNER, in_full
from tprl.errors import UserError
from tprl.kinds import Number, typed

NAN, INF = float("nan"), float("inf")
SIGNED = ("floor", "weight", "agreement", "devices")  # may be below 0
MAY_BE_NULL = ("credit_blocks", "limit", "save_every", "port", "tau", "theta", "gradient_clip_val")


def numbers(entry: str, *words: str) -> Iterator[tuple[str, Callable[[str, Any], Any], Any]]:
    """Options that hold a number, with what checks them and what they hold."""
    plain = OmegaConf.to_container(composed(entry, *words), resolve=True)
    assert isinstance(plain, dict)
    for key, place, value, annotation in _options(plain, entry):
        if isinstance(value, int | float) and not isinstance(value, bool) and "[" not in key:
            yield key, _kind(key, place, annotation), value


def is_of_its_stage(key: str, command: tuple[str, ...]) -> bool:
    """Whether an option is of the stage alone: all others are the same for every stage, and
    checked with PPO."""
    return command[0] != "train" or command[1] == "stage=ppo" or key.startswith("stage.")


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
# The chain has the options of its stages, once more each.
WITHOUT_CHAIN = [
    pytest.param(command, marks=pytest.mark.slow) if "stage=all" in command else command
    for command in COMMANDS
]


class TestEveryOption:
    @pytest.mark.parametrize(
        "command", [*COMMANDS, ("train", "experiment=paper"), ("train", "debug=fast")]
    )
    def test_what_the_yamls_hold_passes_unchanged(self, command: tuple[str, ...]) -> None:
        before = composed(*command)
        assert checked(copy.deepcopy(before), command[0]) == before

    @pytest.mark.parametrize("command", WITHOUT_CHAIN)
    def test_numbers_refuse_values_of_other_types(self, command: tuple[str, ...]) -> None:
        options = [line for line in numbers(*command) if is_of_its_stage(line[0], command)]
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
    texts = [
        "a number",
        "a number in (0, 1]",
        "a number in [0, 1)",
        "a whole number from 1 to 9",
        "a number above 0",
    ]
    assert [kind.in_words() for kind in kinds] == texts


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
