"""A cache that goes from turn to turn: the same logits as without it, or one sentence."""

from typing import Any

import pytest
import torch
from tests.helpers import untrained_policy
from transformers import DynamicCache

import tprl
from tprl.budget import core_budget
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.evaluation.evaluator import Entry
from tprl.evaluation.turns import arms_of, converse
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.core_focus import CoreFocus
from tprl.pruners.divprune import DivPrunePruner
from tprl.scoring.scorer import Scorer

HOW: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
ATOL = 1e-5
FAMILIES = ["attribute", "existence", "count", "relation"]  # nothing is generated


@pytest.fixture(scope="module")
def llava() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32")


def turn(lvlm: FrozenLVLM, samples: list[Any], answered: list[list[str]]) -> dict[str, Any]:
    """Batched conversations: sample b's image and question, and `answered[b]` as (question, answer)
    pairs before it."""
    texts = []
    for sample, before in zip(samples, answered, strict=True):
        words = [*before, sample.question]
        talk = []
        for number, text in enumerate(words):
            parts = [{"type": "text", "text": text}]
            if number == 0:
                parts = [{"type": "image"}, *parts]
            talk.append({"role": ("user", "assistant")[number % 2], "content": parts})
        texts.append(
            lvlm.tokenizer.apply_chat_template(
                talk,
                chat_template=lvlm.processor.chat_template,
                add_generation_prompt=True,
                tokenize=False,
            )
        )
    images = [[sample.images[0]] for sample in samples]
    return dict(lvlm.processor(text=texts, images=images, padding=True, return_tensors="pt"))


def two_turns(lvlm: FrozenLVLM, pruner: Any, rows: tuple[int, ...] = (0,)) -> Any:
    """Logits of a second turn with and without the cache of the first, and the handle."""
    data = Scenes("val")
    samples = [data[5 * row] for row in rows]
    first = turn(lvlm, samples, [[] for _ in rows])
    later = [data[5 * row + 1 + row % 2] for row in rows]
    with tprl.prune(
        lvlm.model, pruner, keep_ratio=0.3, processor=lvlm.processor, reuse_images=True
    ) as pruning:
        out = lvlm.model.generate(**first, **HOW)
        new = out.sequences[:, first["input_ids"].shape[1] :]
        said = lvlm.tokenizer.batch_decode(new, skip_special_tokens=True)
        pairs = zip(samples, said, strict=True)
        second = turn(lvlm, later, [[sample.question, text] for sample, text in pairs])
        expected = lvlm.model.generate(**second, **HOW)
        assert pruning.carried is None
        length = out.past_key_values.get_seq_length()
        found = lvlm.model.generate(**second, **HOW, past_key_values=out.past_key_values)
        assert out.past_key_values.get_seq_length() == length  # as it was
    assert torch.equal(found.sequences, expected.sequences)
    worst = max(
        float((one - two).abs().max())
        for one, two in zip(found.logits, expected.logits, strict=True)
    )
    return worst, pruning, second


