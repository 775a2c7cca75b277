"""Cases that only `pytest -m slow`, and so CI, tries: further ones of a test that stays."""

import pytest


def slow(*cases):
    """The cases as parameters that are marked slow; a tuple is one case of several arguments."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
