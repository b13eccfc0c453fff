"""The adapter that the language model of a chain reads with, between the stages that train it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tprl.lvlm.adapters import Adapter, add_adapter, read_adapter


class Worn:
    """An LVLM, and the adapter that works in it by hooks: its weights stay those before, on which
    every later adapter is trained too.

    Args:
        lvlm: the model.
    """

    def __init__(self, lvlm: Any) -> None:
        self.lvlm = lvlm
        self.folder: Path | None = None
        self._remove: Callable[[], None] | None = None

    def put_on(self, folder: Path) -> None:
        """Read with the adapter of a folder, in place of any before.

        Raises:
            UserError: there is none, or it is another model's.
        """
        self.take_off()
        self._remove = add_adapter(self.lvlm.model, folder)
        self.folder = folder

    def take_off(self) -> None:
        """Give the model back; the folder is remembered."""
        if self._remove is not None:
            self._remove()
            self._remove = None

    @property
    def adapter(self) -> Adapter | None:
        """What was put on last."""
        return None if self.folder is None else read_adapter(self.folder)

    def place(self, directory: Path) -> str:
        """The folder as a run notes it: within its own directory by the way from there, since runs
        are moved."""
        assert self.folder is not None
        inside = self.folder.is_relative_to(directory)
        return str(self.folder.relative_to(directory) if inside else self.folder)
