#!/usr/bin/env python3
"""Emulated hosts: run a command on N hosts of q ranks, joined by a switch whose ports have a given rate.

    python benchmarks/hosts.py --hosts 4 --ranks-per-host 1 --rate 1gbit -- python train.py
    python benchmarks/hosts.py --probe     whether this machine can do it; says why not, with status 1
    python benchmarks/hosts.py --clean     remove what killed runs left behind; every run does so first

A host is a network namespace with a name and a /dev/shm of its own, 10.77.0.I on its interface eth0. All hosts share
the processors, memory, files and process ids of this machine. The bridge that joins them, and every host's interface,
send at the rate and no faster (tc's token bucket). It needs root and Linux's iproute2 and util-linux, and runs the
command with the mpirun beside this Python, or the one on PATH: MPICH's or Open MPI's.

At the end it says how many bytes left each host, by the counter of its interface. A host that sent faster than the
rate at any time makes the run fail: it did not go through the shaped wire. A command can read its host's counters in
/proc/net/dev, and what it runs on in BITRING_HOSTS; in Python: ``lab``, ``sent`` and ``Stream`` below.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

INTERFACE = "eth0"

HEADERS = 66
"""Bytes of a packet that are not TCP's payload: Ethernet 14, IP 20, TCP 20 and its timestamps 12."""

_AGENT = Path(__file__).resolve().with_name("hosts-enter")
_NAMESPACES = Path("/run/netns")
_NAME = re.compile(r"bitring-(\d+)-(\d+)-(\w+)")  # process, its start, host
_STREAM_PORT = 7077
_SAMPLE_SECONDS = 0.25
_GRACE_SECONDS = 3.0
_QUEUE_SECONDS = 0.02
_TOLERANCE = 1.01


class HostsError(Exception):
    """The hosts cannot be made; says why."""


class Lab(NamedTuple):
    """What a run's hosts are: ``rate`` in bytes per second, None for unshaped; ``burst`` bytes may go at once."""

    hosts: int
    ranks_per_host: int
    rate: float | None
    burst: int

    def least_seconds(self, nbytes: float) -> float:
        """How long it takes at least until ``nbytes`` bytes have left a host."""
        return max(0.0, nbytes - self.burst) / self.rate if self.rate else 0.0


class Sent(NamedTuple):
    """What left a host so far. A packet may be as long as 64 KiB: it is counted before it is cut for the wire."""

    nbytes: int
    packets: int

    @property
    def payload(self) -> int:
        """Bytes without headers, when all was TCP."""
        return self.nbytes - HEADERS * self.packets


def lab() -> Lab | None:
    """In a command: what it runs on; None when that is no emulated host."""
    described = os.environ.get("BITRING_HOSTS")
    return Lab(**json.loads(described)) if described else None


def host() -> int:
    """In a command: the number of its host, from 1."""
    return int(socket.gethostname().removeprefix("host"))


def sent() -> Sent:
    """In a command: what has left its host so far."""
    return _parse_counters(Path("/proc/net/dev").read_text(encoding="ascii"))


class Stream:
    """In a command: a plain TCP connection from one host to another, to be made by one process on each."""

    def __init__(self, sender: int, receiver: int, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        if host() == receiver:
            with socket.create_server((address(receiver), _STREAM_PORT)) as server:
                server.settimeout(seconds)
                self._socket, _ = server.accept()
        else:
            assert host() == sender
            while True:
                try:
                    self._socket = socket.create_connection((address(receiver), _STREAM_PORT), timeout=seconds)
                    break
                except ConnectionRefusedError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.01)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: memoryview) -> None:
        """Send all, and wait until the receiver has it."""
        self._socket.sendall(data)
        if self._socket.recv(1) != b"+":
            raise ConnectionError("the receiver has closed the stream")

    def receive(self, into: memoryview) -> None:
        """Receive as many bytes as ``into`` holds."""
        while into:
            count = self._socket.recv_into(into)
            if count == 0:
                raise ConnectionError("the sender has closed the stream")
            into = into[count:]
        self._socket.sendall(b"+")

    def exchange(self, data: memoryview, into: memoryview) -> list[threading.Thread]:
        """Send all, and receive as much as ``into`` holds: two threads, to be joined, that wait in the kernel."""

        def receive() -> None:
            if self._socket.recv_into(into, 0, socket.MSG_WAITALL) != len(into):
                raise ConnectionError("the other end has closed the stream")

        threads = [threading.Thread(target=receive), threading.Thread(target=self._socket.sendall, args=(data,))]
        for thread in threads:
            thread.start()
        return threads

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


