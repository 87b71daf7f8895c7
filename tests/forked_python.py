"""A Python whose libraries are imported already, for tests that start many: a server imports them and forks each time.

`forked_python(*modules)` gives a program that is called as python is, with -c, -m or a file. Every call is a process
of its own, as fresh as the imports leave it; what python's command line knows beyond that goes to the real one. It is
not for tests of what is imported, of memory, of signals, or of a setting that a library reads when it is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

CLIENT = """#!{python} -IS
import os, sys
python, arguments = {python!r}, sys.argv[1:]
known = arguments[2:] if arguments[:2] == ["-W", "ignore"] else arguments
if not known or (known[0].startswith("-") and known[0] not in ("-c", "-m")):
    os.execv(python, [python, *arguments])
import json, socket
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    job = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(job).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(job)
    answer = server.recv(16)
status = int(answer or b"1")
if status < 0:
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def forked_python(*modules: str) -> Iterator[str]:
    """Yield the path of a python that has imported `modules`. They are imported at the first call."""
    with tempfile.TemporaryDirectory(prefix="python-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address = f"{folder}/socket"
        listener.bind(address)
        listener.listen(64)
        program = Path(folder, "python")
        program.write_text(CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        command = [sys.executable, __file__, str(listener.fileno()), *modules]
        with subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE) as server:
            yield str(program)
            server.stdin.close()  # type: ignore[union-attr]  # the server's sign to end


def serve(listener: socket.socket, modules: list[str]) -> list[str]:
    """Fork for every call; return the program's arguments in a fork, nothing at the end."""
    ready = False
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if listener not in readable:
            return []
        connection, _ = listener.accept()
        if not ready:
            for module in modules:
                importlib.import_module(module)
            gc.collect()
            gc.freeze()
            ready = True
        head, streams, _, _ = socket.recv_fds(connection, 8, 3)
        if os.fork() == 0:
            with contextlib.closing(listener):
                job = _read(connection, int.from_bytes(head, "little"))
            if (child := os.fork()) == 0:
                connection.close()
                return _become(streams, *json.loads(job))
            for stream in (0, 1, 2, *streams):
                os.close(stream)
            _watch(child, connection)
        connection.close()
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # what has ended since the last call
                pass


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    return data


def _watch(child: int, connection: socket.socket) -> None:
    """Tell the caller how the child ends; end it when the caller is gone."""
    ended = os.pidfd_open(child)
    readable, _, _ = select.select([ended, connection], [], [])
    if ended not in readable:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(str(status).encode())
    os._exit(0)


def _become(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> list[str]:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def run(arguments: list[str]) -> None:
    """Run a program as python does, and end."""
    code = 0
    try:
        _run(arguments)
    except SystemExit as left:
        if left.code is not None and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a library may wait at the end of a process for a thread that the fork does not have


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-W":
        warnings.simplefilter("ignore")
        arguments = arguments[2:]
    if arguments[0] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    elif arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as inherited:
        program = serve(inherited, sys.argv[2:])
    if program:
        run(program)
