"""How every command reports a user's mistake: one line on stderr, exit status 2, no traceback."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

_NOTED: set[str] = set()
INTERRUPTED = 130  # exit status, as a shell's after Ctrl-C


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the file or key and the valid choices."""

    def __str__(self) -> str:
        """The message on one line, whatever line breaks the file or key that it quotes has."""
        return " ".join(super().__str__().splitlines())


class DamagedFile(UserError):
    """A file of this project's own is cut, changed or unreadable."""


class RunsFailed(Exception):
    """Runs of a study failed, the others are done; the message lists them."""


class Interrupted(Exception):
    """SIGINT or SIGTERM reached a training loop. State is already on disk; the message says how to go on from there.

    `saved` says what is on disk, `command` continues this one training; without it the same command does.
    """

    def __init__(self, saved: str, command: str | None = None) -> None:
        super().__init__(saved, command)
        self.saved, self.command = saved, command

    def __str__(self) -> str:
        """In one line."""
        way = "the same command goes on from there" if self.command is None else f"continue with: {self.command}"
        return f"{self.saved}; {way}"


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, whose complaint about a command line is one line like any other."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's `message`, which names the option and the choices."""
        raise UserError(f"{message}; see {self.prog} --help")


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """' (did you mean "x"?)' for the closest of `choices`, or an empty string."""
    close = get_close_matches(word, choices, n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


def damaged(path: Path, reason: BaseException | str) -> UserError:
    """The UserError for an image file that cannot be decoded, from what the decoder said."""
    if isinstance(reason, PermissionError):
        return UserError(f"image {path} cannot be read: permission denied")
    said = " ".join(str(reason).split()) or type(reason).__name__
    return UserError(f"image {path} cannot be read, it may be cut off or damaged: {said}")


def note_once(kind: str, text: str) -> None:
    """Print `text` on stderr, the first time in this process that something of this `kind` is noted."""
    if kind not in _NOTED:
        _NOTED.add(kind)
        print(text, file=sys.stderr)


def system_error(error: OSError) -> str:
    """What the operating system refused, in one line with the file's name."""
    said = error.strerror or " ".join(str(error).split()) or type(error).__name__
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)!r}"[1:-1] + ": "
    advice = {errno.ENOSPC: "; make room, then the same command goes on from what was saved",
              errno.EDQUOT: "; make room in your quota, then the same command goes on from what was saved"}
    return f"{place}{said}{advice.get(error.errno or 0, '')}"


def _failed_thread(failed: threading.ExceptHookArgs) -> None:
    """A thread that ends by what the system refused, as TensorBoard's on a full disk, says it in one line."""
    if isinstance(failed.exc_value, OSError):
        note_once(f"thread {failed.exc_value.errno}", f"note: a log is cut short: {system_error(failed.exc_value)}")
    else:
        threading.__excepthook__(failed)


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main` and turn its outcome into an exit status.

    0 done, 1 runs failed, 2 a user's mistake or what the system refused (a full disk), INTERRUPTED.
    """
    threading.excepthook = _failed_thread
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {system_error(error)}", file=sys.stderr)
        sys.exit(2)
    except RunsFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        print("interrupted: what was saved stays; the same command goes on from there", file=sys.stderr)
        sys.exit(INTERRUPTED)
