"""A real Slurm on this host: munged, slurmctld and several slurmd on ports of their own, all below one folder.

Nothing outside the folder is read or written, and several clusters may stand side by side. Every process of a
cluster, also a rank that lost its slurmd, carries SLURM_CONF=<folder>/slurm.conf in its environment: that is how
`stop` finds them all.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
# Debian installs the daemons here, which is not on every user's PATH.
SBIN = "/usr/sbin"
# Below the ephemeral range, and clear of the ports that ranks derive from their job id (20000 to 29999).
PORTS = range(11000, 20000)
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if find_program(name) is None]


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=SBIN)


def free_ports(n: int) -> int:
    """First of `n` ports in a row that nobody listens on."""
    for _ in range(100):
        first = random.randrange(PORTS.start, PORTS.stop - n)
        held = [socket.socket() for _ in range(n)]
        try:
            for i, s in enumerate(held):
                s.bind(("127.0.0.1", first + i))
            return first
        except OSError:
            continue
        finally:
            for s in held:
                s.close()
    raise AssertionError(f"no {n} free ports in a row in {PORTS}")


def poll(condition: Callable[[], object], what: str, timeout_s: float, story: Callable[[], str] = lambda: "") -> None:
    """Wait until `condition` holds; the failure says what did not happen, and `story`."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} did not happen within {timeout_s:.0f} s\n{story()}"
        time.sleep(0.1)


def common_settings(munge_socket: Path) -> dict[str, object]:
    """slurm.conf of every controller here: no cgroups, no accounting, the user who runs the tests."""
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "SlurmctldHost": f"{socket.gethostname().split('.')[0]}(127.0.0.1)",
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={munge_socket}",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/pgid",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "EnforcePartLimits": "ALL",
    }


def write_conf(path: Path, settings: dict[str, object], lines: Iterable[str]) -> None:
    path.write_text("\n".join([*(f"{k}={v}" for k, v in settings.items()), *lines, ""]))


