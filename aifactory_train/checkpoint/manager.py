"""Folders of checkpoints: what has no COMMIT does not exist.

    checkpoints/step-00000100.tmp/    being written; removed at the next start
    checkpoints/step-00000100/        COMMIT (JSON: sizes, sha256 of blocks, model), .metadata, __<rank>_0.distcp

A save is staged by the training thread and written by another one; rank 0 commits when all ranks are done.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.checkpoint.blocks import OtherBytes, sums_of, verify_blocks
from aifactory_train.checkpoint.dcp import Stager, State, read_tensors, write_tensors
from aifactory_train.errors import AifactoryError, CheckpointError, StorageError, storage_errors
from aifactory_train.rundir import COMMIT, committed_steps, fsync_folder, step_folder, write_atomic

FORMAT = 2  # of COMMIT and of the files that it lists; 1 had pickled tensors and one sum for each file
METADATA = ".metadata"  # which tensor lies where: torch.distributed.checkpoint writes it


@dataclass(frozen=True)
class Commit:
    """What COMMIT says. `files`: name -> [bytes, sha256 of each block]. `model`: the recipe's model section."""

    step: int
    tokens: int
    world_size: int
    model: dict[str, Any]
    files: dict[str, list[Any]]
    format: int = FORMAT

    @property
    def n_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def read_commit(folder: Path, step: int) -> Commit:
    path = step_folder(folder, step) / COMMIT
    try:
        said = dict(json.loads(path.read_text()))
        found = said.get("format", 1)  # format 1 did not say so
        # Another one may have other keys.
        commit = Commit(**said) if found == FORMAT else None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"COMMIT of step {step} cannot be read: {error}", where=str(path), do=_drop(folder, step)
        ) from None
    if commit is None:
        age = "an older" if isinstance(found, int) and found < FORMAT else "a newer"
        raise CheckpointError(
            f"COMMIT of step {step} was written by {age} version: it has format {found}, this version reads {FORMAT}",
            where=str(path),
            do="go on with the version of aifactory-train that wrote it, or start anew: --run another folder",
        )
    return commit


