"""What each rank runs: join, build, train, leave. A rank that fails leaves at once, so that none can hang."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from aifactory_train.errors import AifactoryError, Interrupted, TrainingFault
from aifactory_train.faults.stopflag import StopFlag
from aifactory_train.rundir import RunDir, log_event
from aifactory_train.train.loop import train
from aifactory_train.train.ranks import find_ranks
from aifactory_train.train.setup import Run, build_run

# What gloo and NCCL say when the process at the other end is gone.
_PEER_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Connection refused|remote process exited|NCCL.*abort"
)


def start(root: Path, stop_flag: StopFlag, bar_columns: int, timeout_s: float) -> int:
    """Exit code of this rank: 0, or that of the error, which has been printed.

    Every way out but success is `os._exit`: interpreter shutdown would wait for threads and process groups
    whose other ends may be gone.
    """
    rank, run = 0, None
    try:
        ranks = find_ranks(timeout_s)
        rank = ranks.rank
        run = build_run(root, ranks, stop_flag, bar_columns, timeout_s)
        train(run)
        run.close()
        dist.destroy_process_group()
        return 0
    except AifactoryError as error:
        code = _report(error, rank, run, root)
        if error.on_every_rank:
            _wait_for_all(run)
    except RuntimeError as error:
        if not _PEER_LOST.search(str(error)):
            traceback.print_exc()
            code = 1
        else:
            lost = TrainingFault(
                f"another rank went away: {str(error).splitlines()[0][:200]}",
                where=f"rank {rank}",
                do="look above for the first error; launch again: it resumes at the last commit",
            )
            code = _report(lost, rank, run, root)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_all(run: Run | None) -> None:
    """The first rank to leave makes srun or mpirun kill the others: none goes before rank 0 has reported."""
    if run is not None:
        run.close()
    if dist.is_initialized():
        dist.barrier(group=dist.new_group(backend="gloo"))


def _report(error: AifactoryError, rank: int, run: Run | None, root: Path) -> int:
    """Print once where all ranks have the same error, else from each rank that has it."""
    if rank == 0 or not error.on_every_rank:
        prefix = "" if rank == 0 else f"[rank {rank}] "
        print(f"{prefix}{error.render()}", file=sys.stderr, flush=True)
    # A fault before there is a Run is told to the chain of jobs too, where the folder is one of a run.
    if rank == 0 and not isinstance(error, Interrupted) and (run is not None or RunDir(root).plan.exists()):
        try:
            log_event(RunDir(root), "fault", message=error.what)
        except AifactoryError as disk:
            print(disk.render(), file=sys.stderr)
    return error.exit_code
