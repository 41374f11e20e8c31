"""`diffq report` and `diffq completion`: what they write, and what they leave alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffq.cli import main
from diffq.format.container import encode
from diffq.reports.comparison import comparison_page
from diffq.reports.model import model_page
from tests.reports.samples import reader, records

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with two files."""
    monkeypatch.chdir(tmp_path)
    note = {"note": "<script>document.title = 'taken'</script>", "rate": 16000}
    ties = {"decoder.weight": "head"}
    Path("old.diffq").write_bytes(encode(records(), ties, note))
    Path("new.diffq").write_bytes(encode(records(small=True), ties, note))
    return tmp_path


def test_report_writes_a_page(capsys):
    """The page of a file goes to the file's name with .html added, in this folder."""
    Path("models").mkdir()
    shutil.move("old.diffq", "models/old.diffq")
    assert main(["report", "models/old.diffq"]) == 0
    page = Path("old.diffq.html").read_text(encoding="utf-8")
    assert page == model_page(reader(), "old.diffq")
    assert capsys.readouterr() == (f"old.diffq.html: {len(page.encode()) / 2**20:.3f} MB\n", "")


def test_report_compares_two_files(capsys):
    """With two files, the page has both; --json tells what was written."""
    assert main(["report", "old.diffq", "new.diffq", "-o", "changes.html", "--json"]) == 0
    page = Path("changes.html").read_text(encoding="utf-8")
    assert page == comparison_page(reader(), reader(small=True), ("old.diffq", "new.diffq"))
    assert json.loads(capsys.readouterr().out) == {
        "file": "changes.html",
        "bytes": len(page.encode()),
        "models": ["old.diffq", "new.diffq"],
    }


@pytest.mark.parametrize("out", ["old.diffq", "new.diffq", "no/such/folder/page.html"])
def test_report_keeps_the_files(out, folder, capsys):
    """The page never takes the place of a file that it is about, and needs a folder."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["report", "old.diffq", "new.diffq", "-o", out]) == 1
    assert "diffq: error: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_report_of_a_damaged_file(folder, capsys):
    """A damaged file is an error on one line, and an earlier page stays as it was."""
    Path("page.html").write_text("earlier")
    data = bytearray(Path("old.diffq").read_bytes())
    data[-25] ^= 1
    Path("old.diffq").write_bytes(data)
    assert main(["report", "old.diffq", "-o", "page.html"]) == 1
    assert "checksum" in capsys.readouterr().err
    assert Path("page.html").read_text() == "earlier"


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell, capsys):
    """The script of each shell names every command, their options, and completes files."""
    pytest.importorskip("shtab", reason="shtab is missing: the extra `cli`")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("inspect", "report", "convert", "completion", "target-mb", "codec", "rans"):
        assert word in script
    files = {"bash": "_shtab_compgen_files", "zsh": "_files", "fish": "__fish_complete_path"}
    assert script.count(files[shell]) > 5
    if shutil.which(shell) and shell != "fish":
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_bash_completes(capsys, folder):
    """In bash, the script completes commands, options, choices and files."""
    pytest.importorskip("shtab", reason="shtab is missing: the extra `cli`")
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("bash is missing")
    main(["completion", "bash"])
    script = capsys.readouterr().out

    def complete(*words):
        line = " ".join(words)
        code = f"""{script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD={len(words) - 1} COMP_LINE='{line}' COMP_POINT={len(line)}
$(complete -p diffq | sed 's/.*-F \\([^ ]*\\) .*/\\1/') diffq '{words[-1]}'
echo "${{COMPREPLY[@]}}"
"""
        done = subprocess.run([bash, "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert complete("diffq", "rep") == {"report"}
    assert complete("diffq", "inspect", "--al") == {"--all"}
    assert complete("diffq", "pack", "--codec", "") >= {"zstd", "rans", "packed"}
    assert complete("diffq", "inspect", "ol") == {"old.diffq"}


def test_completion_without_shtab(capsys, monkeypatch):
    """Without shtab, the error names the extra."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "needs the package shtab" in capsys.readouterr().err
