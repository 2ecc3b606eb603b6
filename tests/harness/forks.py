"""Python programs that start immediately: each is a fork of one process that has imported torch.

A short training run spends most of its time in `import torch`: two to four seconds in every process. Here
one process, the server, imports it once. A test that wants `python 01_single_gpu/train.py …` or `torchrun …`
asks the server for a fork of itself, and the fork runs that script from its first line. The launchers are
the real ones: torchrun's agent, mp.spawn, compare_steps.py. But where they would start another Python, they
fork too: `Fork` replaces `subprocess.Popen`. Process groups, stores, files, signals and exit statuses are
real.

A fork hides two kinds of bugs. It does not show what importing does (a missing import, threads counted at
import). And it does not show what depends on the order of a set: all forks hash alike, and read PYTHON…
variables too late. Tests of these bugs start a real process: `start(…, real=True)` in helpers.py. A fork
ends as an interpreter does only with the variable TESTS_REAL_END; without it, the fork saves the half second
that this takes.

    python forks.py serve SOCKET          the server; ends when its standard input does
    python forks.py run python …          a client: stands in for `python`, on the PATH of a test
"""

import array
import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import linecache
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

SOCKET = "TESTS_FORK_SERVER"  # the environment variable that tells tests where the server listens
REAL_END = "TESTS_REAL_END"  # the environment variable with which a fork ends as an interpreter does
IMPORTS = "TESTS_IMPORTS"  # the environment variable that lists more modules for the server to import
TRACE = "TESTS_TRACE"  # the environment variable with the file to which `trace` writes
STACKS = signal.SIGUSR1  # makes a fork, and what it forks, print where each of its threads is
DEFAULTS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2)


def with_default_signals() -> None:
    """Undo what was inherited: a shell makes background jobs, and so their children, ignore Ctrl-C."""
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in DEFAULTS:
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python starts
        signal.signal(number, signal.SIG_IGN)


class Fork(subprocess.Popen):  # type: ignore[type-arg]
    """A Popen whose child is a fork of this process, if it is to run a Python script or torchrun.

    `preexec_fn` runs in the child once its files, folder and session are set up. Here it runs the script, and
    the child never gets to exec.
    """

    def __init__(self, args: Any, *rest: Any, env: Any = None, **options: Any):
        words = [os.fspath(word) for word in args] if isinstance(args, (list, tuple)) else []
        # torch.compile's workers get files to talk through, and are not our scripts.
        if words[:1] == [sys.executable] and script_in(words) and not options.get("pass_fds"):
            variables = dict(os.environ if env is None else env)
            options["preexec_fn"] = functools.partial(become, words, variables)
        super().__init__(args, *rest, env=env, **options)


def script_in(words: list[str]) -> list[str]:
    """The words of a `python …` command from the script, or `-m torch.distributed.run`, on; or nothing."""
    rest = [word for i, word in enumerate(words) if i and not (i == 1 and word == "-u")]
    return (
        rest if rest[:1] and (rest[0].endswith(".py") or rest[:2] == ["-m", "torch.distributed.run"]) else []
    )


PATH: list[str] = []  # sys.path and the names in sys.modules when the server was ready
MODULES: set[str] = set()
INSTALLED = (sys.prefix, sys.base_prefix)


def become(words: list[str], env: dict[str, str]) -> NoReturn:
    """In a fork: act as `python …`, until it ends."""
    status = 1
    try:
        with_default_signals()
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the parent waits until one of them is closed
        gc.enable()  # Popen has turned it off
        faulthandler.unregister(STACKS)  # or it would seem to be registered still, as in a launcher
        faulthandler.register(STACKS)  # for a test that finds this process, or its ranks, hanging
        # What the parent has created since it was the server does not belong to this process.
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # its temporary folders stay
        atexit._clear()
        sys.path[:] = PATH
        for name in set(sys.modules) - MODULES:
            if not (getattr(sys.modules[name], "__file__", "") or sys.prefix).startswith(INSTALLED):
                del sys.modules[name]  # the scripts' `common`, and their own modules
        os.environ.clear()
        os.environ.update(env)
        # New ones, of the kind that fits the new files: a terminal has no position.
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        wait_for_the_other_ranks()
        if TRACE in os.environ:
            trace(os.environ[TRACE])
        run(script_in(words))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1 if end.code else 0
        if end.code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        sys.last_traceback = error.__traceback__  # as Python does: the frames stay alive, too
        sys.excepthook(*sys.exc_info())
    # As much of an interpreter's end as is possible in a fork.
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # as in a real end, it changes nothing any more
        sys.excepthook(*sys.exc_info())
    finally:
        leave(status & 255)


