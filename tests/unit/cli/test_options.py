"""What several commands share."""

from __future__ import annotations

import pytest

from sdft_ray.cli.options import check_extra
from sdft_ray.errors import UserError


def test_a_missing_optional_dependency_is_named_with_the_command_that_installs_it() -> None:
    check_extra("serve", "fastapi")
    with pytest.raises(UserError, match=r"needs no_such_module.*pip install 'sdft_ray\[serve\]'"):
        check_extra("serve", "no_such_module")
