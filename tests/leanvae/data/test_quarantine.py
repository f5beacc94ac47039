"""The record of unusable files survives crashes, and too many of them stop the run."""

import pytest

from leanvae.data.quarantine import QuarantineRecord, Rejection, TooManyBadClips, check_bad_share


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "quarantine.rank0.jsonl"
    path.write_text('{"position": 1, "ep')
    rejection = Rejection(7, 0, "a.mp4", "empty file", "b.mp4", -1)
    QuarantineRecord(path).add(rejection)
    again = QuarantineRecord(path)
    assert again.find(7, 0, "a.mp4") == rejection
    assert again.find(7, 0, "other.mp4") is None
    assert again.reasons() == {"a.mp4": "empty file"}


def test_check_bad_share_allows_the_share_and_lists_files():
    bad = {f"{n:02}.mp4": "empty file" for n in range(12)}
    check_bad_share({}, 0, 0.0)
    check_bad_share(bad, 48, 0.25)
    with pytest.raises(TooManyBadClips) as caught:
        check_bad_share(bad, 47, 0.25)
    assert "12 of 47" in str(caught.value)
    assert "  00.mp4: empty file\n" in str(caught.value)
    assert str(caught.value).endswith("and 2 more")