def wait_for_the_other_ranks() -> None:
    """Under torchrun, which serves a store in a thread, wait until it has forked all ranks: see `spawn`."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    parent, end = os.getppid(), time.monotonic() + 60
    with contextlib.suppress(OSError):  # the parent has ended, or this is not Linux
        children = Path(f"/proc/{parent}/task/{parent}/children")
        while ranks > len(children.read_text().split()) and time.monotonic() < end:
            time.sleep(0.002)


def trace(to: str) -> None:
    """From now on, append to the file `to` each line of a script that this process reaches: for mutants.py.

    A line is written when it is first reached, so that no kill loses it: folder/file, a tab, its text. It has
    no line number, because a copy with something planted counts as the original.
    """
    file = os.open(to, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    names: dict[str, str] = {}
    seen: set[tuple[str, int]] = set()

    def in_script(frame: Any, event: str, argument: Any) -> Any:
        place = frame.f_code.co_filename, frame.f_lineno
        if place not in seen:
            seen.add(place)
            os.write(file, f"{names[place[0]]}\t{linecache.getline(*place).strip()}\n".encode())
        return in_script

    def anywhere(frame: Any, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        if path not in names:
            folder, name = Path(path).parts[-2:] if path.count("/") > 1 else ("", "")
            names[path] = f"{folder}/{name}" if folder == "common" or re.match(r"0\d_", folder) else ""
        return in_script(frame, event, argument) if names[path] else None

    threading.settrace(anywhere)
    sys.settrace(anywhere)


EXIT = os._exit


def leave(status: int) -> NoReturn:
    """End this process; with REAL_END, as an interpreter does, which gloo's threads may not survive."""
    if REAL_END in os.environ:
        ctypes.pythonapi.Py_Exit(status)
    EXIT(status)


def run(words: list[str]) -> None:
    import torch
    import torch.distributed.run

    # Otherwise, torch would keep the number from when it was imported.
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = ["torchrun", *words[2:]]
        torch.distributed.run.main()
    else:
        file = os.path.abspath(words[0])
        sys.path.insert(0, str(Path(file).resolve().parent))
        sys.argv = words
        # A script's objects live until the interpreter ends, as in a real Python. If a DDP object was deleted
        # earlier, and was the last to hold a group, it would wait for gloo's thread, which may need the GIL.
        script = types.ModuleType("__main__")
        script.__file__ = file
        sys.modules["__main__"] = script
        exec(compile(Path(file).read_bytes(), file, "exec"), script.__dict__)


def serve(path: str) -> None:
    """Import torch, then fork for each client until standard input ends."""
    sys.path.pop(0)  # the tests' folder
    subprocess.Popen = Fork  # type: ignore[misc]
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.nn
    import torch.distributed.run
    import torch.multiprocessing
    import torchvision.datasets
    import torchvision.models  # noqa: F401

    for name in os.environ.get(IMPORTS, "").split():
        importlib.import_module(name)
    torch.multiprocessing.spawn = spawn
    PATH.extend(sys.path)
    MODULES.update(sys.modules)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    gc.collect()
    gc.freeze()  # what all forks share stays shared
    signalled, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests end this process; a Ctrl-C for them does not
    jobs: dict[socket.socket, Fork] = {}
    try:
        answer(listener, signalled, jobs)
    finally:
        for job in jobs.values():
            job.kill()


def spawn(fn: Any, args: Any, nprocs: int, join: bool) -> Any:
    """Stands in for mp.spawn: the ranks are forks, which begin when all of them exist.

    The parent serves the ranks' store in a thread. A fork that is made while this thread answers an earlier
    rank would inherit the locks that the thread holds at that moment, and wait for them forever.
    """
    import torch.multiprocessing as mp

    gate = os.pipe()
    rank = functools.partial(behind, gate, fn)
    context = mp.start_processes(rank, args, nprocs, join=False, start_method="fork")
    for end in gate:
        os.close(end)
    while join and not context.join():
        pass
    return context


def behind(gate: tuple[int, int], fn: Any, *args: Any) -> None:
    """Call `fn` when the parent and all ranks have closed the write end of `gate`."""
    read, write = gate
    os.close(write)
    os.read(read, 1)
    os.close(read)
    os._exit = (
        leave  # multiprocessing will call this; a spawned rank is not a fork, and ends as an interpreter
    )
    fn(*args)


