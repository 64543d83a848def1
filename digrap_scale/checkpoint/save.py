"""Saves a run's state: every rank its own part, ``COMMITTED`` last, old ones removed; at once or while training goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from digrap_scale.checkpoint import layout
from digrap_scale.checkpoint.atomic import save_error, sync, sync_tree, system_error, write_file, writing_error
from digrap_scale.checkpoint.dcp import RankFailed, write_parts, write_parts_later
from digrap_scale.checkpoint.ranks import Ranks
from digrap_scale.config.schema import CheckpointConfig
from digrap_scale.errors import SaveError
from digrap_scale.types import TensorPart

_SPARE_BYTES = 16 << 20  # beyond the tensors: headers, the model's small files


@dataclass
class Contents:
    """What a checkpoint is made of, on one rank.

    Attributes:
        step: optimizer steps done.
        state: ``state.json``.
        config: ``config.yaml``.
        parts: this rank's own tensors (no element is another rank's too).
        method: tensors of ``method.safetensors``; rank 0's count.
        method_notes: its metadata.
        generators: of this rank.
        write_model: writes the model's small files into a folder; called on rank 0.
        write_native: writes DeepSpeed's own checkpoint into a folder, or None. Collective.
    """

    step: int
    state: dict[str, Any]
    config: str
    parts: Sequence[TensorPart]
    method: Mapping[str, torch.Tensor]
    method_notes: Mapping[str, str]
    generators: Mapping[str, torch.Tensor]
    write_model: Callable[[Path], None]
    write_native: Callable[[Path], None] | None = None


class Saver:
    """Saves into a run's folder, one checkpoint after the other.

    Args:
        run_folder: the run's.
        settings: the config's ``checkpoint`` section.
        ranks: who saves together.
        message: shows a line to the user.
    """

    def __init__(
        self, run_folder: Path, settings: CheckpointConfig, ranks: Ranks, message: Callable[[str], None]
    ) -> None:
        self._run_folder, self._settings, self._ranks, self._message = run_folder, settings, ranks, message
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, contents: Contents, *, wait: bool = False) -> None:
        """Write a checkpoint; with ``checkpoint.asynchronous`` (and not ``wait``) return when all that changes is copied.

        Collective. An earlier save that still goes on is awaited first.

        Raises:
            SaveError: this or an earlier one could not be written, on every rank. Nothing half-written is left.
        """
        self.wait()
        folder = layout.step_folder(self._run_folder, contents.step)
        if self._begun(folder, contents):
            if self._settings.asynchronous and not wait:
                finish = self._guarded(
                    folder, lambda: write_parts_later(folder / layout.DCP, contents.parts, self._ranks.group)
                )
                self._pending = self._thread.submit(self._complete, folder, contents, finish)
            else:
                self._complete(
                    folder, contents, lambda: write_parts(folder / layout.DCP, contents.parts, self._ranks.group)
                )

    @property
    def failed(self) -> bool:
        """Whether a save that went on meanwhile went wrong: ``wait`` raises its error."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Wait for the save that still goes on, if there is one. Raises: SaveError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self, wait: bool = True) -> None:
        """Let go of the thread; what it still writes comes to its end, awaited here or not."""
        self._thread.shutdown(wait=wait)

    def _begun(self, folder: Path, contents: Contents) -> bool:
        """Whether there is something to write: a checkpoint of this step may be there already."""
        bytes_here = sum(part.tensor.numel() * part.tensor.element_size() for part in contents.parts)
        if contents.write_native is not None:
            bytes_here *= 2  # DeepSpeed's own copy holds the same
        needed = sum(self._ranks.together(lambda: bytes_here)) + _SPARE_BYTES

        def begin() -> bool:
            if layout.is_committed(folder):
                return False
            with self._saving(folder):
                if folder.exists():  # a save that did not end
                    shutil.rmtree(folder)
                folder.mkdir(parents=True)
                free = shutil.disk_usage(folder).free
                if free < needed:
                    raise SaveError(
                        f"disk full saving {folder.name}: it needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are "
                        f"free in {folder.parent}"
                    )
                (folder / layout.RNG).mkdir()
                write_file(folder / layout.STATE, layout.encode(contents.state))
                write_file(folder / layout.CONFIG, contents.config)
                save_file(dict(contents.method), folder / layout.METHOD, metadata=dict(contents.method_notes))
                (folder / layout.MODEL).mkdir()
                contents.write_model(folder / layout.MODEL)
            return True

        begun = self._clean_up_after(folder, lambda: self._ranks.on_first(begin))
        if begun and contents.write_native is not None:
            native = contents.write_native

            def write_native() -> None:
                with self._saving(folder):
                    native(folder / layout.DEEPSPEED)

            self._clean_up_after(folder, lambda: self._ranks.together(write_native))
        return begun

    def _complete(self, folder: Path, contents: Contents, write: Callable[[], None]) -> None:
        """Tensors, then what each rank has besides, then the list of all, then the mark."""
        self._guarded(folder, write)
        ranks = self._ranks

        def write_own() -> None:
            with self._saving(folder):
                save_file(dict(contents.generators), layout.rng_file(folder, ranks.rank))

        def list_own() -> dict[str, dict[str, Any]]:
            with self._saving(folder):
                mine = [name for name in layout.files_of(folder) if _writer(name, ranks.size) == ranks.rank]
                for name in mine:
                    sync(folder / name)
                return {name: layout.checksum(folder / name) for name in mine}

        def commit() -> None:
            with self._saving(folder):
                files = {name: entry for part in listed for name, entry in part.items()}
                text = layout.encode({"files": files})
                write_file(folder / layout.CHECKSUMS, text)
                sync_tree(folder, files=False)  # every file is synced by the rank that wrote it
                sync(folder.parent)
                write_file(folder / layout.COMMITTED, layout.committed_mark(contents.step, text))

        self._clean_up_after(folder, lambda: ranks.together(write_own))  # nobody lists before all have written
        listed = self._clean_up_after(folder, lambda: ranks.together(list_own))
        self._clean_up_after(folder, lambda: ranks.on_first(commit))
        if ranks.rank == 0:
            self._message(f"saved {folder.name}")
        ranks.on_first(lambda: self._remove_old(contents.step))

    def _remove_old(self, newest: int) -> None:
        """Keep the newest ``keep_last`` up to this one, and every ``keep_every_steps``-th; no save that did not end, nor a
        removal that did not. What cannot be removed (open files on NFS) is tried again after the next save."""
        settings = self._settings
        found = layout.found_steps(self._run_folder)
        committed = [step for step, path in found.items() if step <= newest and layout.is_committed(path)]
        for step in committed[settings.keep_last :]:
            if settings.keep_every_steps is not None and step % settings.keep_every_steps == 0:
                continue
            self._remove(layout.step_folder(self._run_folder, step))
        for step, folder in found.items():
            if step < newest and step not in committed:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        try:
            (folder / layout.COMMITTED).unlink(missing_ok=True)  # first: what is half removed is no checkpoint
            shutil.rmtree(folder)
        except OSError as error:
            self._message(f"{folder.name} cannot be removed yet ({error}); tried again after the next save")

    def _guarded(self, folder: Path, action: Callable[[], Any]) -> Any:
        """A collective of a library's, whose errors are every rank's already."""

        def act() -> Any:
            try:
                return action()
            except RankFailed as failed:
                raise self._as_save_error(folder, failed.error) from failed

        return self._clean_up_after(folder, act)

    def _clean_up_after(self, folder: Path, action: Callable[[], Any]) -> Any:
        """A save that fails leaves no part of itself; what was there before stays."""
        try:
            return action()
        except SaveError:
            if self._ranks.rank == 0 and not layout.is_committed(folder):
                shutil.rmtree(folder, ignore_errors=True)  # room again; what cannot be removed is an incomplete save
            raise

    def _saving(self, folder: Path) -> _Saving:
        return _Saving(folder, lambda error: self._as_save_error(folder, error))

    def _as_save_error(self, folder: Path, error: BaseException) -> BaseException:
        if isinstance(error, SaveError):
            return SaveError(f"{error}{self._intact(folder)}")
        system = writing_error(error, folder)
        if system is None:
            return error
        return SaveError(f"{save_error(folder, system)}{self._intact(folder)}")

    def _intact(self, folder: Path) -> str:
        for path in layout.found_steps(self._run_folder).values():
            if path != folder and layout.is_committed(path):
                return f"; {path.name} is intact"
        return "; there is no earlier checkpoint"


class _Saving:
    """Errors of writing become SaveErrors that name the checkpoint."""

    def __init__(self, folder: Path, convert: Callable[[BaseException], BaseException]) -> None:
        self._folder, self._convert = folder, convert

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        error = None if error is None else system_error(error, self._folder)  # DeepSpeed's torch.save
        if isinstance(error, (OSError, SafetensorError, SaveError)):
            converted = self._convert(error)
            if converted is not error:
                raise converted from error


def _writer(name: str, size: int) -> int:
    """The rank that lists a file: the one that wrote it, where the name tells (``__R_0.distcp``, ``rank-R.safetensors``)."""
    folder, _, file = name.rpartition("/")
    digits = ""
    if folder == layout.DCP and file.startswith("__"):
        digits = file.removeprefix("__").partition("_")[0]
    elif folder == layout.RNG:
        digits = file.removeprefix("rank-").removesuffix(".safetensors")
    return int(digits) if digits.isdigit() and int(digits) < size else 0
