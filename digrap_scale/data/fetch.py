"""Shards that a command or a URL gives: fetched once a node into a folder, and read there as any others.

Exact resume reads any sample at any time, which a stream cannot. ``pipe:COMMAND`` runs in a shell, as webdataset has it, so
both are refused unless the config allows it (``data.allow_commands``), and ``pipe:`` also where ``WDS_SECURE`` is set. URLs
go through curl, without a shell. Only the config's own strings, and plain file names of manifests, ever get into a command.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand
from filelock import FileLock, Timeout

from digrap_scale.config.schema import DataConfig
from digrap_scale.data.manifest import MANIFEST_SUFFIX, Manifest, replacing, sha256_of
from digrap_scale.data.shards import ShardSet
from digrap_scale.errors import ConfigError, SaveError

_FETCHED = re.compile(r"^(pipe:|https?://)")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(\.tar|\.manifest\.json)(?![A-Za-z0-9._-])")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# As webdataset calls it; names with brackets are names.
_CURL = ("curl", "--connect-timeout", "30", "--retry", "30", "--retry-delay", "2", "-f", "-sS", "-L", "--globoff")


@dataclass(frozen=True)
class Remote:
    """A file that a command or a URL gives.

    Attributes:
        source: ``pipe:COMMAND`` or ``http(s)://…``, in which the file's name stands once.
        name: that name; ends in ``.tar`` or ``.manifest.json``.
    """

    source: str
    name: str

    @classmethod
    def of(cls, source: str) -> Remote:
        """Raises: ConfigError: no name, or several."""
        names = [match[0] for match in _FILE.finditer(source)]
        if len(names) != 1:
            raise ConfigError(
                f"shards {source!r}: expected one name of a .tar or {MANIFEST_SUFFIX} file in it, found "
                f"{', '.join(names) or 'none'}"
            )
        return cls(source, names[0])

    def sibling(self, name: str) -> Remote:
        """The file ``name`` beside it. Raises: ConfigError: a name that a shell could take for more than a name."""
        if not _PLAIN_NAME.fullmatch(name):
            raise ConfigError(
                f"{self.source}: it lists {name!r}; expected letters, digits, '.', '_' and '-' in file names"
            )
        return Remote(self.source.replace(self.name, name), name)

    def place(self, cache: Path) -> Path:
        """Where it is kept: files that come from one place share a folder, as a manifest and its shards do."""
        origin = hashlib.sha256(self.source.replace(self.name, "\0").encode()).hexdigest()[:16]
        return cache / origin / self.name


def open_shards(patterns: Sequence[str], data: DataConfig, *, skip: bool = False) -> ShardSet:
    """``ShardSet.open``, after what is not local was fetched.

    Raises:
        ConfigError: see ``ShardSet.open`` and ``local_copies``.
        SaveError: the cache cannot be written.
    """
    if data.allow_commands:
        assert data.cache_folder is not None  # config/checks.py
        patterns = local_copies(patterns, Path(data.cache_folder))
    return ShardSet.open(patterns, skip=skip)


def local_copies(patterns: Sequence[str], cache: Path) -> list[str]:
    """Patterns with the local copies of ``pipe:`` and ``http(s)://`` sources in their place.

    A source that names a ``.manifest.json`` stands for what its shards are checked against: its sizes and sha256. Each
    file takes its name in the cache when all of it is there and as the manifest says; what is there is not fetched again.
    Processes that share the cache fetch each file once: one fetches, others take the next file, and wait at the end.

    Raises:
        ConfigError: a command fails, or gives other bytes than the manifest says; ``pipe:`` under ``WDS_SECURE``.
        SaveError: the cache cannot be written.
    """
    local: list[str] = []
    remotes: list[Remote] = []
    for pattern in patterns:
        if not _FETCHED.match(pattern):
            local.append(pattern)
            continue
        if pattern.startswith("pipe:") and os.environ.get("WDS_SECURE", "0") != "0":
            raise ConfigError(
                f"shards {pattern!r}: expected no command where WDS_SECURE is set; copy the shards, or unset it"
            )
        try:
            remotes += [Remote.of(source) for source in braceexpand(pattern)]
        except ValueError as error:  # braceexpand's error for unbalanced braces
            raise ConfigError(f"shards {pattern!r}: the braces are not balanced") from error
    manifests = [remote for remote in remotes if remote.name.endswith(MANIFEST_SUFFIX)]
    shards = [remote for remote in remotes if remote.name.endswith(".tar")]
    sums: dict[Path, str] = {}
    try:
        for remote in manifests:
            _fetch_all([remote], cache, {})
            manifest = Manifest.read(remote.place(cache))
            sums |= {remote.sibling(entry.file).place(cache): entry.sha256 for entry in manifest.shards}
            if manifest.offsets is not None:
                offsets = remote.sibling(manifest.offsets.file)
                _fetch_all([offsets], cache, {offsets.place(cache): manifest.offsets.sha256})
        _fetch_all(shards, cache, sums)
    except OSError as error:
        raise SaveError(f"data.cache_folder: {cache}: cannot be written: {error}") from error
    return [*local, *(str(remote.place(cache)) for remote in shards)]


def _fetch_all(remotes: Sequence[Remote], cache: Path, sums: dict[Path, str]) -> None:
    busy = []
    for remote in remotes:
        place = remote.place(cache)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(_lock_of(place), blocking=False):
                _fetch(remote, place, sums.get(place))
        except Timeout:
            busy.append(remote)
    for remote in busy:
        place = remote.place(cache)
        with FileLock(_lock_of(place)):  # the process that had it may have been killed
            _fetch(remote, place, sums.get(place))


def _lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _fetch(remote: Remote, place: Path, sha256: str | None) -> None:
    if place.exists():
        return
    with replacing(place) as target:
        shell = remote.source.startswith("pipe:")
        command = remote.source.removeprefix("pipe:") if shell else [*_CURL, remote.source]
        try:
            done = subprocess.run(command, shell=shell, stdin=subprocess.DEVNULL, stdout=target, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise ConfigError(f"shards {remote.source!r}: cannot be fetched: no program {error.filename}") from error
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise ConfigError(
                f"shards {remote.source!r}: cannot be fetched: exit {done.returncode}{''.join(f', {line}' for line in said[-1:])}"
            )
        if sha256 is None:
            if place.suffix == ".tar":
                _refuse_other_than_tar(remote, Path(target.name))
            return
        found = sha256_of(Path(target.name))
        if found != sha256:
            raise ConfigError(
                f"shards {remote.source!r}: expected sha256 {sha256} by its manifest, found {found}; fetch anew"
            )


def _refuse_other_than_tar(remote: Remote, path: Path) -> None:
    """Raises: ConfigError: a server's page in place of a shard, say, which would be kept as one (curl without -f ends well)."""
    try:
        with tarfile.open(path, mode="r:"):
            return
    except (OSError, tarfile.TarError):
        with path.open("rb") as file:
            begin = file.read(40)
    raise ConfigError(f"shards {remote.source!r}: cannot be fetched: expected a plain tar file, found {begin!r}…")
