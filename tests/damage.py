"""Twelve ways in which a file goes bad between two runs. Used by run/test_damage.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, Path], None]


def truncate(file: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_late(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-len(content) // 8] ^= 2
    file.write_bytes(content)


def zero_fill(file: Path, other: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def delete(file: Path, other: Path) -> None:
    file.unlink()


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def wrong_type(file: Path, other: Path) -> None:
    file.write_text("[1, 2]\n")


def not_text(file: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :])


def duplicate(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes() * 2)


def swap(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def folder(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").write_text("x")


def lose_a_middle(file: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3] + content[len(content) * 2 // 3 :])


DAMAGES: tuple[Damage, ...] = (
    truncate, flip, flip_late, zero_fill, delete, empty, wrong_type, not_text, duplicate, swap, folder, lose_a_middle,
)  # fmt: skip
