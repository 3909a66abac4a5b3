"""PyTorch's pickled files, read without running anything that is in them."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from core.errors import UserError

CHUNK = 2**22  # bytes


def check_archive(path: Path, told: Callable[[int], object] = lambda count: None) -> None:
    """Compare the checksums of a zip archive, which torch.load does not; UserError when one differs.

    `told` gets the number of bytes after each part. Files that are no archives, older than torch 1.6, have none.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    while chunk := file.read(CHUNK):
                        told(len(chunk))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from None


def read_pickle(path: Path, mmap: bool = False) -> dict[str, Any]:
    """torch.load with weights_only on the CPU; UserError in one line when missing, truncated or unsafe.

    `mmap`: tensors stay in the file until they are used (zip archives only, which torch.save has written since 1.6).
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or holds more than tensors and plain values, which is never run") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
            MemoryError, SafetensorError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is truncated or not a checkpoint ({reason})") from None
