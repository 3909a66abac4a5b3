"""Checksums (CRC-32) of what weights files and training states hold: one changed bit is another number."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CHECKED, CHECKSUM = "checked", "checksum"  # first and last entry of a header; older files, and others', have none


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


def sealed(header: str, tensors: Mapping[str, int]) -> str:
    """`header`, the JSON of an object, with a checksum of it and of its tensors' checksums by name as its last entry.

    The order of the tensors does not matter: a file may be written in another than it is read in. The first entry says
    that there is a checksum, should the last one's name be what is damaged. Both are entries of the header and not
    beside it, since safetensors writes several texts in any order.
    """
    checksum = checksum_of([header, sorted(tensors.items())])
    return f'{{"{CHECKED}": true, {header[1:-1]}, "{CHECKSUM}": "{checksum:08x}"}}'


def is_sealed(header: str, tensors: Mapping[str, int]) -> bool:
    """Whether `header` is what `sealed` made of it and these tensors."""
    bare, _, _ = header.rpartition(f', "{CHECKSUM}": "')
    inner = bare.removeprefix(f'{{"{CHECKED}": true, ')
    return header == sealed(f"{{{inner}}}", tensors)
