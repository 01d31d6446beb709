"""What is told of an error."""

from serve.contract.errors import SettingsError, message_of


def test_what_the_system_refuses_is_told_with_its_file():
    told = message_of(PermissionError(13, "Permission denied", "/slides/a.svs"))
    assert told.startswith("/slides/a.svs cannot be used: Permission denied.")
    assert "Errno" not in told


def test_our_own_words_stay():
    assert message_of(SettingsError("--mpp is 0.")) == "--mpp is 0."
    assert message_of(ConnectionError("closed")) == "closed"
