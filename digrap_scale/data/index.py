"""``digrap-scale index``: manifests of shards that others wrote, and checks of any."""

from __future__ import annotations

from collections.abc import Sequence

from digrap_scale.data.manifest import MANIFEST_SUFFIX, Manifest, check_manifest, index_shards, set_name
from digrap_scale.data.shards import expand_shards
from digrap_scale.errors import ConfigError


def index(patterns: Sequence[str], *, name: str | None = None, skip: bool = False, processes: int = 1) -> list[str]:
    """Writes the manifest of the shards that ``patterns`` name, in their folder.

    Args:
        patterns: see ``expand_shards``; files of one folder.
        name: of the manifest; None: what the files' names have in common.
        skip: leave out what is broken.
        processes: shards read at a time.

    Returns:
        Lines that tell what was written, and what was left out.

    Raises:
        ConfigError, SaveError: see ``index_shards``; another manifest of the folder lists one of the files.
    """
    paths = expand_shards(patterns)
    name = name or set_name(paths)
    files = {path.name for path in paths}
    for other in sorted(paths[0].parent.glob(f"*{MANIFEST_SUFFIX}")):
        shared = files & {entry.file for entry in Manifest.read(other).shards}
        if shared and other.name != f"{name}{MANIFEST_SUFFIX}":
            raise ConfigError(
                f"{other}: lists {sorted(shared)[0]} already; give --name {other.name.removesuffix(MANIFEST_SUFFIX)}, or "
                "delete it"
            )
    manifest, skipped = index_shards(paths, name, skip=skip, processes=processes)
    written = paths[0].parent / f"{name}{MANIFEST_SUFFIX}"
    return [
        *(f"left out: {problem}" for problem in skipped),
        f"{written}: {manifest.samples} samples in {len(manifest.shards)} shards",
    ]


def check(patterns: Sequence[str], *, processes: int = 1) -> list[str]:
    """Compares shards with the manifests that list them, byte by byte.

    Returns:
        A line for each manifest that is right.

    Raises:
        ConfigError: every difference; a shard that no manifest lists.
    """
    paths = expand_shards(patterns)
    problems: list[str] = []
    lines: list[str] = []
    listed = set()
    for folder in dict.fromkeys(path.parent for path in paths):
        for manifest_path in sorted(folder.glob(f"*{MANIFEST_SUFFIX}")):
            manifest = Manifest.read(manifest_path)
            of_manifest = {folder / entry.file for entry in manifest.shards}
            if not of_manifest & set(paths):
                continue
            listed |= of_manifest
            found = check_manifest(manifest_path, processes)
            problems += found
            if not found:
                lines.append(f"{manifest_path}: {manifest.samples} samples in {len(manifest.shards)} shards, as listed")
    problems += [f"{path}: no manifest lists it" for path in paths if path not in listed]
    if problems:
        raise ConfigError(problems)
    return lines
