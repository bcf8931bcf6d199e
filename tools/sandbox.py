"""A sandbox for programs that a model wrote: run_program(code) says whether one runs to its end.

Such a program is not hostile, but it may do any harm by mistake: delete files, fork without end,
never return. The sandbox sets bounds to it:

    network                               a network namespace has no connections
    files outside its temporary folder    Landlock forbids to write, create and remove them
    memory, files, processes, CPU time    setrlimit limits them
    time                                  after `timeout` seconds the process group is killed
    processes that left the group         die with the process namespace

It does not prevent that a program reads files of this user or changes their permissions, or that it
finds the nonce in its own memory and so fakes a pass. Kernels before 5.13 have no Landlock, and
many containers forbid namespaces: sandbox_gaps() says what is missing on this system.
"""
import inspect
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile

LIMITS = {
    "RLIMIT_AS": 768 * 2**20,     # bytes of address space
    "RLIMIT_FSIZE": 2**24,        # bytes of a file
    "RLIMIT_NOFILE": 64,          # open files
    "RLIMIT_NPROC": 16,           # processes
    "RLIMIT_CORE": 0,             # no core dump
}


def sandbox_main() -> None:
    """What the sandbox's process does. `python -I` gets the source of this function and nothing
    else, hence the imports and constants within. It reads code, nonce and limits as JSON. It writes
    three digits, 1 for each protection that works, then what the program prints, then the nonce."""
    import ctypes
    import json
    import os
    import resource
    import struct
    import sys

    # From linux/sched.h, linux/prctl.h, linux/landlock.h and the table of system calls.
    CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID = 0x10000000, 0x40000000, 0x20000000
    PR_SET_NO_NEW_PRIVS = 38
    LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
    LANDLOCK_CREATE_RULESET_VERSION = LANDLOCK_RULE_PATH_BENEATH = 1
    ACCESS_WRITE_FILE = 1 << 1
    ACCESS_REMOVE_AND_MAKE = 0b111111111 << 4      # REMOVE_DIR to MAKE_SYM: all kinds of files
    ACCESS_TRUNCATE = 1 << 14                      # known from version 3 on
    libc = ctypes.CDLL(None)
    job = json.load(sys.stdin)

    # The limit on processes does not hold for root, so root becomes nobody.
    if os.getuid() == 0:
        os.setresuid(65534, 0, 0)

    # New namespaces, without network devices and without other processes. Only root may ask for
    # these two; in a user namespace of its own every process is root.
    isolated = libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID) == 0

    # Landlock forbids what a rule set handles, except where one of its rules allows it: here in the
    # current folder. NO_NEW_PRIVS keeps setuid programs from getting round it.
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    truncate = ACCESS_TRUNCATE if version >= 3 else 0
    access = ACCESS_WRITE_FILE | ACCESS_REMOVE_AND_MAKE | truncate
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, struct.pack("Q", access), 8, 0)
    here = struct.pack("<Qi", access, os.open(".", os.O_PATH))
    confined = (rules >= 0
                and libc.syscall(LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, here, 0) == 0
                and libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                and libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0)
    os.write(1, f"{isolated:d}{confined:d}{version >= 3:d}\n".encode())

    # The first child is process 1 of the namespace: when it ends, the kernel kills all others in
    # there. Its own child runs the program.
    for _ in range(2):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)

    for name, limit in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    exec(compile(job["code"], "program", "exec"), {"__name__": "program"})

    # Only here, at the end, is the nonce printed. sys.exit(0) does not come here.
    sys.stdout.flush()
    os.write(1, job["nonce"].encode())
    os._exit(0)


def run_program(code: str, timeout: float = 3.0) -> str:
    """Run Python source in the sandbox -> "passed", "timed out" or "failed: <its last line>".

    Passed means that it came to its end, where a random nonce is printed. An exit status would
    prove nothing: a program can call sys.exit(0) before its tests."""
    return in_sandbox(code, timeout)[0]


def in_sandbox(code: str, timeout: float) -> tuple[str, str]:
    """run_program's verdict, and the three digits that sandbox_main prints."""
    nonce = secrets.token_hex(16)
    limits = {**LIMITS, "RLIMIT_CPU": math.ceil(timeout) + 1}
    job = json.dumps({"code": code, "nonce": nonce, "limits": limits})
    script = f"{inspect.getsource(sandbox_main)}\nsandbox_main()"

    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          tempfile.TemporaryFile() as output):
        # The output goes to a file, whose size is limited; a pipe would fill our memory.
        child = subprocess.Popen([sys.executable, "-I", "-c", script], stdin=subprocess.PIPE,
                                 stdout=output, stderr=output, cwd=folder, env={}, text=True,
                                 start_new_session=True)
        timed_out = False
        try:
            child.communicate(job, timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            kill_group(child)
        output.seek(0)
        printed = output.read().decode("utf-8", "replace")

    digits = printed[:3]
    if timed_out:
        return "timed out", digits
    if printed.endswith(nonce):
        return "passed", digits
    lines = printed[4:].strip().splitlines() or ["it ended before its tests did"]
    return f"failed: {lines[-1][:200]}", digits


def kill_group(child: subprocess.Popen) -> None:
    """End all processes of the child's group."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def sandbox_gaps() -> str:
    """What this system does not prevent, empty if nothing."""
    digits = in_sandbox("", timeout=10.0)[1].ljust(3, "0")
    protections = ("network connections and processes that leave their group",
                   "writing to files of this user", "truncating files of this user")
    return ", ".join(what for what, digit in zip(protections, digits) if digit != "1")
