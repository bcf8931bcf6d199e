"""A sandbox for programs that a model wrote: see run_program."""
import inspect
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile


def sandbox_main() -> None:
    """What the sandbox's process does; its source is all that it gets. It gives up what it can: the
    network, other processes, and every folder but its own for writing (unshare, Landlock); then a
    grandchild takes its limits and runs the program."""
    import ctypes
    import json
    import os
    import resource
    import struct
    import sys
    told, libc = json.load(sys.stdin), ctypes.CDLL(None)
    if os.getuid() == 0:                 # root's processes cannot be counted, another's can
        os.setresuid(65534, 0, 0)
    alone = libc.unshare(0x10000000 | 0x40000000 | 0x20000000) == 0  # user, network, processes
    cuts = libc.syscall(444, None, 0, 1) >= 3         # Landlock's version knows of truncate
    writing = 0x1FF2 | cuts << 14        # write, remove and make, of every kind
    rules = libc.syscall(444, struct.pack("Q", writing), 8, 0)
    here = os.open(".", os.O_PATH)
    confined = rules >= 0 and libc.syscall(445, rules, 1, struct.pack("<Qi", writing, here), 0) == 0
    confined = confined and libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(446, rules, 0) == 0
    os.write(1, f"{alone:d}{confined:d}{cuts:d}\n".encode())
    for last in False, True:             # the first process of a namespace takes the others along
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            os._exit(0)
    for name, limit in told["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    exec(compile(told["code"], "program", "exec"), {"__name__": "program"})
    sys.stdout.flush()
    os.write(1, told["nonce"].encode())
    os._exit(0)


LIMITS = {"RLIMIT_AS": 768 * 2**20, "RLIMIT_FSIZE": 2**24, "RLIMIT_NOFILE": 64, "RLIMIT_NPROC": 16,
          "RLIMIT_CORE": 0}


def run_program(code: str, timeout: float = 3.0) -> str:
    """Run Python source -> "passed", "timed out" or "failed: <its last line>". It runs as `python
    -I` in an empty environment and a temporary folder, in a session of its own, with limits on
    time, memory, output, files and processes; in the end all that it began is killed. It has passed
    if it came to its end: what is printed then is random; an exit code says nothing. One that looks
    for that in its process can fake its end, and none is kept from chmod of this user's files."""
    return in_sandbox(code, timeout)[0]


def in_sandbox(code: str, timeout: float) -> tuple[str, str]:
    """See run_program; also what the child gave up: "111", the three of sandbox_gaps."""
    nonce = secrets.token_hex(16)
    limits = {**LIMITS, "RLIMIT_CPU": math.ceil(timeout) + 1}
    told = json.dumps({"code": code, "nonce": nonce, "limits": limits})
    script = f"{inspect.getsource(sandbox_main)}\nsandbox_main()"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
            tempfile.TemporaryFile() as out:
        child = subprocess.Popen([sys.executable, "-I", "-c", script], stdin=subprocess.PIPE,
                                 stdout=out, stderr=out, cwd=folder, env={}, text=True,
                                 start_new_session=True)
        late = False
        try:
            child.communicate(told, timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
        out.seek(0)
        said = out.read().decode("utf-8", "replace")
    if said.endswith(nonce) and not late:
        return "passed", said[:3]
    lines = said[4:].strip().splitlines() or ["it ended before its tests did"]
    return "timed out" if late else f"failed: {lines[-1][:200]}", said[:3]


def sandbox_gaps() -> str:
    """What this system does not keep from programs, empty if nothing."""
    gave_up = in_sandbox("", 10.0)[1]
    gaps = ("the network, and processes that leave their group", "writing to files of this user",
            "truncating files of this user")
    return ", ".join(gap for gap, kept in zip(gaps, gave_up.ljust(3, "0")) if kept != "1")
