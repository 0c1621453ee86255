"""Every error that a user can cause, and the exit code of each.

AifactoryError            (exit code)
├── UserError             2   something the user can mend: the message says what, where, do
│   ├── RecipeError           the recipe or an override
│   ├── MachineError          the machine file
│   ├── PlanError             recipe and machine do not fit together
│   ├── DataError             text, tokenizer, prepared shards
│   ├── RunFolderError        the run folder belongs to something else
│   ├── CheckpointError       a checkpoint is damaged or of another model
│   └── StorageError          disk full, no permission
├── RendezvousError       3   ranks did not find each other in time
├── TrainingFault         4   the run itself went wrong (loss not finite, a rank died)
├── PreflightFault        5   a node is not fit to train on
└── Interrupted         143   asked to stop by a signal; everything up to the last step is saved

Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class AifactoryError(Exception):
    """Base of all errors that are printed without a traceback.

    Args:
        what: what is wrong, with both values where two disagree.
        where: file and key, or rank and axis; "" when `what` already names it.
        do: the exact thing to type or change.
    """

    exit_code = 1
    on_every_rank = False  # True where all ranks raise the same, so that one of them prints it

    def __init__(self, what: str, *, where: str = "", do: str = "") -> None:
        self.what, self.where, self.do = what, where, do
        super().__init__(self.render())

    def render(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.do:
            lines.append(f"  do:    {self.do}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:  # so that a worker process can hand it to its parent
        return _rebuild, (type(self), self.what, self.where, self.do)


def _rebuild(cls: type[AifactoryError], what: str, where: str, do: str) -> AifactoryError:
    return cls(what, where=where, do=do)


class UserError(AifactoryError):
    exit_code = 2


class RecipeError(UserError):
    pass


class MachineError(UserError):
    pass


class PlanError(UserError):
    pass


class DataError(UserError):
    pass


class RunFolderError(UserError):
    pass


class CheckpointError(UserError):
    pass


class StorageError(UserError):
    pass


class RendezvousError(AifactoryError):
    exit_code = 3


class TrainingFault(AifactoryError):
    exit_code = 4


class PreflightFault(AifactoryError):
    exit_code = 5


class Interrupted(AifactoryError):
    exit_code = 143


_STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


def storage_fault(error: BaseException) -> OSError | None:
    """The disk error inside `error` or its causes (DCP wraps one per rank), if there is one."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        e = queue.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, OSError) and e.errno in _STORAGE:
            return e
        queue += [e.__cause__, e.__context__]
        for arg in (*e.args, *getattr(e, "failures", {}).values()):
            inner = arg[0] if isinstance(arg, tuple) and arg else arg
            if isinstance(inner, BaseException):
                queue.append(inner)
    return None


@contextmanager
def storage_errors(doing: str, path: Path, do: str) -> Iterator[None]:
    """Turn "disk full", "quota", "no permission" and "is a folder" under `path` into a StorageError."""
    try:
        yield
    except AifactoryError:
        raise
    except Exception as error:
        fault = storage_fault(error)
        if fault is None:
            raise
        raise StorageError(f"{fault.strerror} while {doing}", where=str(path), do=do) from None
