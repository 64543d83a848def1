"""Writing so that a reader sees the old content or the new one, never a part: write beside, fsync, rename."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from digrap_scale.errors import SaveError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STREAMS = ("iostream error", "PytorchStreamWriter failed writing")  # of torch's C++ archive writer
_PROBE_BYTES = 1 << 20
# Errors of writing; anything else that the caller's block raises (a missing source file, say) is not about saving.
_WRITING = _FULL | {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENOTDIR,
    errno.EISDIR,
}


def save_error(path: Path, error: OSError) -> SaveError:
    """The one-line error for an ``OSError`` met while saving ``path``."""
    if error.errno in _FULL:
        return SaveError(
            f"disk full saving {path}; free space on that file system (or raise the quota) and start again"
        )
    return SaveError(f"cannot save {path}: {error.strerror or error}; check that the folder exists and is writable")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to; it takes the name of ``path`` when the block ends without an error.

    Args:
        path: the file to make or replace; parent folders are made.

    Raises:
        SaveError: the file cannot be written (full disk, no permission, ...). Nothing is left behind, an older
            file stays as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        if (failed := writing_error(error, beside)) is not None:
            raise save_error(path, failed) from error
        raise
    finally:
        if beside.exists():
            beside.unlink()


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes ``content`` (text as UTF-8) to ``path`` in one piece. Raises: SaveError."""
    with atomic_file(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside ``path``; it takes the name of ``path`` when the block ends without an error.

    Args:
        path: the folder to make; parent folders are made.
        overwrite: replace a folder of that name. The old one is moved away only when the new one is complete.

    Raises:
        SaveError: ``path`` exists and ``overwrite`` is off, or it cannot be written. No partial folder is left.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise SaveError(f"cannot save {path}: it exists; remove it or choose another folder")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(beside)
        beside.mkdir()
        yield beside
        sync_tree(beside)
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(beside, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        sync(path.parent)
        _remove(old)
    except (OSError, SafetensorError, RuntimeError) as error:
        if (failed := writing_error(error, beside)) is not None:
            raise save_error(path, failed) from error
        raise
    finally:
        _remove(beside)


def system_error(error: BaseException, folder: Path) -> BaseException:
    """What the system said, where torch.save only raises a RuntimeError: of a Python file, about positions, since it ends its
    archive while the OSError of a write passes, and fails again; of a path, of C++'s streams, which keep no cause.

    Args:
        error: any; it is returned where it is not about writing.
        folder: where it wrote: a try tells what C++ does not.
    """
    if not isinstance(error, RuntimeError):
        return error
    below: BaseException | None = error
    streams = False
    while below is not None:
        if isinstance(below, OSError):
            return below
        streams = streams or any(words in str(below) for words in _STREAMS)
        below = below.__context__
    return _try_writing(folder) if streams else error


def _try_writing(folder: Path) -> OSError:
    probe = folder / f".{os.getpid()}.probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        probe.unlink(missing_ok=True)
    return OSError(errno.EIO, "torch could not write a file of it")


def writing_error(error: BaseException, beside: Path) -> OSError | None:
    """The error as an ``OSError`` if it is about writing, else None (a source that cannot be read, say)."""
    error = system_error(error, beside if beside.is_dir() else beside.parent)
    if isinstance(error, SafetensorError):  # keeps the system's error only as text: "... (os error 28)"
        code = re.search(r"\(os error (\d+)\)", str(error))
        error = OSError(int(code.group(1)), os.strerror(int(code.group(1)))) if code else OSError(str(error))
    if not isinstance(error, OSError):
        return None
    ours = error.filename is not None and str(error.filename).startswith(str(beside))
    return error if error.errno in _WRITING or ours else None


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """fsync a file or a folder's own entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def sync_tree(top: Path, files: bool = True) -> None:
    """fsync every folder of ``top``, and the files in them."""
    for folder, _, names in os.walk(top):
        for name in names if files else ():
            sync(Path(folder, name))
        sync(Path(folder))
