"""Commands on the GPUs of one machine, as many at once as there are GPUs for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: by which it is told.
        command: its arguments.
        log: what it prints goes here.
        folder: where it runs.
        gpus: how many it takes; fewer where there are not so many.
    """

    name: str
    command: Sequence[str]
    log: Path
    folder: Path
    gpus: int = 1


def run_jobs(jobs: Sequence[Job], gpus: Sequence[str], ended: Callable[[Job, int, float], None]) -> None:
    """Runs jobs in order, each on GPUs of its own; one after the other on the CPU where there are none.

    Ends those that run where it is itself ended.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them.
        ended: called with each job as it ends, its exit code and its seconds.
    """
    # What schedulers send; the jobs end as well, then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    waiting, free = list(jobs), list(gpus)
    running: list[tuple[Job, subprocess.Popen[bytes], list[str], float]] = []
    try:
        while waiting or running:
            while waiting and (min(waiting[0].gpus, len(gpus)) <= len(free) if gpus else not running):
                job = waiting.pop(0)
                count = min(job.gpus, len(gpus))
                own, free = free[:count], free[count:]
                print(f"{job.name}: begins" + (f" on {','.join(own)}" if own else ""), flush=True)
                running.append((job, _start(job, own, len(gpus)), own, time.monotonic()))
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                job, process, own, start = entry
                running.remove(entry)
                free += own
                seconds = time.monotonic() - start
                print(f"{job.name}: exit code {process.returncode} after {seconds:.0f} s", flush=True)
                ended(job, process.returncode, seconds)
            time.sleep(_POLL_S)
    finally:
        for _, process, _, _ in running:
            process.terminate()
        for _, process, _, _ in running:
            process.wait()


def _start(job: Job, gpus: Sequence[str], of: int) -> subprocess.Popen[bytes]:
    # The job runs elsewhere, on this repository's code.
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // max(1, of))))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(job.command, cwd=job.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def last_line(log: Path) -> str:
    """What a job said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was said"
