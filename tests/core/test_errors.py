"""What the operating system refuses, and what threads cannot write: one line, no traceback."""

import errno
import threading

import pytest

from core.errors import UserError, run_command


@pytest.mark.parametrize(("error", "line"), [
    (OSError(errno.ENOSPC, "No space left on device", "runs/a/last.pt"),
     "error: runs/a/last.pt: No space left on device; make room, then the same command goes on from what was saved"),
    (PermissionError(errno.EACCES, "Permission denied", "runs"), "error: runs: Permission denied"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", b"a\n\xff"),
     "error: a\\n\\udcff: No such file or directory"),
    (OSError("image 3 was cut\noff"), "error: image 3 was cut off"),
    (OSError(), "error: OSError"),
])
def test_an_error_of_the_system_is_one_line(capsys, error, line):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(fail)
    assert stop.value.code == 2 and capsys.readouterr().err == f"{line}\n"


def test_a_thread_that_cannot_write_says_so_once(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", "events")

    run_command(lambda: None)
    for _ in range(2):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert capsys.readouterr().err.startswith("note: a log is cut short: events: No space left on device")
    assert capsys.readouterr().err == ""


def test_a_message_that_quotes_line_breaks_is_one_line():
    assert str(UserError("a.csv: unknown column \"x\ny\"")) == 'a.csv: unknown column "x y"'