class Daemons:
    """Background programs that share one SLURM_CONF, and whatever they start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.env = {"SLURM_CONF": str(self.conf)}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: object) -> None:
        """In the foreground of a session of its own, so that Ctrl-C in the terminal does not reach it.

        `stop` ends it; should the tests be killed before that, the kernel does.
        """
        words = [find_program(str(word)) or str(word) for word in command]
        with open(self.folder / f"{name}.out", "ab") as out:
            self._started[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
            )

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")

    def run(self, *command: object, timeout_s: float = 30, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **self.env, **env},
            check=False,
        )

    def ask(self, *command: object) -> str:
        """Output of a command that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def processes(self) -> dict[int, str]:
        """Process id -> name of its node, "" for those of none (controller, munge)."""
        found = {}
        mark = f"SLURM_CONF={self.conf}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                if mark in variables and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found[int(entry.name)] = self._node_of(entry, variables)
            except OSError:
                continue
        return found

    def _node_of(self, entry: Path, variables: list[bytes]) -> str:
        for variable in variables:
            if variable.startswith(b"SLURMD_NODENAME="):
                return variable.partition(b"=")[2].decode()
        logs = (Path(os.readlink(fd)) for fd in (entry / "fd").iterdir())
        return next((log.stem for log in logs if log.parent == self.folder / "nodes"), "")

    def stop(self) -> None:
        """Kill everything; leaves no process, whatever state it is in."""
        end_s = time.monotonic() + 20
        while left := self.processes():
            assert time.monotonic() < end_s, f"cannot be killed: {left}"
            for pid in left:
                kill(pid)
            for process in self._started.values():
                process.poll()
            time.sleep(0.02)
        for process in self._started.values():
            process.wait(timeout=5)
        self._started.clear()


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Munge(Daemons):
    """A munged with a key of its own; one serves any number of controllers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.socket = folder / "munge.socket"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"socket": self.socket, "key-file": key, "pid-file": folder / "pid"}
        files |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        # --force: folders of tests are closed to other users, about which munged would complain and end.
        self.start("munged", "munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
        poll(self.socket.is_socket, "munged's socket", 10, lambda: self.output("munged"))


class Cluster(Daemons):
    """A controller and nodes node1 to nodeN of `cpus` CPUs each (more than there are, if need be)."""

    def __init__(self, folder: Path, munge: Munge, n_nodes: int, cpus: int = 2) -> None:
        super().__init__(folder)
        self.nodes = [f"node{i + 1}" for i in range(n_nodes)]
        port = free_ports(n_nodes + 1)
        for name in ("state", "nodes", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        settings = common_settings(munge.socket) | {
            "ClusterName": "tests",
            # A requeued job waits that long (two minutes by default). Slurm tries for 15 s to end what the job had on
            # its nodes, by its id, and would end the ranks of its next start.
            "AuthInfo": f"socket={munge.socket},cred_expire=25",
            "SlurmctldPort": port,
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool" / "%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "%n.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SlurmdLogFile": folder / "nodes" / "%n.log",
            "SlurmdParameters": "config_overrides",
            # Ranks take their port from the job id; another cluster on this host must have other ids.
            "FirstJobId": random.randrange(1000, 6_000_000),
            "JobRequeue": 1,
            "ReturnToService": 2,
            "SlurmdTimeout": 6,
            "TCPTimeout": 1,
            "MessageTimeout": 5,
            "KillWait": 5,
            "OverTimeLimit": 0,
            "MinJobAge": 3600,
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,defer",
        }
        names, ports = f"node[1-{n_nodes}]", f"[{port + 1}-{port + n_nodes}]"
        host = socket.gethostname().split(".")[0]
        write_conf(
            self.conf,
            settings,
            [
                f"NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs={cpus} State=UNKNOWN",
                "PartitionName=batch Nodes=ALL Default=YES MaxTime=60 State=UP",
            ],
        )
        self.start("slurmctld", "slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        def all_idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%N %T").stdout.split()
            return states[1::2] == ["idle"] * len(self.nodes)

        poll(all_idle, "all nodes idle", 40, lambda: self.story())

    def start_node(self, name: str, *wrapper: str) -> None:
        """Its slurmd, started by another program if given one: ("taskset", "-c", "0")."""
        self.start(name, *wrapper, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> int:
        """SIGKILL whatever runs on the node, as a power cut would; returns how many processes that were."""
        victims = [pid for pid, node in self.processes().items() if node == name]
        for pid in victims:
            kill(pid)
        self._started[name].wait(timeout=10)
        return len(victims)

    @contextmanager
    def confined(self, name: str) -> Iterator[None]:
        """The node's daemon, and all that it starts, on one core of this host."""
        self.kill_node(name)
        self.start_node(name, "taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))
        self.wait_for_nodes()
        try:
            yield
        finally:
            self.kill_node(name)
            self.start_node(name)
            self.wait_for_nodes()

    def settle(self) -> None:
        """Whatever a test has left: no job, and all nodes up."""
        for job in self.jobs():
            self.run("scancel", job)
        for node in self.nodes:
            if self._started[node].poll() is not None:
                self.start_node(node)
        self.wait_for_nodes()

    def ranks(self, verb: str, run: Path) -> dict[int, str]:
        """Process id -> node of the Pythons that run `verb` on a run folder, without the sruns around them."""
        found = {}
        for pid, node in self.processes().items():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "python" in words[0] and verb in words and str(run) in words:
                found[pid] = node
        return found

    def sbatch(self, *arguments: object, **env: str) -> int:
        """Submit; the job's id."""
        done = self.run("sbatch", "--parsable", *arguments, **env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.strip().split(";")[0])

    def state(self, job_id: int) -> str:
        return self.job(job_id)["JobState"]

    def job(self, job_id: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def jobs(self) -> list[int]:
        """Jobs that have not ended, in the order of their ids."""
        return sorted(int(job) for job in self.ask("squeue", "-h", "-o", "%A").split())

    def wait(self, job_id: int, timeout_s: float = 120) -> str:
        """Wait for the end of a job; its last state."""
        poll(lambda: self.state(job_id) in ENDED, f"end of job {job_id}", timeout_s, self.story)
        return self.state(job_id)

    def wait_for_all(self, timeout_s: float = 120) -> None:
        """Wait until no job is left, also none that a job has submitted."""
        poll(lambda: not self.jobs(), "end of all jobs", timeout_s, self.story)

    def story(self) -> str:
        """For a failing test: what Slurm thinks and what it logged."""
        shown = [self.run("squeue", "-l").stdout, self.run("sinfo", "-N", "-l").stdout]
        for name in ("slurmctld", *self.nodes):
            shown.append("\n".join([f"--- {name}", *self.output(name).splitlines()[-30:]]))
        return "\n".join(shown)
