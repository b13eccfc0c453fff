"""Published settings of real checkpoints, where the folder with them is at hand."""

from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[2]
PLACES = [HOME / up / "shared" / "real_configs" for up in ("..", "../..")]
REAL = next((place for place in PLACES if place.is_dir()), PLACES[0])
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published settings are not here")
