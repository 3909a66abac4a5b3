"""Checksums (CRC-32) of what weights files and training states hold: one changed bit is another number."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def checksum_of(values: Any, before: int = 0) -> int:
    """CRC-32 of nested `values`: keys, numbers and the bytes of tensors, going on from that of what came `before`."""
    if isinstance(values, Tensor):
        before = zlib.crc32(f"{values.dtype} {list(values.shape)}".encode(), before)
        return zlib.crc32(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, before)
    if isinstance(values, dict):
        values = list(values.items())
    if isinstance(values, list | tuple):
        for value in values:
            before = checksum_of(value, zlib.crc32(b",", before))
        return zlib.crc32(b";", before)
    return zlib.crc32(repr(values).encode(), before)


def seal(header: str, tensors: Mapping[str, int]) -> str:
    """What a weights file keeps beside its `header`: 8 hexadecimal digits of it and of its tensors' checksums by name.

    The order of the tensors does not matter: a file may be written in another than it is read in.
    """
    return f"{checksum_of([header, sorted(tensors.items())]):08x}"
