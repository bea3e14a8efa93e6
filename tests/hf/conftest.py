"""What tests of Hugging Face trainers share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A tokenizer of words, which TRL asks for."""
    from trl_helpers import small_tokenizer

    return small_tokenizer()
