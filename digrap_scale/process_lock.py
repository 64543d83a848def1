"""A file that one process holds at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path


class ProcessLock:
    """The kernel's record lock on a file: it ends with this process, however that ends.

    ``filelock`` takes ``flock``, which children of a process inherit, and keep for as long as one of them outlives it.

    Args:
        file: its path; made by ``acquire``, removed by ``release``.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return self._descriptor is not None

    def acquire(self) -> bool:
        """Take it, at once; whether it is this process's now.

        Raises:
            OSError: the file cannot be made, or its file system has no locks.
        """
        while self._descriptor is None:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_in_place(descriptor):  # else it was released, and removed, since it was opened
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    self._descriptor = descriptor
            except (BlockingIOError, PermissionError):
                return False
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        return True

    def _is_in_place(self, descriptor: int) -> bool:
        """Not by the number of its links: NFS gives a removed file that is open another name."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.file))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise

    def holder(self) -> str:
        """Who has it, in words."""
        try:
            return self.file.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        except FileNotFoundError:
            return "another process"

    def release(self) -> None:
        """Remove the file, if this process holds it."""
        if self._descriptor is not None:
            try:
                self.file.unlink(missing_ok=True)
            finally:
                os.close(self._descriptor)
                self._descriptor = None
