"""Visual tokens of many images, on disk: written once image by image, then read as one tensor of
which only what is used is in memory."""

import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tprl.errors import UserError

PIECE = 1 << 14  # rows that are copied at once


class TokenFile:
    """Rows of one width in a temporary file, float16 as long as all fit into it, else float32.

    Args:
        width: numbers in a row.
    """

    def __init__(self, width: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="tprl-", ignore_cleanup_errors=True)
        self.width, self.rows, self.dtype = width, 0, torch.float16
        self.path = Path(self.folder.name) / "tokens"
        self.path.touch()

    def add(self, tokens: Float[Tensor, "N D"]) -> None:
        """Append rows, in float16 or float32.

        Raises:
            UserError: the disk is full.
        """
        if tokens.dtype != self.dtype and tokens.dtype == torch.float32:
            self._widen()
        self._write(self.path, tokens.to(self.dtype))
        self.rows += len(tokens)

    def mapped(self) -> Float[Tensor, "M D"]:
        """All rows. Pages come from the file when they are read, and go when memory is short."""
        flat = torch.from_file(str(self.path), False, self.rows * self.width, dtype=self.dtype)
        return flat.view(self.rows, self.width)

    def _widen(self) -> None:
        """From here on all rows are float32, those before as well."""
        before, wide = self.mapped() if self.rows else None, self.path.with_name("wide")
        wide.touch()
        for piece in () if before is None else before.split(PIECE):
            self._write(wide, piece.float())
        self.path.unlink()
        self.path, self.dtype = wide, torch.float32

    def _write(self, path: Path, rows: Float[Tensor, "N D"]) -> None:
        try:
            with path.open("ab") as file:
                file.write(rows.contiguous().numpy().tobytes())
        except OSError as error:
            raise UserError(
                f"visual tokens of stage=autoencoder cannot be written to {path.parent} "
                f"({error.strerror}): set TMPDIR to a folder with room, or lower stage.images."
            ) from error