def address(number: int) -> str:
    """The address of host ``number``, from 1."""
    return f"10.77.0.{number}"


def parse_rate(text: str) -> float | None:
    """Bytes a second of a rate such as "1gbit" or "200mbit"; None for "none". Raises ValueError."""
    if text == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", text)
    if not found or float(found[1]) == 0:
        raise ValueError(f'a rate is a number with kbit, mbit or gbit, such as 1gbit, or "none"; got {text!r}')
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]] / 8


def run(command: Sequence[str], *, hosts: int, ranks_per_host: int = 1, rate: float | None) -> int:
    """Run ``command`` on emulated hosts, and return its exit status; 1 when it was faster than the wire.

    ``rate`` is in bytes per second. Only from the main thread: it takes SIGINT, SIGTERM and SIGHUP, on which the
    command is ended, everything cleaned up, and 128 + the signal's number returned. Raises HostsError when
    there are none.
    """
    # Two milliseconds' worth: while all processors are busy, a timer may be that late. A packet of 64 KiB must fit.
    made = Lab(hosts, ranks_per_host, rate, max(round(2e-3 * (rate or 0)), 128 << 10))
    mpirun, environment = _mpirun(made)
    with _noting_signals() as signals, _network(made) as name:
        counters = _counters(name, hosts)
        # The hosts share this machine's cores, each of which a library would start a thread for.
        environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (hosts * ranks_per_host)))}
        environment |= {"BITRING_HOSTS": json.dumps(made._asdict()), "BITRING_HOSTS_RUN": name}
        begin = time.perf_counter()
        meter = Meter(made, counters)
        child = subprocess.Popen(
            [_AGENT, address(1), shlex.join([*mpirun, *command])],
            env=os.environ | environment,
            start_new_session=True,
        )
        while child.poll() is None and not signals:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_SAMPLE_SECONDS)
            meter.sample()
        if signals:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_SECONDS)
        _kill(_own(name))
        status = child.wait()
        print(meter.report(time.perf_counter() - begin), file=sys.stderr, flush=True)
        for file in counters:
            file.close()
    if signals:
        return 128 + signals[0]
    if status == 0 and (wrong := meter.faster_than_the_wire()):
        print(f"hosts.py: {wrong}", file=sys.stderr)
        return 1
    return 128 - status if status < 0 else status


def rerun(asked: argparse.Namespace) -> int:
    """Run this process's own command line on the hosts that ``add_options`` has asked for; its exit status."""
    try:
        return run([sys.executable, *sys.argv], hosts=asked.hosts, ranks_per_host=asked.ranks_per_host, rate=asked.rate)
    except HostsError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2


def probe() -> str | None:
    """Why there can be no emulated hosts here; None when there can."""
    try:
        _mpirun(Lab(2, 1, 1e6, 1 << 17))
        with _network(Lab(2, 1, 1e6, 1 << 17)) as name:
            environment = os.environ | {"BITRING_HOSTS_RUN": name}
            _checked(_AGENT, address(1), "test -e /proc/net/dev", env=environment)
            for file in _counters(name, 2):
                file.close()
    except HostsError as error:
        return str(error)
    return None


