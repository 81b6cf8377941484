"""Progress, times and files of the commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import trilens
from trilens.cli.console import check_file, show, show_json, shown_progress, status, timed
from trilens.cli.main import app
from trilens.errors import UsageError
from trilens.progress import Step


def test_without_a_terminal_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with status("loading"), shown_progress() as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error counts as a terminal of 120 columns."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("terminal")
def test_on_a_terminal_the_step_and_the_time_left_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shown_progress() as progress:
        assert progress is not None
        progress(Step(1, 4, "layer 1 of 0–3: [coding]", 12.4))
    with status("loading [a]"):
        pass
    shown = capsys.readouterr()
    assert shown.out == ""
    for words in ("layer 1 of 0–3: [coding]", "12 s left", "loading [a]"):
        assert words in shown.err


def test_what_was_written_is_said_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with timed(tmp_path / "folder"):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a").write_bytes(bytes(1500))
        (tmp_path / "folder" / "b").write_bytes(bytes(500))
    with timed(None), timed(tmp_path / "nothing"):
        pass
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"wrote {tmp_path / 'folder'}: 2.0 kB in 0.")
    assert shown.err.count("\n") == 1


def test_results_go_to_a_file_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"value": float("nan")}, file=tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == '{\n  "value": null\n}\n'
    show(lambda console: console.print("x" * 200), file=tmp_path / "a.txt")
    assert [len(line) for line in (tmp_path / "a.txt").read_text().splitlines()] == [120, 80]
    assert capsys.readouterr() == ("", "")
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_place_for_a_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place, words in (
        (tmp_path, "is a directory"),
        (pipe, "no regular file"),
        (Path(os.devnull), "no regular file"),
        (tmp_path / "no" / "file", "does not exist"),
    ):
        with pytest.raises(UsageError, match=words):
            check_file(place)
    check_file(None)
    check_file(tmp_path / "new")


@pytest.mark.usefixtures("terminal")
def test_quiet_leaves_progress_and_times_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = str(trilens.demo_path("transformer"))
    page = tmp_path / "report.html"
    arguments = ["inspect", demo, "-p", "def f(", "-o", str(page)]
    loud = CliRunner().invoke(app, arguments)
    assert loud.exit_code == 0 and page.stat().st_size > 500_000
    for words in ("loading", "capturing", "writing"):
        assert words in loud.stderr
    page.unlink()
    quiet = CliRunner().invoke(app, ["-q", *arguments])
    assert quiet.exit_code == 0 and page.exists() and quiet.stderr == ""
    # The next command is asked anew; an error is never left out.
    assert "loading" in CliRunner().invoke(app, arguments).stderr
    wrong = CliRunner().invoke(app, ["--quiet", "inspect", str(tmp_path / "none"), "-p", "a"])
    assert wrong.exit_code != 0 and "none" in wrong.stderr
