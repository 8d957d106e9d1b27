"""A real Slurm of two nodes on this machine, without systemd: munged, slurmctld, two slurmd, and slurmdbd if asked.

By hand: python tests/slurm/cluster.py <folder>, which says what to export and runs until ctrl-C.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
ACCOUNTING_PACKAGES = f"{PACKAGES} slurmdbd mariadb-server"
NODES = ("node1", "node2")
GPUS = 4  # of each node; make-believe ones, which Slurm hands out and torch does not find

# No cgroups, no binding; quick turns for tests. Names of nodes do not resolve, as on some clusters.
SLURM_CONF = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
DefMemPerCPU=1000
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,requeue_delay=1
KillWait=3
MinJobAge=3600
SlurmdTimeout=10
SlurmctldTimeout=60
MessageTimeout=20
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
{accounting}
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=16000 Gres=gpu:{gpus}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=16000 Gres=gpu:{gpus}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[3]}
AccountingStoragePass={folder}/munge.sock
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[3]}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[4]}
StorageUser=slurm
StoragePass=mini
StorageLoc=slurm_acct_db
"""


def why_not(accounting: bool = False) -> str | None:
    """Why no cluster can be started here, and what would help; None where one can."""
    packages = ACCOUNTING_PACKAGES if accounting else PACKAGES
    programs = ["slurmctld", "slurmd", "sbatch", "munged", *(["slurmdbd", "mariadbd"] if accounting else [])]
    if missing := [name for name in programs if _program(name) is None]:
        return f"no {', '.join(missing)} here; on Debian or Ubuntu: apt-get install {packages}"
    return None if os.geteuid() == 0 else "Slurm's daemons are started as root, as in a container"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


class Cluster:
    """The daemons and their folder; a context that starts and ends them. Jobs find it by SLURM_CONF."""

    def __init__(self, folder: Path, accounting: bool = False):
        self.folder, self.accounting = folder, accounting
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.conf = folder / "etc" / "slurm.conf"

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for name in ("etc", "state", "gpus", "mysql", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        ports = _free_ports(5)
        values = {"folder": folder, "host": host, "ports": ports, "gpus": GPUS}
        accounting = ACCOUNTING.format(**values) if self.accounting else "AccountingStorageType=accounting_storage/none"
        self.conf.write_text(SLURM_CONF.format(accounting=accounting, **values))
        for index in range(GPUS):  # device files are all that Slurm asks for
            os.mknod(folder / "gpus" / f"gpu{index}", 0o20600, os.makedev(1, 3))
        (folder / "etc" / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=node[1-2] Name=gpu File={folder}/gpus/gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env\n"
        )
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        os.environ["SLURM_CONF"] = str(self.conf)
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={folder}/munge.{v}" for k, v in files.items()))
        _until(lambda: _works("munge", "-n", "-S", f"{folder}/munge.sock"), "munged")
        if self.accounting:
            self._start_accounting(values)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        _until(lambda: self.said("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], "the nodes")

    def _start_accounting(self, values: dict[str, object]) -> None:
        folder, data, client = self.folder, self.folder / "mysql", f"{self.folder}/mysql.sock"
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
        subprocess.run([*install, "--auth-root-authentication-method=socket"], check=True, capture_output=True)
        where = [f"--datadir={data}", f"--socket={client}", f"--pid-file={folder}/mysql.pid"]
        listen = ["--bind-address=127.0.0.1", f"--port={values['ports'][4]}"]  # type: ignore[index]
        limits = ["--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"]
        self._daemon("mariadbd", "--no-defaults", "--user=root", *where, *listen, *limits)
        ask = ["mariadb", "--no-defaults", "-S", client, "-e"]
        _until(lambda: _works(*ask, "select 1"), "mariadbd")
        users = "".join(
            f"create user 'slurm'@'{host}' identified by 'mini'; grant all on slurm_acct_db.* to 'slurm'@'{host}';"
            for host in ("127.0.0.1", "localhost")
        )
        subprocess.run([*ask, f"create database slurm_acct_db; {users}"], check=True)
        conf = folder / "etc" / "slurmdbd.conf"
        conf.write_text(SLURMDBD_CONF.format(**values))
        conf.chmod(0o600)
        self._daemon("slurmdbd", "-D")
        _until(lambda: _works("sacctmgr", "-n", "list", "cluster"), "slurmdbd")
        for words in ("cluster mini", "account test cluster=mini", "user root account=test cluster=mini"):
            subprocess.run(["sacctmgr", "-i", "add", *words.split()], check=True, capture_output=True)

    def start_controller(self) -> None:
        self._daemon("slurmctld", "-D", "-f", str(self.conf))
        _until(lambda: _works("scontrol", "ping"), "slurmctld")

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, "-f", str(self.conf), name=node)

    def restart_controller(self) -> None:
        self._end("slurmctld")  # which writes its state; killed, it would lose the last seconds
        self.start_controller()

    def kill_slurmd(self, node: str) -> None:
        """End a node's slurmd at once; its jobs run on, and nobody reports them."""
        self.daemons.pop(node).kill()

    def cut_power(self, node: str) -> None:
        """End a node's slurmd and all that runs on it at once, so that nobody reports it."""
        self.kill_slurmd(node)
        jobs = _of_jobs(self.conf, node)
        parents = {_parent(process) for process in jobs} - set(jobs)
        steps = [process for process in parents if _command(process).startswith("slurmstepd")]
        for process in [*steps, *jobs]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def said(self, *command: str) -> str:
        """What a command of Slurm's prints."""
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout

    def _daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        name = name or program
        with (self.folder / f"{name}.out").open("ab") as log:
            path = _program(program)
            assert path is not None
            command = [path, *arguments]
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            self.daemons[name] = subprocess.Popen(command, **options)  # type: ignore[call-overload]

    def _stop(self) -> None:
        if "slurmctld" in self.daemons:
            with_jobs = ["squeue", "-h", "-t", "R,CG,S,CF"]
            subprocess.run(["scancel", "--me"], capture_output=True, timeout=20)
            deadline = time.monotonic() + 10
            while self.said(*with_jobs) and time.monotonic() < deadline:
                time.sleep(0.1)
        for name in reversed(list(self.daemons)):
            self._end(name)
        for process_id in _of_jobs(self.conf):
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        os.environ.pop("SLURM_CONF", None)

    def _end(self, name: str) -> None:
        process = self.daemons.pop(name)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _of_jobs(conf: Path, node: str | None = None) -> list[int]:
    """The processes that jobs of this cluster (on this node) have started: their environment says so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_text(errors="replace").split("\0")
        except OSError:
            continue
        ours = f"SLURM_CONF={conf}" in variables and any(each.startswith("SLURM_JOB_ID=") for each in variables)
        if ours and (node is None or f"SLURMD_NODENAME={node}" in variables):
            found.append(int(path.parent.name))
    return [process for process in found if process != os.getpid()]


def _command(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text(errors="replace")


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def _until(reached: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come up in {seconds} s")
        time.sleep(0.1)


def _end(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    with Cluster(Path(sys.argv[1]), accounting="--accounting" in sys.argv) as cluster, suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        signal.pause()
