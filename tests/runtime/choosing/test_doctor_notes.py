"""What `doctor` says of versions that have something to be said of."""

from lhc_triton.runtime.choosing.doctor import version_notes


def test_a_triton_without_the_proxy_fence_gets_a_note():
    (note,) = version_notes("3.6.0")
    assert "no proxy fence" in note
    assert "make test-gpu" in note
    assert "\n" not in note
    assert version_notes("3.7.1") == version_notes("3.9.0") == version_notes(None) == []
