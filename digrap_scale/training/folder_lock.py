"""One job at a time in a run's folder: two would take each other's checkpoints for their own."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path
from types import TracebackType

from digrap_scale.errors import ConfigError
from digrap_scale.process_lock import ProcessLock

LOCK_FILE = ".lock"
# The lock of a node that died is kept by a network file system for its lease (NFS: 90 s), and its job is started again.
_WAIT_S = 120.0
_POLL_S = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Rank 0's claim to its run's folder, until the block is left; where the file system has no locks there is none.

    Args:
        folder: of the run; may not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = ProcessLock(folder / LOCK_FILE)
        self._has_locks = True

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def wait(self) -> None:
        """Claim the folder before it is looked at, if there is one; another job gets two minutes to end.

        Raises:
            ConfigError: another job has it.
            OSError: the file cannot be made.
        """
        if not self._folder.is_dir() or self._acquired():
            return
        holder = self._lock.holder()
        print(f"{self._folder} is in use by {holder}; waiting for it to end, at most {_WAIT_S:g} s", file=sys.stderr)
        deadline = time.monotonic() + _WAIT_S
        while not self._acquired():
            if time.monotonic() > deadline:
                raise self._in_use()
            time.sleep(_POLL_S)

    def take(self) -> None:
        """Claim a folder that was not there when it was looked at: make it. Raises: as above."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._acquired():
            raise self._in_use()

    def is_elsewhere(self) -> bool:
        """Whether another job has the folder. Raises: OSError."""
        if self._lock.held or not self._lock.file.is_file():
            return False
        elsewhere = not self._acquired()
        self._lock.release()
        return elsewhere

    def _in_use(self) -> ConfigError:
        holder = self._lock.holder()
        return ConfigError(
            f"run.folder: {self._folder} is in use by {holder}; wait for it, stop it, or choose another folder"
        )

    def _acquired(self) -> bool:
        try:
            return not self._has_locks or self._lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._has_locks = False
            print(
                f"{self._folder}: its file system has no locks ({error.strerror}); a second job in it would not be noticed",
                file=sys.stderr,
            )
            return True