def answer(listener: socket.socket, wake: int, jobs: dict[socket.socket, Fork]) -> None:
    """Start jobs and say how they end, until standard input ends. An error with one client harms no other."""
    selector = selectors.DefaultSelector()
    for source in (listener, sys.stdin, wake):
        selector.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.settimeout(10)
                try:
                    jobs[connection] = job = begin(connection)
                    connection.sendall(f"{job.pid}\n".encode())
                    selector.register(connection, selectors.EVENT_READ)
                except (OSError, ValueError, subprocess.SubprocessError) as error:
                    print(f"fork server: {type(error).__name__}: {error}", file=sys.stderr)
                    if connection in jobs:
                        jobs.pop(connection).kill()
                    connection.close()
            elif key.fileobj is sys.stdin:
                return
            elif key.fileobj == wake:
                os.read(wake, 4096)
            elif isinstance(key.fileobj, socket.socket) and key.fileobj in jobs:
                jobs[key.fileobj].kill()  # its client is gone
                selector.unregister(key.fileobj)
        for connection, job in list(jobs.items()):
            if job.poll() is not None:
                with contextlib.suppress(OSError):  # its client is gone
                    connection.sendall(f"{job.returncode}\n".encode())
                with contextlib.suppress(KeyError):  # already done above
                    selector.unregister(connection)
                connection.close()
                del jobs[connection]


def begin(connection: socket.socket) -> Fork:
    """Start what a client asks for. It sends the request's length, with its three files, then the request."""
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    try:
        size, content = int(head), b""
        while len(content) < size:
            content += (new := connection.recv(size - len(content)))
            if not new:
                raise ConnectionError("a client was gone before it had sent its request")
        asked = json.loads(content)
        streams = dict(zip(("stdin", "stdout", "stderr"), files, strict=True))
        return Fork(asked["words"], cwd=asked["cwd"], env=asked["env"], start_new_session=True, **streams)
    finally:
        for file in files:
            os.close(file)


class Job:
    """A process that the server has started for this one, with the parts of Popen that the tests use."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str], files: list[int]):
        self.args, self.returncode, self.answer = words, None, b""
        self.socket = connect(os.environ[SOCKET])
        self.socket.settimeout(60)  # until it has started
        asked = json.dumps({"words": words, "cwd": str(cwd), "env": env}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
        self.socket.sendmsg([f"{len(asked):8}".encode()], rights)
        self.socket.sendall(asked)
        while b"\n" not in self.answer:
            self.read()
        self.pid = int(self.answer.partition(b"\n")[0])
        self.socket.settimeout(None)

    def read(self) -> None:
        self.answer += (new := self.socket.recv(64))
        if not new:
            raise RuntimeError("the fork server has ended; its standard error, above, may say why")

    def poll(self) -> int | None:
        with contextlib.suppress(TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Its status, as Popen gives it; raises TimeoutExpired."""
        if self.returncode is not None:
            return self.returncode
        end = time.monotonic() + (timeout if timeout is not None else 10**6)
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            while self.returncode is None and self.answer.count(b"\n") < 2:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutExpired(self.args, timeout or 0)
                self.read()
        if self.returncode is None:
            self.returncode = int(self.answer.split()[1])
            self.socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # as Popen does
            if self.poll() is None:
                os.kill(self.pid, number)


TimeoutExpired = subprocess.TimeoutExpired


def connect(path: str, seconds: float = 120) -> socket.socket:
    """A connection to the server, which may still be importing."""
    end = time.monotonic() + seconds
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > end:
                raise TimeoutError(f"the fork server does not answer at {path}") from None
            time.sleep(0.05)


def client(words: list[str]) -> NoReturn:
    """Stand in for `python …` or `torchrun …`: the same output, signals and status."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    words = [*torchrun, *words[1:]] if words[0] == "torchrun" else [sys.executable, *words[1:]]
    if not script_in(words):
        os.execv(sys.executable, words)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # until there is a job to pass them on to
    job = Job(words, Path.cwd(), dict(os.environ), [0, 1, 2])

    def hand_on(number: int, frame: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, number)

    for number in numbers:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    status = job.wait()
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL always has its default action
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 255)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[None]:
    """A server for this process and those that it starts; `folder`/bin has programs that use the server."""
    (folder / "bin").mkdir()
    for name in ("python", "torchrun"):
        program = folder / "bin" / name
        program.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -IS '{Path(__file__).resolve()}' run {name} \"$@\"\n"
        )
        program.chmod(0o755)
    os.environ[SOCKET] = str(folder / "socket")
    words = [sys.executable, __file__, "serve", os.environ[SOCKET]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, env=env, start_new_session=True)
    try:
        yield
    finally:
        try:
            process.communicate(timeout=30)  # closes its standard input
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        del os.environ[SOCKET]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        client(sys.argv[2:])
