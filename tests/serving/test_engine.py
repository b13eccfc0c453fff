"""An engine that reads in place of the model: what it is asked, what is made of its answers, and
who is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.serving.test_reading import COUNT, IMAGE, prompt

from tprl.errors import UserError
from tprl.runtime import distributed
from tprl.serving import engine
from tprl.serving.engine import EngineReading

WORDS = {"yes": [4, 5], "no": [6]}


class Engine(EngineReading):
    """Writes down its requests; every token of a prompt is as likely as its place says."""

    def __init__(self) -> None:
        tokenizer = SimpleNamespace(batch_decode=lambda ids, **how: [str(row) for row in ids])
        self.count, self.requests = COUNT, list[Any]()
        self.lvlm: Any = SimpleNamespace(
            device=torch.device("cpu"),
            answer_row=WORDS.__getitem__,
            ends=[2],
            max_new_tokens=3,
            tokenizer=tokenizer,
        )

    def _read(self, requests: Any, **how: Any) -> list[Any]:
        self.requests += requests
        outputs = []
        for request in requests:
            ids = request["prompt_token_ids"]
            places = [
                {token: SimpleNamespace(logprob=-float(place), rank=1 + (token == 5))}
                for place, token in enumerate(ids)
            ]
            writing = SimpleNamespace(token_ids=[how["max_tokens"], *how.get("stop_token_ids", [])])
            outputs.append(SimpleNamespace(prompt_logprobs=places, outputs=[writing]))
        return outputs


def test_an_answer_follows_its_prompt_and_is_scored_token_by_token() -> None:
    reader = Engine()
    log_prob, exact = reader.score(prompt(), ["yes"])
    (request,) = reader.requests
    assert request["prompt_token_ids"] == [1, IMAGE, 2, IMAGE, 3, 4, 5]
    assert [len(image) for image in request["multi_modal_data"]["image"]] == [2, 3]
    assert log_prob.tolist() == [-5.5]  # places 5 and 6
    assert exact.tolist() == [False]  # 5 is not the likeliest token of its place
    assert reader.score(prompt(), ["no"])[1].tolist() == [True]


def test_greedy_answers_end_where_the_checkpoint_says() -> None:
    reader = Engine()
    assert reader.answer(prompt()) == ["[3, 2]"]
    assert reader.requests[0]["prompt_token_ids"] == [1, IMAGE, 2, IMAGE, 3]


def test_without_an_engine_in_this_environment() -> None:
    with pytest.raises(UserError, match="vLLM is not installed here: `make test-vllm`"):
        EngineReading(Engine().lvlm)


def test_who_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "check_vllm", lambda: None)
    lvlm: Any = SimpleNamespace(model_type="qwen3_vl", name="qwen3_vl")
    with pytest.raises(UserError, match=r"LLaVA-1\.5 alone, and model=qwen3_vl is another family"):
        EngineReading(lvlm)
    lvlm.model_type = "llava"
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(UserError, match=r"one process, and this run has 2: use trainer\.devices=1"):
        EngineReading(lvlm)
