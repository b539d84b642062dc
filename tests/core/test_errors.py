"""What people read: without tokens, on one line, without escape codes."""

import pytest

from tinycats_core.errors import ConfigError, TinycatsError, exit_on_error, keep_secret, masked, printable, report_error


def test_tokens_are_masked_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "my own/token")
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "short")
    keep_secret("kept-for-later")
    keep_secret(None)
    like = "hf_" + "a1B2" * 9, "as-" + "Zz09" * 6, "ak-" + "Zz09" * 6
    text = f"my own/token my%20own%2Ftoken kept-for-later {' '.join(like)} Bearer abc.def short hf_hub_download"
    assert masked(text) == "*** *** *** *** *** *** Bearer *** short hf_hub_download"
    assert str(ConfigError(text)) == masked(text)
    assert TinycatsError("x", 5).args == ("x", 5)


def test_an_error_is_one_line_without_escape_codes(capsys: pytest.CaptureFixture[str]):
    assert report_error("a\n\x1b[2Jb  ü Bearer secret") == 1
    assert capsys.readouterr().err == "error: a \\x1b[2Jb ü Bearer ***\n"
    with pytest.raises(SystemExit, match=r"^error: a \\x07b$"), exit_on_error():
        raise TinycatsError("a\n\x07b")


@pytest.mark.parametrize(
    ("text", "shown"), [("katze ü", "katze ü"), ("a\nb", r"a\nb"), ("\ud800", r"\ud800"), ("x" * 300, "x" * 200 + "…"), (7, "7")]
)
def test_what_others_chose_is_printable(text: object, shown: str):
    assert printable(text) == shown
