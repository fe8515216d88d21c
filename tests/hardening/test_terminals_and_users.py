"""No control character of a foreign text reaches a terminal; and every command runs for a user without a name or a HOME."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmdist import console
from lmdist.command_line import exit_on_error
from lmdist.errors import DataError, UsageError
from lmdist.text.prepare import main as prepare_main
from lmdist.text.vocabulary import Vocabulary
from lmdist_export import generate
from support.small_bundles import make_run

CONTROLS = ["\x1b[31m", "\x1b]0;title\x07", "\x00", "\r", "\x7f", "\x9b31m", "\x85"]


def is_clean(text: str) -> bool:
    """Return whether a text has no control characters but those of layout."""
    return all(character in "\n\t" or (ord(character) >= 32 and not 127 <= ord(character) < 160) for character in text)


@pytest.mark.parametrize("control", CONTROLS, ids=ascii)
def test_a_message_shows_control_characters_and_does_not_send_them(
    control: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails() -> None:
        with exit_on_error("lmdist-x"):
            raise UsageError(f"{control} is given")

    with pytest.raises(SystemExit):
        fails()
    console.log(f"warning: {control}")
    with console.ProgressBar(1, "step") as bar:
        bar.log(control)
    sys.stdout.write(console.table({"run": control}))
    with pytest.raises(SystemExit):
        generate.main([str(tmp_path / "bundle"), f"--{control}"])
    if "\0" not in control:
        with pytest.raises(SystemExit):
            generate.main([str(tmp_path / control)])
    written = "".join(capsys.readouterr())
    assert is_clean(written), ascii(written)
    assert written.count(ascii(control)[1:-1]) >= 4


@pytest.mark.parametrize("control", [*CONTROLS, "\t", "\n"], ids=ascii)
def test_no_vocabulary_has_a_word_with_control_characters(control: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 4 of this vocabulary is"):
        Vocabulary(["<unk>", "<eos>", "the", f"a{control}b"])
    if control != "\n":
        (tmp_path / "vocab.txt").write_text(f"<unk>\n<eos>\nthe\na{control}b\n", encoding="utf-8", newline="")
        with pytest.raises(DataError, match=r"vocab\.txt: a word holds no control characters; line 4"):
            Vocabulary.load(tmp_path / "vocab.txt")


@pytest.mark.parametrize("tokenizer", ["wordpunct", "whitespace"])
def test_a_text_with_control_characters_has_unknown_words_there(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    controls = [control for control in CONTROLS if control not in "\x00\r\x85"]
    lines = [f"the cat {number} said a{control}b .\n\n" for number in range(30) for control in controls]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    prepare_main(
        [str(tmp_path / "a.txt"), "-o", str(tmp_path / "data"), f"--tokenizer={tokenizer}", "--min-count=1", "--workers=1"]
    )
    words = Vocabulary.load(tmp_path / "data" / "vocab.txt").words
    assert "cat" in words
    assert is_clean("\n".join(words))
    assert is_clean("".join(capsys.readouterr()))


NOBODY = ["unshare", "--user", "--map-user=12345", "--map-group=12345", "env", "-i"]
"""Runs a command as a user whom the machine does not know, without any variable."""


def can_be_nobody() -> bool:
    """Return whether this machine has user namespaces."""
    return shutil.which("unshare") is not None and subprocess.run([*NOBODY, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_be_nobody(), reason="this machine has no user namespaces")
def test_a_user_without_a_name_prepares_exports_and_generates(tmp_path: Path) -> None:
    """NLTK, MLflow and torch ask for a name and a home folder; lmdist-train and the others go through the same line."""
    (tmp_path / "a.txt").write_text("".join(f"The cat said {number} . It is here .\n\n" for number in range(50)))
    run = make_run(tmp_path)
    for arguments in (
        ("lmdist.text.prepare", "a.txt", "-o", "prepared", "--min-count", "1", "--workers", "1"),
        ("lmdist_export.export", run, "-o", "bundle"),
        ("lmdist_export.generate", "bundle", "--prompt", "the", "--max-new-tokens", "3"),
    ):
        command = [*NOBODY, f"PYTHONPATH={os.pathsep.join(sys.path)}", sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
