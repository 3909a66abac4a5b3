"""One training by several processes, as torchrun starts them: what they agree on, and how their end is told.

`python -m core.training.distributed` is torchrun, with one line in place of its report when a process fails. Every
process reads the config, the data and the saved state for itself, from a folder that all see; the first one, the
leader, alone claims the run, writes and speaks. DDP and FSDP are in parallel.py; a single process touches none of this.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from core.errors import Interrupted, UserError, run_command

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

T = TypeVar("T")
LEADER_WORKS = timedelta(days=1)  # samples of volumes take long; when the leader dies, torchrun ends the others
GRACE = timedelta(seconds=10)  # for the leader to be the one who tells of an error that all meet
BEREAVED_SECONDS = 15.0  # for torchrun to end this process when another one has died
SAVING_SECONDS = 600  # after Ctrl-C, before torchrun kills


class Ranks:
    """The processes of a job as one of them sees them. This one is alone: everything is agreed, nobody waits."""

    rank, count = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that claims, writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; the same answer in all. Every process must ask."""
        return flag

    def told(self, value: T) -> T:
        """The leader's `value`, in all processes. Every process must ask."""
        return value

    def wait(self) -> None:
        """Return when every process has come here."""

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader runs the block before the others do, who find what it made: phantoms, the cache of images."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def command(self, module: str) -> str:
        """The command line that runs `module` as this job does."""
        return f"python -m {module}"


ALONE = Ranks()


class Job(Ranks):
    """This process and the others of torchrun's job, by the environment that torchrun gives.

    Tensors on a GPU go through nccl, those on a CPU through gloo. What is agreed goes through a gloo group of its own,
    which outwaits the leader's longest work.
    """

    def __init__(self) -> None:
        try:
            self.store, self.rank, self.count = next(dist.rendezvous("env://"))
            dist.init_process_group(store=dist.PrefixStore("group", self.store), rank=self.rank, world_size=self.count)
        except (ValueError, dist.DistError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise UserError(f"the processes of this job cannot meet; start them with torchrun ({reason})") from None
        group = dist.new_group(backend="gloo", timeout=LEADER_WORKS)
        self.control = group if isinstance(group, dist.ProcessGroup) else None  # no member: not so of a group of all
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)  # what "auto" and "cuda" mean from now on

    def any(self, flag: bool) -> bool:
        """See Ranks."""
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags.item())

    def told(self, value: T) -> T:
        """See Ranks."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def wait(self) -> None:
        """See Ranks."""
        dist.monitored_barrier(self.control, LEADER_WORKS)

    def command(self, module: str) -> str:
        """See Ranks; what other machines were told of each other is not known here."""
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        arguments = distributed_command(module, os.environ.get("LOCAL_WORLD_SIZE", str(self.count)))[1:]
        if machines > 1:
            arguments[2:2] = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT"]
        return " ".join(["python", *arguments])

    def check_device(self, device: torch.device) -> None:
        """UserError where this process has no GPU of its own."""
        if device.type != "cuda":
            return
        local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device.index is not None:
            raise UserError(f'experiment.device "{device}" is one GPU for {self.count} processes; choose auto or cuda')
        if local >= visible:
            raise UserError(f"process {local + 1} of this machine has no GPU, it has {visible}; start at most "
                            f"--nproc-per-node {visible}")

    def reports(self) -> bool:
        """Whether this process is the first to tell of an error; the leader is given time to be it."""
        try:
            if not self.leads:
                with suppress(dist.DistStoreError):  # the leader is silent: it may be well
                    self.store.wait(["reported"], GRACE)
            return self.store.add("reported", 1) == 1
        except dist.DistNetworkError:
            return False  # the others are gone

    @property
    def name(self) -> str:
        """rank 1 of 4 on host."""
        return f"rank {self.rank} of {self.count} on {socket.gethostname()}"


@contextmanager
def join() -> Iterator[Ranks]:
    """The job that torchrun started this process for, or ALONE; of an error that all processes meet one speaks.

    The others end with the same exit status in silence, as do those that lose their peers while torchrun ends them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    job = Job()
    try:
        yield job
    except UserError as error:
        if not job.reports():
            raise SystemExit(2) from None
        raise error if job.leads else UserError(f"{job.name}: {error}") from None
    except (Interrupted, KeyboardInterrupt):
        if not job.leads:
            raise SystemExit(130) from None
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        time.sleep(BEREAVED_SECONDS)
        print(f"error: {job.name} was left by another process of the job, whose machine says why", file=sys.stderr)
        raise SystemExit(1) from None
    dist.destroy_process_group()


def run_rank(main: Callable[[], None]) -> None:
    """run_command for a command that may be a process of torchrun's job, which learns what ended it unexpectedly.

    Such a process ends without the interpreter's own end: a thread of gloo's that still holds a tensor of the last
    collective may then abort it (PyTorch pull request 179291), and torchrun the job with it.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        run_command(main)
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    status: int | str | None = 1
    try:
        run_command(record(main))
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:  # noqa: BLE001  the interpreter would print it in the end that is left out
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def distributed_command(module: str, processes: int | str, *arguments: str) -> list[str]:
    """The command that runs `module` in so many processes of this machine ("gpu": one for each GPU).

    Its exit status is the module's, 1 where a process was killed; of what went wrong one line stands on stderr.
    """
    return [sys.executable, "-m", "core.training.distributed", "--nproc-per-node", str(processes), "-m", module,
            *arguments]


def tell_failure(failed: ChildFailedError) -> int:
    """Say in one line which process of this machine ended the job and why, if it could not; returns the exit status.

    Processes that torchrun ended itself (SIGTERM) are not to blame.
    """
    rank, failure = min(failed.failures.items(), key=lambda one: (one[1].exitcode == -signal.SIGTERM, one[1].timestamp))
    if failure.exitcode not in (1, 2, 130):
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
        hint = " (memory may have run out)" if failure.exitcode == -signal.SIGKILL else ""
        print(f"error: rank {rank} (process {failure.pid} on {socket.gethostname()}) {how}{hint}; the others were "
              "stopped, and the same command goes on from what was saved", file=sys.stderr)
    elif failure.exitcode == 1 and isinstance(failure.message, dict):  # unexpected: its traceback stands above
        print(f"error: rank {rank} (process {failure.pid} on {socket.gethostname()}) failed: "
              f"{failure.message['message'].splitlines()[0]}", file=sys.stderr)
    return max(failure.exitcode, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """torchrun, with what ends a job said in one line."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    try:
        run(parse_args(arguments))
    except ChildFailedError as failed:
        sys.exit(tell_failure(failed))
    except ValueError as error:  # of what was asked, such as --nproc-per-node gpu where there is none
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except SignalException:
        sys.exit(130)  # the leader has said how to go on


if __name__ == "__main__":
    main()
