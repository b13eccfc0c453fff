"""Which entries a table gets on a given LVLM, and what a question costs."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.test_screens import rendered, row
from tests.helpers import toy_encoded
from tests.lvlm.small import each_family

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.data.screens import Screens
from tprl.errors import UserError
from tprl.evaluation.evaluator import (
    Entry,
    check_cost,
    check_entries,
    evaluate,
    feasible,
    fitting,
    summarize,
)
from tprl.lvlm.llava import Llava
from tprl.runtime.store import Record
from tprl.scoring.scorer import Scorer
from tprl.types import Sample, TokenSelection

RATIOS = (0.5, 0.3333, 0.1111)


def entry(name: str) -> Entry:
    return Entry(name, load_component("pruner", name), RATIOS)


def test_infeasible_ratios_are_left_out_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lvlm = Llava("tiny_llava")
    with caplog.at_level(logging.INFO):
        result = feasible([entry("fastv"), entry("divprune")], lvlm)
    assert [(item.name, item.keep_ratios) for item in result] == [
        ("fastv", RATIOS[:2]),
        ("divprune", RATIOS),
    ]
    messages = [record.message for record in caplog.records if "left out" in record.message]
    assert messages == [
        (
            "left out: fastv runs 1 of 5 layers on all tokens, so their mean "
            "over layers stays above 0.2: keep_ratio=0.111 is infeasible."
        )
    ]


def test_methods_inside_the_model_need_a_model_with_layers() -> None:
    with pytest.raises(
        UserError, match="fastv drops tokens between layers, and toy has none: leave it out"
    ):
        feasible([entry("fastv")], load_component("model", "toy"))


def test_pruners_that_cannot_be_had_are_refused_before_anything_is_answered() -> None:
    lvlm = Llava("tiny_llava")
    check_entries(
        [entry(name) for name in ("fastv", "tome", "oracle", "divprune", "cdpruner", "tprl")], lvlm
    )
    with pytest.raises(
        UserError,
        match="fastv cannot be evaluated on llava: fastv runs 1 of 5 layers on all tokens",
    ):
        check_entries([Entry("fastv", load_component("pruner", "fastv"), (0.1,))], lvlm)
    small = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
    for name, sentence in (
        ("tome", "qwen2_5_vl makes its tokens of patches on a grid"),
        ("tprl", "was trained for a llava"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_entries([entry(name)], small)


def test_default_lists_lose_pruners_that_do_not_fit_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = ("random", "attention_words", "cls_attention", "fastv")
    with caplog.at_level("INFO"):
        fit = fitting([entry(name) for name in names], load_component("model", "toy"))
    assert [fitted.name for fitted in fit] == ["random", "cls_attention"]
    assert "attention_words is left out: toy cannot provide ['word_attention']" in caplog.text
    assert "fastv is left out: " in caplog.text


def test_a_substitute_is_named_in_the_result(caplog: pytest.LogCaptureFixture) -> None:
    lvlm = load_component("model", "smolvlm2", pretrained=None, dtype="float32")
    with caplog.at_level(logging.INFO):
        result = feasible([entry("cls_attention"), entry("divprune")], lvlm)
    assert [item.name for item in result] == ["cls_attention*", "divprune"]
    assert any(
        "smolvlm2 has no cls_attention of its own; in its place: " in r.message
        for r in caplog.records
    )
    assert [item.name for item in feasible([entry("cls_attention")], Llava("tiny_llava"))] == [
        "cls_attention"
    ]


def test_a_method_inside_the_model_is_counted_layer_by_layer() -> None:
    lvlm, data = Llava("tiny_llava"), Scenes("test")
    entries = [
        Entry("keep_all", load_component("pruner", "keep_all"), (1.0,)),
        entry("fastv"),
        entry("random"),
    ]
    answered = evaluate(Scorer(lvlm, data), data, entries, limit=10)
    rows = {
        (row.pruner, row.keep_ratio): row
        for row in summarize(answered, "m", data)
        if row.metric == "accuracy"
    }
    for ratio in RATIOS[:2]:
        fastv, random = rows["fastv", ratio], rows["random", ratio]
        assert fastv.kept_tokens == pytest.approx(random.kept_tokens, abs=0.5)
        # The same mean, but attention is quadratic: uneven layers cost more, and FastV reads a row
        # of attention.
        assert random.flops < fastv.flops < rows["keep_all", 1.0].flops


@pytest.mark.parametrize("name", each_family())
def test_every_family_is_evaluated(name: str) -> None:
    lvlm, data = (
        load_component("model", name, pretrained=None, dtype="float32", max_new_tokens=2),
        Scenes("test"),
    )
    check_cost(lvlm)
    entries = [
        Entry("keep_all", load_component("pruner", "keep_all"), (1.0,)),
        entry("random"),
        entry("divprune"),
    ]
    rows = summarize(evaluate(Scorer(lvlm, data), data, entries, limit=6), name, data)
    result = {(row.pruner, row.keep_ratio): row for row in rows if row.metric == "accuracy"}
    assert result["keep_all", 1.0].flops_ratio == 1
    ratios = [result["random", ratio].flops_ratio for ratio in (1 / 2, 0.3333, 0.1111)]
    assert 1 > ratios[0] >= ratios[1] >= ratios[2] > 0
    assert all(result["divprune", ratio].flops > result["random", ratio].flops for ratio in RATIOS)


def test_a_benchmark_that_is_partly_teacher_forced_has_its_own_numbers(tmp_path: Path) -> None:
    words = [("count", "yes"), ("state", "no"), ("icon", "")]
    rows = [row(number, family, answer) for number, (family, answer) in enumerate(words)]
    data = Screens("train", source=rendered(tmp_path, rows), bare=True)
    scorer = Scorer(Llava("tiny_llava"), data)
    answered = evaluate(
        scorer, data, [Entry("keep_all", load_component("pruner", "keep_all"), (1.0,))]
    )
    assert [item.row.prediction is None for item in answered] == [True, True, False]
    values = {row.metric: row.value for row in summarize(answered, "m", data)}
    assert values["screens/accuracy"] == pytest.approx(100 * values["accuracy"])
    assert values["screens/accuracy/count"] == pytest.approx(100 * values["accuracy/count"])


def test_an_lvlm_without_a_cost_model_is_refused() -> None:
    class Bare:
        name = "bare"

    with pytest.raises(
        UserError,
        match=r"bare has no cost model \(tprl.cost\), so it can be trained on but not evalu",
    ):
        check_cost(Bare())


def test_kept_tokens_are_counted_image_by_image() -> None:
    """Extra tokens belong to the image whose place they stand at."""
    encoded = toy_encoded()  # 144 and 54 tokens; 16 and 35 of two images
    keep = torch.zeros_like(encoded.visual_mask)
    keep[0, :3], keep[1, 50:54], keep[2, 10:20] = True, True, True
    extra = torch.zeros(3, 2, 16)
    at, real = (
        torch.tensor([[0, 1], [0, 0], [15, 16]]),
        torch.tensor([[True, True], [False, False], [True, True]]),
    )
    selection = TokenSelection(keep, extra=extra, extra_at=at, extra_mask=real)
    assert TokenSelection(keep).per_image(encoded) == [[3], [4], [6, 4]]
    assert selection.per_image(encoded) == [[5], [4], [7, 5]]
    assert [sum(images) for images in selection.per_image(encoded)] == selection.count.tolist()
    nothing = toy_encoded(((), ()))
    assert TokenSelection(nothing.visual_mask).per_image(nothing) == [[], []]


def test_two_questions_of_one_uid_are_refused() -> None:
    class Twice(Scenes):
        def __getitem__(self, index: int) -> Sample:
            return super().__getitem__(index)._replace(uid=f"scenes/{index // 2}")

    lvlm = Llava("tiny_llava")
    with pytest.raises(
        UserError, match="scenes has two questions of uid scenes/0: give every row an id of its own"
    ):
        evaluate(Scorer(lvlm, Twice("test")), Twice("test"), [entry("random")], limit=4)


def test_what_a_killed_evaluation_has_answered_is_not_answered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lvlm, data, path = Llava("tiny_llava"), Scenes("test"), tmp_path / "answers.jsonl"
    scorer, entries, encoded = Scorer(lvlm, data), [entry("random"), entry("fastv")], list[Any]()
    whole = evaluate(scorer, data, entries, batch_size=4, limit=10)

    def killed(done: int, total: int) -> None:
        if done == 8:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(scorer, data, entries, 4, 10, killed, Record(path))
    encode = lvlm.encode
    monkeypatch.setattr(
        lvlm, "encode", lambda samples, extras: encoded.append(samples) or encode(samples, extras)
    )
    assert evaluate(scorer, data, entries, 4, 10, record=Record(path)) == whole
    assert [len(samples) for samples in encoded] == [2]
