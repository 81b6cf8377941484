"""Words of messages that several readers share."""

from __future__ import annotations

from trilens.io.messages import other_version


def test_only_versions_that_are_read_are_named() -> None:
    assert other_version("this is x", 3, 2) == (
        "this is x version 3: this trilens reads version 2; install a newer trilens"
    )
    assert other_version("this is x", 1, 2).endswith("reads version 2; write it again")
    assert other_version("this is x", 4, 3, oldest=1) == (
        "this is x version 4: this trilens reads versions 1 to 3; install a newer trilens"
    )
    assert "reads version 1;" in other_version("this is x", None, 1, oldest=1)
