"""Sizes at which selectors are compared with loops that are written out."""

import pytest

# (side of the grid, tokens that stay): of the embedded models, and of LLaVA-1.5. The loops are slow
# at its larger budgets, where nothing else happens than at the smallest.
GRIDS = [
    (12, 48),
    (12, 32),
    (12, 16),
    (24, 64),
    pytest.param(24, 128, marks=pytest.mark.slow),
    pytest.param(24, 192, marks=pytest.mark.slow),
]
