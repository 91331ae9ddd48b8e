"""What several test files need: the built-in hand and a renderer."""

import pytest

from hoi.hand import HandModel, load_hand
from hoi.render import Renderer


@pytest.fixture(scope="session")
def hand() -> HandModel:
    return load_hand()


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    return Renderer()
