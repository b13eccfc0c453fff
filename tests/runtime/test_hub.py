"""Pruners on the hub: what is asked of it and what is sent, with the hub itself replaced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import toy_encoded

import tprl
from tprl.errors import UserError
from tprl.pruners.folder import CALIBRATIONS, CARD, CONFIG, WEIGHTS
from tprl.pruners.tprl import TPRL
from tprl.runtime import hub
from tprl.runtime.files import SUMS

ABOUT = {
    "model": "qwen2_5_vl",
    "family": "qwen2_5_vl",
    "pretrained": "Qwen/Qwen2.5-VL-3B-Instruct",
    "dataset": "scenes",
    "stages": ["lfd", "ppo"],
    "seed": 3,
    "results": [
        {
            "dataset": "scenes", "questions": 500, "pruner": "tprl", "keep_ratio": 1 / 9,
            "kept_tokens": 16.0, "accuracy": 0.9604, "low": 0.9512, "high": 0.97,
            "flops_ratio": 0.4321,
        }
    ],
}  # fmt: skip


def policy(**about: Any) -> TPRL:
    torch.manual_seed(0)
    return TPRL(16, code_width=8, hidden=16, width=16, layers=1, heads=2, trained_on=about).eval()


class FakeApi:
    """Keeps what is uploaded."""

    instance: dict[str, Any]

    def __init__(self, token: str | None = None) -> None:
        type(self).made = {"token": token}

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
        self.made |= {"repo": repo, "private": private}
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        files = (path for path in folder_path.rglob("*") if path.is_file())
        self.made["files"] = {
            str(path.relative_to(folder_path)): path.read_bytes() for path in files
        }


class TestPush:
    def test_weights_config_and_card_arrive_and_load_again(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(hub, "HfApi", FakeApi)
        monkeypatch.setattr(hub, "_hub_answers", lambda: True)
        instance = policy(**ABOUT)
        assert (
            instance.push_to_hub("me/pruner", private=True, token="t")
            == "https://huggingface.co/me/pruner"
        )
        assert FakeApi.made["private"]
        sums = {f"{SUMS}/{name}.sha256" for name in (WEIGHTS, CONFIG)}
        assert set(FakeApi.made["files"]) == {WEIGHTS, CONFIG, CARD, *sums}
        (tmp_path / SUMS).mkdir()
        for name, data in FakeApi.made["files"].items():
            (tmp_path / name).write_bytes(data)
        asked: dict[str, Any] = {}

        def snapshot(repo: str, **options: Any) -> str:
            asked.update(options, repo=repo)
            return str(tmp_path)

        monkeypatch.setattr(hub, "snapshot_download", snapshot)
        result = tprl.Pruner.from_pretrained("me/pruner", revision="v2")
        assert asked == {
            "repo": "me/pruner",
            "revision": "v2",
            "allow_patterns": [WEIGHTS, CONFIG, CARD, *CALIBRATIONS, f"{SUMS}/*"],
        }
        assert torch.equal(
            result.select(toy_encoded(), 0.2).keep, instance.select(toy_encoded(), 0.2).keep
        )
        assert result.trained_on == ABOUT

    def test_an_unreachable_hub_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub, "_hub_answers", lambda: False)
        with pytest.raises(
            UserError, match="the hub does not answer, so me/pruner cannot be written"
        ):
            policy().push_to_hub("me/pruner")
        with pytest.raises(
            UserError,
            match="me/pruner is neither a folder nor within reach on the hub",
        ):
            tprl.Pruner.from_pretrained("me/pruner")


class TestCard:
    def test_says_what_it_prunes_what_it_scored_and_its_licence(self, tmp_path: Path) -> None:
        policy(**ABOUT).save_pretrained(tmp_path / "mine")
        card = (tmp_path / "mine" / CARD).read_text()
        assert card.startswith(
            "---\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct\nlibrary_name: "
            "tprl\nlicense: apache-2.0\n"
        )
        assert "family qwen2_5_vl" in card
        assert "by the stages lfd, ppo; seed 3" in card
        assert "| tprl | 0.111 | 16.0 | 96.0 [95.1, 97.0] | 43.2 |" in card
        assert f'from_pretrained("{tmp_path / "mine"}")' in card

    def test_of_a_pruner_that_nobody_evaluated(self, tmp_path: Path) -> None:
        policy().save_pretrained(tmp_path)
        assert "Not evaluated." in (tmp_path / CARD).read_text()


def test_the_public_names_are_those_of_the_modules() -> None:
    from tprl.pruners.learned import LearnedPruner

    assert tprl.Pruner is LearnedPruner
    assert all(getattr(tprl, name) is not None for name in tprl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Prunner'"):
        tprl.Prunner  # noqa: B018
