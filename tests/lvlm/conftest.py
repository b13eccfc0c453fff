from pathlib import Path

import pytest
from tests.lvlm.small import SAMPLES, write_small

from tprl.lvlm.llava import Llava
from tprl.types import Encoded


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("backend") / "llava"
    write_small(where)
    return where


@pytest.fixture(scope="module")
def lvlm(folder: Path) -> Llava:
    return Llava(str(folder), name="toy", max_new_tokens=6)


@pytest.fixture(scope="module")
def encoded(lvlm: Llava) -> Encoded:
    return lvlm.encode(SAMPLES)
