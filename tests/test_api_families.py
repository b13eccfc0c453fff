"""`tprl.prune` on the stock models of every family: what is generated, and what was kept."""

from typing import Any

import pytest
import torch
from tests.helpers import untrained_policy
from tests.lvlm.test_families import FAMILIES, SAMPLES

import tprl
from tprl.bench.parity import defined, stock_inputs
from tprl.budget import budget
from tprl.build import load_component
from tprl.lvlm.batching import axes
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.random import RandomPruner
from tprl.splice import splice
from tprl.types import Prompt, Sample

TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))
MIXED = [SAMPLES[0], TWO, SAMPLES[3]._replace(images=()), SAMPLES[4]]
NEW = 6


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest) -> FrozenLVLM:
    return load_component(
        "model", request.param, pretrained=None, dtype="float32", max_new_tokens=NEW
    )


def pruned_prompt(lvlm: FrozenLVLM, samples: list[Sample], pruner: Any, ratio: float) -> Prompt:
    encoded = lvlm.encode(samples, pruner.extras)
    return splice(encoded, pruner.select(encoded, ratio))


class TestEveryFamily:
    def test_keeping_everything_changes_nothing(self, lvlm: FrozenLVLM) -> None:
        batch = stock_inputs(lvlm, MIXED)
        expected = lvlm.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        with tprl.prune(lvlm.model, "random", keep_ratio=1.0):
            result = lvlm.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(result, expected)

    def test_pruned_generation_is_that_of_the_definition(self, lvlm: FrozenLVLM) -> None:
        """Dropped tokens are masked out of attention, at every step, or the stock class reads a
        shorter prompt."""
        policy, batch = untrained_policy(lvlm.width), stock_inputs(lvlm, MIXED)
        with tprl.prune(lvlm.model, policy, keep_ratio=0.3, processor=lvlm.processor):
            result = lvlm.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(result[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        ids, encoded = result[:, batch["input_ids"].shape[1] :], lvlm.encode(MIXED)
        expected = defined(lvlm, MIXED, policy.select(encoded, 0.3), ids).argmax(-1)
        ends = torch.isin(ids, torch.tensor(lvlm.ends)).cumsum(1)
        real = ends - torch.isin(ids, torch.tensor(lvlm.ends)).long() == 0
        assert torch.equal(ids[real], expected[real])

    def test_a_prompt_alone_answers_and_keeps_as_in_a_batch(self, lvlm: FrozenLVLM) -> None:
        with tprl.prune(lvlm.model, RandomPruner(), keep_ratio=0.4) as pruning:
            batch = stock_inputs(lvlm, MIXED)
            together = lvlm.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
            kept = pruning.kept
            for row, sample in enumerate(MIXED):
                item = stock_inputs(lvlm, [sample])
                alone = lvlm.model.generate(**item, max_new_tokens=NEW, do_sample=False)
                new = alone[0, item["input_ids"].shape[1] :].tolist()
                padded = together[row, batch["input_ids"].shape[1] :].tolist()
                assert new == padded[: len(new)]
                assert len(pruning.kept[0]) == len(sample.images)
                for kept_alone, other in zip(pruning.kept[0], kept[row], strict=True):
                    assert torch.equal(kept_alone.indices, other.indices)

    def test_what_was_kept_is_the_budget_of_each_image(self, lvlm: FrozenLVLM) -> None:
        encoded = lvlm.encode(MIXED)
        with tprl.prune(lvlm.model, "random", keep_ratio=0.3) as pruning:
            assert pruning.kept == []
            lvlm.model.generate(**stock_inputs(lvlm, MIXED), max_new_tokens=1)
        for sample, images in zip(MIXED, pruning.kept, strict=True):
            assert len(images) == len(sample.images)
        for row, images in enumerate(pruning.kept):
            assert [item.grid for item in images] == list(encoded.grids[row])
            assert [len(item.indices) for item in images] == [
                budget(0.3, item.total) for item in images
            ]

    def test_beams_and_several_sequences(self, lvlm: FrozenLVLM) -> None:
        policy, batch = untrained_policy(lvlm.width), stock_inputs(lvlm, [TWO, SAMPLES[4]])
        options: dict[str, Any] = {
            "num_beams": 3,
            "num_return_sequences": 2,
            "max_new_tokens": NEW,
            "do_sample": False,
        }
        with tprl.prune(lvlm.model, policy, keep_ratio=0.3, processor=lvlm.processor):
            result = lvlm.model.generate(**batch, **options)
        prompt = pruned_prompt(lvlm, [TWO, SAMPLES[4]], policy, 0.3)
        with lvlm.deepstack(prompt.deep, prompt.visual):
            expected = lvlm.model.generate(
                inputs_embeds=prompt.embeds,
                attention_mask=prompt.attention.long(),
                position_ids=axes(prompt.positions),
                **lvlm.inputs_beside(prompt.input_ids, prompt.visual),
                **options,
            )
        assert torch.equal(result[:, batch["input_ids"].shape[1] :], expected)
        assert len(result) == 4

    def test_a_conversation_of_two_turns_asks_the_last_question(self, lvlm: FrozenLVLM) -> None:
        turns = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "what is the color?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "red."}]},
            {"role": "user", "content": [{"type": "text", "text": "is it large?"}]},
        ]
        text = lvlm.tokenizer.apply_chat_template(
            turns,
            chat_template=lvlm.processor.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        image = SAMPLES[0].images[0]
        batch = dict(lvlm.processor(text=[text], images=[[image]], return_tensors="pt"))
        policy = untrained_policy(lvlm.width)
        with tprl.prune(lvlm.model, policy, keep_ratio=0.3, processor=lvlm.processor) as pruning:
            question = pruning._question
            assert question is not None
            result = question(batch["input_ids"], batch["attention_mask"].bool())
            assert lvlm.tokenizer.decode(batch["input_ids"][result]) == "is it large?"
            out = lvlm.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
