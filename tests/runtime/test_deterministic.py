"""`deterministic=true`: what is set, what is refused, and the sum that stands in."""

from collections.abc import Iterator

import pytest
import torch
from tests.devices import Machine

from tprl.errors import UserError
from tprl.runtime.deterministic import SIZES, WORKSPACE, doubled_sum, running_sum, use_deterministic


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    yield
    torch.use_deterministic_algorithms(False)


def test_kernels_and_workspace_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    use_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ
    use_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ[WORKSPACE] == SIZES[0]
    monkeypatch.setenv(WORKSPACE, ":16:8")
    use_deterministic(True)
    assert os.environ[WORKSPACE] == ":16:8"


def test_another_workspace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match=r"needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8"):
        use_deterministic(True)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("shape", "axis"), [((3, 5, 7), 1), ((2, 64), -1), ((4, 1), 1)])
def test_doublings_are_a_running_sum(shape: tuple[int, ...], axis: int) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(doubled_sum(x, axis), x.cumsum(axis))
    with Machine():
        on_gpu = x.to("cuda")
        assert torch.equal(running_sum(on_gpu, axis).cpu(), x.cumsum(axis))
        use_deterministic(True)
        assert torch.equal(running_sum(on_gpu, axis).cpu(), doubled_sum(x, axis))
        assert torch.equal(running_sum(x, axis), x.cumsum(axis))
