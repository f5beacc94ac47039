"""Files are written whole, or not at all and with their name in the error."""

import errno
import re

import pytest

from litevae.files import atomic_path, write_text


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "a.json"))), atomic_path(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")  # as writes raise it
    assert not list(tmp_path.iterdir())


def test_texts_appear_under_their_name_alone(tmp_path):
    write_text(tmp_path / "a.json", "{}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