class TestExact:
    @pytest.mark.parametrize(
        "family",
        ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_5_vl", "qwen3_vl"))],
    )
    def test_a_blind_pruner_reads_the_new_words_alone(self, family: str) -> None:
        lvlm: FrozenLVLM = load_component("model", family, pretrained=None, dtype="float32")
        worst, pruning, second = two_turns(lvlm, "divprune")
        assert worst <= ATOL
        kept = len(pruning.kept[0][0].indices)
        assert pruning.carried.visual == [kept]
        # Of the text, all up to the answer of the first turn is there, too.
        words = int((second["input_ids"] != lvlm.image_token).sum())
        assert words / 2 < pruning.carried.tokens[0] - kept < words

    def test_core_and_focus_reads_the_focus_and_what_follows(self, llava: FrozenLVLM) -> None:
        policy = untrained_policy(llava.width)
        with torch.no_grad():  # a policy that hears: the question moves every logit
            policy.net.policy_head.out.weight.mul_(20)
        pruner = CoreFocus(DivPrunePruner(), policy, 0.5)
        worst, pruning, _ = two_turns(llava, pruner, (0, 1, 2))
        assert worst <= ATOL
        # All of the first prompt's core, and of prompts with more padding a part of theirs.
        kept = len(pruning.kept[0][0].indices)
        assert pruning.carried.visual[0] == core_budget(0.5, kept) < kept
        assert min(pruning.carried.visual) > 0

    @pytest.mark.parametrize("core_first", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_what_is_carried_is_what_an_evaluation_counts(
        self, llava: FrozenLVLM, core_first: bool
    ) -> None:
        """The tokens of `turns.csv` that are cached, and the runs of the tower, are those of the
        code that serves."""
        dataset, lvlm = Scenes("val", limit=4, families=FAMILIES), llava
        pruner = load_component("pruner", "core_focus", core_first=core_first)
        scorer = Scorer(lvlm, dataset, frozenset({"score"}))
        arms = arms_of([Entry("shared", pruner, (1 / 3,))])
        turns, towers = converse(scorer, dataset, arms, (4,), ("read",))
        (answered,) = turns.values()
        samples = {sample.uid: sample for sample in (dataset[i] for i in range(4))}
        cached, cache = [], None
        with tprl.prune(
            lvlm.model, pruner, keep_ratio=1 / 3, processor=lvlm.processor, reuse_images=True
        ) as pruning:
            for one in answered:
                # Questions by themselves, as the evaluation asks them.
                inputs = turn(lvlm, [samples[one.uid]], [[]])
                more = {} if cache is None else {"past_key_values": cache}
                try:
                    out = lvlm.model.generate(**inputs, **HOW, **more)
                    count = 0 if pruning.carried is None else pruning.carried.visual[0]
                except UserError:  # nothing is shared, which counts 0
                    out, count = lvlm.model.generate(**inputs, **HOW), 0
                cache = out.past_key_values
                cached.append(count)
        assert cached == [one.cached for one in answered]
        assert pruning.look is not None
        assert pruning.look.runs == towers == 1
        if core_first:
            assert min(cached[1:]) >= core_budget(0.5, 12)


class TestRefusals:
    def call(
        self,
        lvlm: FrozenLVLM,
        pruner: Any,
        past: Any,
        number: int = 1,
        keep_ratio: float = 0.7,
        **how: Any,
    ) -> None:
        """A turn about image 0, then question `number` with `past`, or with the cache of the first
        turn where it is None."""
        data = Scenes("val")
        with tprl.prune(
            lvlm.model, pruner, keep_ratio=keep_ratio, processor=lvlm.processor, reuse_images=True
        ):
            out = lvlm.model.generate(**turn(lvlm, [data[0]], [[]]), **HOW | how)
            cache = out.past_key_values if past is None else past
            second = turn(lvlm, [data[number]], [[]])
            lvlm.model.generate(**second, **HOW, past_key_values=cache)

    def test_other_images(self, llava: FrozenLVLM) -> None:
        with pytest.raises(UserError, match="of other images than those of this turn"):
            self.call(llava, "divprune", None, number=5)

    def test_other_tokens_from_the_first_on(self, llava: FrozenLVLM) -> None:
        # Draws another set for every prompt; of these two the first tokens differ.
        with pytest.raises(UserError, match="keeps other visual tokens than the turn before"):
            self.call(llava, "random", None, keep_ratio=0.1)

    def test_caches_of_something_else(self, llava: FrozenLVLM) -> None:
        with pytest.raises(UserError, match="it was not returned by this pruned model"):
            self.call(llava, "divprune", DynamicCache())
        with pytest.raises(UserError, match="it is of several sequences per prompt"):
            self.call(llava, "divprune", None, num_beams=2, num_return_sequences=2)
        with pytest.raises(UserError, match="fastv drops tokens between layers"):
            self.call(llava, "fastv", None)

    def test_another_number_of_prompts(self, llava: FrozenLVLM) -> None:
        data = Scenes("val")
        with tprl.prune(llava.model, "divprune", keep_ratio=0.3, reuse_images=True):
            out = llava.model.generate(**turn(llava, [data[0], data[1]], [[], []]), **HOW)
            with pytest.raises(UserError, match="past_key_values of 2 prompts for 1: give the"):
                llava.model.generate(
                    **turn(llava, [data[1]], [[]]), **HOW, past_key_values=out.past_key_values
                )

    @pytest.mark.parametrize(
        ("family", "why"),
        [("gemma3", "do not attend to all"), ("qwen3_5", "do not attend to all")],
    )
    @pytest.mark.slow
    def test_families_whose_cache_cannot_be_cut(self, family: str, why: str) -> None:
        lvlm = load_component("model", family, pretrained=None, dtype="float32")
        with pytest.raises(UserError, match=why):
            self.call(lvlm, "divprune", None)