class Meter:
    """Watches what leaves the hosts while a command runs."""

    def __init__(self, made: Lab, counters: Sequence[IO[str]]) -> None:
        self._made = made
        self._counters = counters
        self._begin = time.perf_counter()  # of the last reading
        self._first = self._last = self._read()
        self._fastest = [0.0] * len(counters)  # bytes per second
        self._excess: str | None = None

    def _read(self) -> list[int]:
        found: list[int] = []
        for file in self._counters:
            file.seek(0)
            found.append(_parse_counters(file.read()).nbytes)
        return found

    def sample(self) -> None:
        """Compare with the last sample. What the clock shows is longer than what the counters saw."""
        begin = time.perf_counter()
        counted = self._read()
        seconds = time.perf_counter() - self._begin
        self._begin = begin
        for number, (before, after) in enumerate(zip(self._last, counted, strict=True)):
            nbytes = after - before
            if seconds > _SAMPLE_SECONDS / 2:
                self._fastest[number] = max(self._fastest[number], nbytes / seconds)
            if seconds * _TOLERANCE < self._made.least_seconds(nbytes):
                self._excess = (
                    f"{nbytes} bytes left host {number + 1} in {seconds:.3f} s, faster than the wire's "
                    f"{self._made.rate:.0f} bytes per second: they did not pass it, and no time measured here is right"
                )
        self._last = counted

    def faster_than_the_wire(self) -> str | None:
        """What was, in words; None when nothing was."""
        return self._excess

    def report(self, seconds: float) -> str:
        """A line for each host."""
        wire = f" (the wire's {self._made.rate / 1e6:.4g})" if self._made.rate else ""
        self.sample()
        return "\n".join(
            f"host {number}: {after - before} bytes left in {seconds:.3f} s, "
            f"at most {max(fastest, (after - before) / seconds) / 1e6:.4g} MB/s{wire}"
            for number, (before, after, fastest) in enumerate(
                zip(self._first, self._last, self._fastest, strict=True), start=1
            )
        )


def _parse_counters(table: str) -> Sent:
    line = next(line for line in table.splitlines() if line.lstrip().startswith(f"{INTERFACE}:"))
    fields = line.partition(":")[2].split()
    return Sent(int(fields[8]), int(fields[9]))


def _counters(name: str, hosts: int) -> list[IO[str]]:
    """/proc/net/dev of each host: once open, the file shows the namespace in which it was opened."""
    files: list[IO[str]] = []
    problems: list[str] = []

    def enter_and_open() -> None:
        setns = ctypes.CDLL(None, use_errno=True).setns
        for number in range(1, hosts + 1):
            with (_NAMESPACES / f"{name}-{number}").open("rb") as namespace:
                if setns(namespace.fileno(), 0) != 0:
                    problems.append(f"setns: {os.strerror(ctypes.get_errno())}")
                    return
            files.append(Path("/proc/thread-self/net/dev").open(encoding="ascii"))  # noqa: SIM115

    thread = threading.Thread(target=enter_and_open)  # it ends in another namespace than the process
    thread.start()
    thread.join()
    if problems:
        raise HostsError(problems[0])
    return files


def _mpirun(made: Lab) -> tuple[list[str], dict[str, str]]:
    """The mpirun command for the hosts, and what it wants in the environment."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise HostsError(f"no mpirun beside {sys.executable} nor on PATH; pip install mpich brings one")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    numbers = range(1, made.hosts + 1)
    ranks = made.hosts * made.ranks_per_host
    if "Open MPI" in version:
        places = ",".join(f"{address(number)}:{made.ranks_per_host}" for number in numbers)
        options = ["--prtemca", "plm_ssh_agent", str(_AGENT), "--prtemca", "prte_if_include", INTERFACE]
        options += ["--mca", "btl_tcp_if_include", INTERFACE, "--bind-to", "none", "--host", places, "-n", str(ranks)]
        path = f"{beside.parent}{os.pathsep}{os.environ.get('PATH', '')}"  # where it looks for its own daemon
        return [found, *options], {
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PATH": path,
        }
    places = ",".join(map(address, numbers))
    options = ["-launcher", "ssh", "-launcher-exec", str(_AGENT), "-iface", INTERFACE, "-hosts", places]
    options += ["-n", str(ranks), "-ppn", str(made.ranks_per_host)]
    return [found, *options], {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": INTERFACE}


@contextlib.contextmanager
def _noting_signals() -> Generator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP are only noted, so that they never cut short what makes and removes hosts."""
    came: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, lambda number, frame: came.append(number)) for kind in kinds]
    try:
        yield came
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


