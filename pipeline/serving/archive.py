"""Archives: files in a zip of fixed order and dates, with a list of their hashes."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from pipeline.artifacts import sha256_bytes, sha256_file, workshop
from pipeline.errors import BuildFolderError

SUMS = "SHA256SUMS"
# The first date that a zip can hold.
DATE = (1980, 1, 1, 0, 0, 0)
# Readable by all, writable by the owner, a plain file.
MODE = 0o100644 << 16


def write_archive(target: Path, files: Mapping[str, Path | bytes], *, overwrite: bool = False) -> None:
    """Write files into ``target``, in a folder of its name without ending, with their hashes for ``sha256sum -c``.

    The same files give the same bytes: they are sorted, dated 1980, and stored as they are, so that nothing depends on
    a compressor's version.

    Raises:
        BuildFolderError: the archive exists; the folder is unwritable or full. What was there is as it was.
    """
    with workshop(target) as made:
        if target.exists() and not overwrite:
            raise BuildFolderError(f"{target} exists already", fix="choose another with -o, or give --overwrite")
        sums = "".join(f"{_sha256(content)}  {name}\n" for name, content in sorted(files.items())).encode()
        with zipfile.ZipFile(made / target.name, "w") as archive:
            for name, content in sorted({**files, SUMS: sums}.items()):
                entry = zipfile.ZipInfo(f"{target.stem}/{name}", DATE)
                entry.create_system, entry.external_attr = 3, MODE
                if isinstance(content, bytes):
                    archive.writestr(entry, content)
                    continue
                entry.file_size = content.stat().st_size
                with content.open("rb") as source, archive.open(entry, "w") as place:
                    shutil.copyfileobj(source, place, 1 << 20)
        with (made / target.name).open("rb") as file:
            os.fsync(file.fileno())
        (made / target.name).replace(target)


def _sha256(content: Path | bytes) -> str:
    return sha256_bytes(content) if isinstance(content, bytes) else sha256_file(content)
