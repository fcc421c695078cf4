"""What laws say of a user's mistake: its code, and no more of the sentence than matters to them."""

import contextlib
from collections.abc import Iterator

import pytest

from common.errors import UserError


@contextlib.contextmanager
def refused(code: str, match: str | None = None) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Like pytest.raises for a UserError of this code."""
    with pytest.raises(UserError, match=match) as caught:
        yield caught
    assert caught.value.code == code
