"""Packages that do not fit each other, named before they break something else."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from tprl.errors import UserError


def check_torchvision() -> None:
    """Refuse a torchvision that was built for another torch: transformers and Lightning import it
    wherever it is installed, and say afterwards that some class of theirs cannot be imported.

    Raises:
        UserError: it cannot be imported.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"torchvision {_version('torchvision')} does not fit torch "
            f"{_version('torch')} ({reason}): install the build for this torch from the "
            "same index, or remove it (pip uninstall torchvision), TPRL works without."
        ) from error


def need_package(package: str, extra: str, option: str) -> None:
    """Refuse an option without the package of an extra.

    Raises:
        UserError: it is not installed.
    """
    if find_spec(package) is None:
        raise UserError(f"{option} needs the package {package}: pip install 'tprl[{extra}]'.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown version)"