def check_model(commit: Commit, model: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint of another model; names every field that differs."""
    # With adapters the weights below them are not in the checkpoint, so they must be those it was trained on.
    ignored = ("init_std",) if model.get("lora") else ("init_std", "init_from")
    names = [k for k in sorted({*commit.model, *model}) if k not in ignored and commit.model.get(k) != model.get(k)]
    if names:
        shown = "; ".join(f"{k}: checkpoint {commit.model.get(k)!r}, recipe {model.get(k)!r}" for k in names)
        raise CheckpointError(
            f"the checkpoint is of another model: {shown}",
            where=str(step_folder(folder, commit.step)),
            do="take the recipe that made it, or another run folder: --run RUN",
        )


def verify_files(folder: Path, commit: Commit) -> None:
    """Check size and sha256 of all files. Raises CheckpointError naming the file."""
    verify_sizes(folder, commit)
    verify_bytes(folder, commit, [(name, i) for name, (_, sums) in commit.files.items() for i in range(len(sums))])


def verify_sizes(folder: Path, commit: Commit) -> None:
    for name, (size, _) in sorted(commit.files.items()):
        path = step_folder(folder, commit.step) / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, COMMIT says {size}"
            raise CheckpointError(f"checkpoint file {name} {what}", where=str(path), do=_drop(folder, commit.step))


def verify_bytes(folder: Path, commit: Commit, blocks: Sequence[tuple[str, int]]) -> None:
    """Check some blocks, each as (name of the file, number)."""
    by_file: dict[str, list[int]] = {}
    for name, block in blocks:
        by_file.setdefault(name, []).append(block)
    with _damage(folder, commit):
        for name, numbers in by_file.items():
            verify_blocks(step_folder(folder, commit.step) / name, numbers, commit.files[name][1])


@contextmanager
def _damage(folder: Path, commit: Commit, on_every_rank: bool = False) -> Iterator[None]:
    try:
        yield
    except OtherBytes as error:
        path = Path(str(error))
        damage = CheckpointError(
            f"checkpoint file {path.name} has other bytes than when it was committed (sha256 differs)",
            where=str(path),
            do=_drop(folder, commit.step),
        )
        damage.on_every_rank = on_every_rank
        raise damage from None


def _drop(folder: Path, step: int) -> str:
    older = [s for s in committed_steps(folder) if s < step]
    then = f"resumes at step {older[-1]}" if older else "starts from step 0"
    return f"mv {step_folder(folder, step)} elsewhere; the next launch {then}"


class CheckpointManager:
    """Saves and loads by step. All methods are collective over the run's ranks.

    Args:
        folder: checkpoints/ of the run.
        keep: how many commits stay; older ones are removed after each commit.
        asynchronous: write in a thread while training goes on.
        device: of this rank; the writing thread works on it.
        on_commit: called on rank 0 with (commit, seconds of staging and writing) after each commit.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        asynchronous: bool,
        device: torch.device,
        on_commit: Callable[[Commit, float], None] | None = None,
    ) -> None:
        self.folder, self.keep, self.asynchronous, self.on_commit = folder, keep, asynchronous, on_commit
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # A group of its own: the writing thread talks here while the training thread talks elsewhere.
        self._group = dist.new_group(backend="gloo")
        self._stager = Stager()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._began_s = 0.0
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("step-*"):
                if stale.suffix == ".tmp" or not (stale / COMMIT).exists():
                    shutil.rmtree(stale)
        dist.barrier(group=self._group)

    def latest(self) -> Commit | None:
        """The newest commit, chosen by rank 0 for all."""

        def look() -> Commit | None:
            steps = committed_steps(self.folder)
            return read_commit(self.folder, steps[-1]) if steps else None

        return self.together(lambda: look() if self.rank == 0 else None)[0]

    def check(self, commit: Commit, model: dict[str, Any]) -> None:
        """Verify that the commit is of this model, and what can be known before its tensors are read."""

        def check() -> None:
            check_model(commit, model, self.folder)
            verify_sizes(self.folder, commit)
            # Before it is unpickled.
            verify_bytes(self.folder, commit, [(METADATA, i) for i in range(len(commit.files[METADATA][1]))])

        self.together(lambda: check() if self.rank == 0 else None)

    def load(self, commit: Commit, state: State) -> None:
        """Fill `state` in place from a commit that `check` has passed.

        Raises CheckpointError where a file has other bytes than were committed, also such as no rank needs.
        """
        with _damage(self.folder, commit, on_every_rank=True):
            seen = read_tensors(state, step_folder(self.folder, commit.step), self._group, commit.files)
        left = {(name, block) for name, (_, sums) in commit.files.items() for block in range(len(sums))}
        for of_rank in self.together(lambda: seen):
            left -= {(name, block) for name, blocks in of_rank.items() for block in blocks}
        self.together(lambda: verify_bytes(self.folder, commit, sorted(left)[self.rank :: self.world_size]))

    def save(self, step: int, tokens: int, state: State, model: dict[str, Any]) -> None:
        """Stage now, write and commit later (or now, if not asynchronous).

        If the disk refused the save before, this one is written at once in its place, so that the newer state is
        kept if there is room by now; if not, StorageError.
        """
        failed = False
        try:
            self.wait()
        except StorageError:
            failed = True  # on all ranks alike: `together` and DCP raise everywhere
        self._began_s = time.monotonic()
        staged = self._stager.stage(state) if self.asynchronous else state
        self._thread = threading.Thread(
            target=self._write, args=(step, tokens, staged, model), name="checkpoint", daemon=True
        )
        self._thread.start()
        if failed or not self.asynchronous:
            self.wait()

    def under_way_s(self) -> float | None:
        """For how long the save in the background has been at it on this rank; None if there is none."""
        under_way = self._thread is not None and self._thread.is_alive()
        return time.monotonic() - self._began_s if under_way else None

    def wait(self) -> None:
        """Until the save under way is committed. Raises StorageError where the disk refused it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tokens: int, state: State, model: dict[str, Any]) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread begins on device 0, and would wait for that one's copies
        final = step_folder(self.folder, step)
        tmp = final.with_name(final.name + ".tmp")
        last = committed_steps(self.folder)[-1:]
        kept = f"; step {last[0]} is safe and the next launch resumes there" if last else ""
        try:
            with storage_errors(f"saving step {step}", final, f"free some space and launch again{kept}"):
                written = write_tensors(state, tmp, self._group)
                if self.rank == 0:
                    written |= {METADATA: [(tmp / METADATA).stat().st_size, sums_of(tmp / METADATA)]}
                files = self.together(lambda: written)
                commit = Commit(step, tokens, self.world_size, model, {k: v for part in files for k, v in part.items()})
                self.together(lambda: self._commit(commit, tmp, final) if self.rank == 0 else None)
                if self.rank == 0 and self.on_commit is not None:
                    self.on_commit(commit, time.monotonic() - self._began_s)
        except BaseException as error:
            if isinstance(error, AifactoryError):
                error.on_every_rank = True
            self._error = error  # raised by the training thread at its next save or wait
            if self.rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)  # a full disk gets its space back

    def _commit(self, commit: Commit, tmp: Path, final: Path) -> None:
        write_atomic(tmp / COMMIT, json.dumps(vars(commit), indent=1))
        tmp.rename(final)
        fsync_folder(self.folder)
        for step in committed_steps(self.folder)[: -self.keep]:
            place = step_folder(self.folder, step)
            # Without COMMIT first, so that a kill half-way leaves no commit with missing files.
            (place / COMMIT).unlink()
            shutil.rmtree(place)

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Do `work` on every rank; if it failed on one, raise that on all. Returns the results by rank."""
        try:
            mine: Any = work()
        except (AifactoryError, OSError) as error:
            mine = error
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine, group=self._group)
        for result in everyone:
            if isinstance(result, AifactoryError):
                result.on_every_rank = True
            if isinstance(result, BaseException):
                raise result
        return everyone
