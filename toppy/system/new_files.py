"""Writes several files, all or none; no secret is readable by others at any moment."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be."""

    name: str
    content: bytes = field(repr=False)
    mode: int = 0o644
    is_for_service: bool = False
    """A secret that the service reads as its own user."""


def existing_files(directory: Path, files: Sequence[NewFile]) -> list[str]:
    """Names of those that are there already."""
    return [file.name for file in files if os.path.lexists(directory / file.name)]


def write_files(
    directory: Path,
    files: Sequence[NewFile],
    *,
    owner: pwd.struct_passwd | None = None,
    replaces: Collection[str] | None = None,
) -> list[Path]:
    """Write every file, or none; their paths. A new directory has mode 0700. What is there is
    replaced: all of it, or only files of the names in ``replaces``. ``owner`` gets the files that
    are for the service. Raises ``OSError``: ``FileExistsError`` for what is there and must stay.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in files:
        if (directory / file.name).is_dir():
            name = str(directory / file.name)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    drafts: list[tuple[Path, Path]] = []
    reserved: list[Path] = []
    try:
        # all that can fail for want of space or rights comes before the first rename
        for file in files:
            draft = directory / f".{file.name}.{secrets.token_hex(8)}.tmp"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(draft, flags, file.mode)
            drafts.append((draft, directory / file.name))
            with os.fdopen(descriptor, "wb") as stream:
                os.fchmod(stream.fileno(), file.mode)
                if owner is not None and file.is_for_service:
                    os.fchown(stream.fileno(), owner.pw_uid, owner.pw_gid)
                stream.write(file.content)
        for file in files:
            if replaces is not None and file.name not in replaces:
                # two commands at once: only one of them gets the name
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(directory / file.name, flags, file.mode))
                reserved.append(directory / file.name)
        for draft, path in drafts:
            draft.replace(path)
        reserved.clear()
    finally:
        for draft in (*(draft for draft, _ in drafts), *reserved):
            with contextlib.suppress(OSError):
                draft.unlink()
    return [directory / file.name for file in files]