@contextlib.contextmanager
def _network(made: Lab) -> Generator[str]:
    """The hosts, until the end of the block; yields the run's name. Raises HostsError, having removed what was made."""
    clean()
    for program, package in {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}.items():
        if shutil.which(program) is None:
            raise HostsError(f"emulated hosts need the program {program}, of Debian's package {package}")
    name = f"bitring-{os.getpid()}-{_started(os.getpid())}"
    switch = f"{name}-switch"
    try:
        _checked("ip", "netns", "add", switch)
        _checked("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _checked("ip", "-n", switch, "link", "set", "switch", "up")
        for number in range(1, made.hosts + 1):
            ours, port = f"{name}-{number}", f"port{number}"
            _checked("ip", "netns", "add", ours)
            ends = ["name", INTERFACE, "netns", ours, "type", "veth", "peer", "name", port, "netns", switch]
            _checked("ip", "link", "add", *ends)
            _checked("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
            _checked("ip", "-n", ours, "address", "add", f"{address(number)}/24", "dev", INTERFACE)
            _checked("ip", "-n", ours, "link", "set", "lo", "up")
            _checked("ip", "-n", ours, "link", "set", INTERFACE, "up")
            if made.rate:
                _shape(ours, INTERFACE, made)
                _shape(switch, port, made)
        yield name
    finally:
        _remove(_own(name))


def _shape(namespace: str, interface: str, made: Lab) -> None:
    bits, burst, queue = f"{8 * (made.rate or 0):.0f}", f"{made.burst}", f"{_QUEUE_SECONDS * 1e3:.0f}ms"
    shape = ["tbf", "rate", bits, "burst", burst, "latency", queue]
    _checked("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *shape)


def _checked(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a command that cannot be interrupted from the terminal. Raises HostsError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=False, env=env)
    if done.returncode != 0:
        raise HostsError(f"{shlex.join(map(str, command))}: {done.stderr.strip() or f'status {done.returncode}'}")


def _own(name: str) -> list[str]:
    return [path.name for path in _NAMESPACES.glob(f"{name}-*")]


def clean() -> list[str]:
    """Remove the namespaces of runs that are no more, and end the processes in them. Returns the names."""
    if os.geteuid() != 0:
        raise HostsError("emulated hosts need root")
    found = {path.name: _NAME.fullmatch(path.name) for path in _NAMESPACES.glob("bitring-*")}
    dead = [name for name, match in found.items() if match and _started(int(match[1])) != int(match[2])]
    _remove(dead)
    return dead


def _started(process: int) -> int | None:
    """When a process started, in ticks since boot: with its number, a name that is never given twice. None: gone."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _kill(names: Sequence[str]) -> None:
    """End all processes in the namespaces; returns when they are gone."""
    until = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < until:
        pids: list[int] = []
        for name in names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            pids += map(int, listed.stdout.split())
        pids = [pid for pid in pids if not _is_zombie(pid)]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _is_zombie(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def _remove(names: Sequence[str]) -> None:
    _kill(names)
    for name in names:  # two starts may clean up the same leftovers at once
        subprocess.run(["ip", "netns", "del", name], capture_output=True, start_new_session=True, check=False)


def add_options(parser: argparse.ArgumentParser, hosts: int, rate: str) -> None:
    """The options that say which hosts there are."""
    parser.add_argument("--hosts", type=_count, default=hosts, help="how many hosts (%(default)s)")
    parser.add_argument("--ranks-per-host", type=_count, default=1, help="ranks on each (%(default)s)")
    parser.add_argument("--rate", type=_rate, default=rate, help='such as 1gbit, or "none" (%(default)s)')


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 250:
        raise argparse.ArgumentTypeError(f"expected 1 to 250; got {text!r}")
    return int(text)


def _rate(text: str) -> float | None:
    try:
        return parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="hosts.py", description="Run a command on emulated hosts.", usage="%(prog)s [options] -- COMMAND..."
    )
    add_options(parser, hosts=2, rate="1gbit")
    parser.add_argument("--probe", action="store_true", help="whether this machine can; says why not, with status 1")
    parser.add_argument("--clean", action="store_true", help="remove what killed runs left behind")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.probe:
        problem = probe()
        print(problem or "emulated hosts can be made here")
        return int(problem is not None)
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    if not command and not asked.clean:
        parser.error("expected a command after --")
    try:
        if asked.clean:
            print("\n".join(f"removed {name}" for name in clean()) or "nothing was left behind")
            return 0
        return run(command, hosts=asked.hosts, ranks_per_host=asked.ranks_per_host, rate=asked.rate)
    except HostsError as error:
        print(f"hosts.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(_main())
