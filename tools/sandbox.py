"""A sandbox for programs that a model wrote: run_program(code, tests) says whether one is right.

If a program ran in one process with its tests, it could decide what they find: end the process
before they fail, replace what they compare with, or look in its memory for whatever secret marks a
pass. So the tests have a process of their own, and only values go from one to the other:

    process of the tests                      process of the program
    assert mean([1, 2]) == 1.5                def mean(numbers): ...

                     "call mean, [1, 2]"  ->
                                          <-  "1.5"

Results are built again from builtin types, so that no == of the program's own decides an assertion.
An object of another type stays in the program's process, and the tests have a Remote for it.

A program may also do harm, mostly by mistake: delete files, fork without end, never return. Against
that the sandbox has

    network, signals, System V memory    namespaces: no other processes are in there
    files, unix sockets                  a root folder of its own: the folders of Python and of the
                                         system, read-only, and files in memory, at most 64 MB
    memory, processes, CPU time          limits of each process
    time, death of the evaluator         the kernel kills the whole tree of processes

Linux has all of this from 5.12 on, but containers often forbid namespaces. macOS has the processes
and the limits, without that of memory. sandbox_gaps() says what is missing on this system.

Tests fail that need more than values: if they compare, add or measure objects of the program's own
classes, hand over functions of their own, or expect that an argument has changed in place. Those of
HumanEval and MBPP do not.
"""
import ast
import builtins
import ctypes
import json
import numbers
import os
import resource
import signal
import socket
import sys
import types
from functools import lru_cache

# The sandbox runs this file too, and starts faster without what only the evaluator needs:
# subprocess, tempfile and UserError are imported where they are used.

LIMITS = {
    "RLIMIT_AS": 768 * 2**20,     # bytes of address space
    "RLIMIT_FSIZE": 2**24,        # bytes of a file
    "RLIMIT_NOFILE": 64,          # open files
    "RLIMIT_NPROC": 16,           # processes and threads
    "RLIMIT_CORE": 0,             # no core dump
    "RLIMIT_CPU": 10,             # seconds, if nothing else ends it
}
FILE_SYSTEM = b"size=64m,nr_inodes=4096,mode=755"
SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib64", "/etc")
DEVICES = ("null", "zero", "random", "urandom")
NOBODY = 65534

NAMESPACE_GAPS = (
    "network connections; signals to this user's processes; System V memory and queues left "
    "behind; processes that outlive their program; forks that use up what other programs may have")
ROOT_GAPS = (
    "reading, writing and removing this user's files; changing their modes, times and attributes; "
    "any sum of file sizes; files left behind if the evaluation is killed; connections to unix "
    "sockets; writing to the memory of this user's processes, and so a forged pass")
MEMORY_GAP = "any use of memory"    # macOS does not keep a limit of address space


# ---- the evaluator

def run_program(code: str, tests: str = "", timeout: float = 3.0) -> str:
    """Run a program, then its tests -> "passed", "timed out" or "failed: <why>". Both are Python
    source. Passed means that the tests came to their end within `timeout` seconds."""
    import subprocess
    import tempfile

    if not sandbox_gaps():
        return in_sandbox(code, tests, timeout, folder="/")[0]

    folder = tempfile.mkdtemp()
    try:
        return in_sandbox(code, tests, timeout, folder)[0]
    finally:
        # Thousands of nested folders are too many for shutil.rmtree.
        subprocess.run(["rm", "-rf", folder])


def in_sandbox(code: str, tests: str, timeout: float, folder: str) -> tuple[str, str]:
    """The verdict, and the digits of confine(). The program starts in `folder`, unless it gets a
    root folder of its own."""
    import subprocess

    job = json.dumps({"code": code, "tests": tests, "parent": os.getpid()})
    with subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=folder, env={}, text=True,
                          start_new_session=True) as child:
        try:
            printed, _ = child.communicate(job, timeout)
        except subprocess.TimeoutExpired:
            return "timed out", ""
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass                # all have ended; macOS says so by the second

    digits, _, verdict = printed.partition(" ")
    return verdict or "failed: it ended before its tests did", digits


@lru_cache
def sandbox_gaps() -> str:
    """What this system does not prevent; empty if nothing."""
    from configurator import UserError

    verdict, digits = in_sandbox("def f(x): return x", "assert f(1) == 1", 30.0, folder="/")
    if verdict != "passed":
        raise UserError(f"the sandbox cannot run a right program here: {verdict}; leave out "
                        "humaneval, humaneval_instruct and mbpp")
    gaps = []
    if digits[0] == "0":
        gaps.append(NAMESPACE_GAPS)
    if digits[1] == "0":
        gaps.append(ROOT_GAPS)
    if sys.platform != "linux":
        gaps.append(MEMORY_GAP)
    return "; ".join(gaps)


# ---- the sandbox's process, which becomes that of the tests

def sandbox_main() -> None:
    """Read a job as JSON from stdin; write the digits of confine() and the verdict to stdout.

    The process confines itself and forks before it reads the job, so that the program's process
    has never seen the tests."""
    libc = ctypes.CDLL(None, use_errno=True)
    digits = confine(libc)
    end_with_parent(libc)
    sys.set_int_max_str_digits(0)               # integers of any length are sent
    ours, theirs = socket.socketpair()

    # The first child is process 1 of the new namespace: when it ends, the kernel kills all others
    # in there. Its own child is the program's process.
    first = os.fork()
    if first == 0:
        ours.close()
        silence()
        end_with_parent(libc)
        program = os.fork()
        if program == 0:
            end_with_parent(libc)
            set_limits()
            serve(theirs.makefile("rw"))
        while os.wait()[0] != program:
            pass
        os._exit(0)

    theirs.close()
    job = json.load(sys.stdin)
    if os.getppid() != job["parent"]:
        os._exit(1)                             # the evaluator ended before end_with_parent()
    report = os.dup(1)
    silence()
    set_limits()
    # The program could put modules into a folder that does not exist yet.
    sys.path = [folder for folder in sys.path if os.path.isdir(folder)]
    verdict = run_tests(ours.makefile("rw"), job["code"], job["tests"])

    os.kill(first, signal.SIGKILL)
    os.wait()
    os.write(report, f"{digits} {verdict}".encode("ascii", "backslashreplace"))
    os._exit(0)


def run_tests(stream, code: str, tests: str) -> str:
    """Let the program's process load the program, and run the tests here -> the verdict.

    A name in the tests is what the tests define, else a builtin, else the program's. An exception:
    if the tests use builtins alone, the program has one of its own, such as `sum` in MBPP 126."""
    def ask(operation: str, *args, **kwargs):
        send(stream, encode([operation, args, kwargs]))
        answer = receive(stream)
        if "error" in answer:
            raise rebuild_error(*answer["error"])
        return decode(answer["value"], lambda number: Remote(ask, number))

    try:
        receive(stream)                         # "ready": now the program ends with this process
        ask("load", code)
        tree = ast.parse(tests)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names = used - set(dir(builtins)) or used
        found = ask("find", sorted(names))

        namespace = {"__name__": "tests"}
        for name in names:
            if name in found:
                namespace[name] = found[name]
        exec(compile(tree, "tests", "exec"), namespace)
        return "passed"
    except BaseException as error:
        words = f"{type(error).__name__}: {error}".split()
        return f"failed: {' '.join(words)[:200]}".rstrip(": ")


def rebuild_error(name: str, text: str) -> Exception:
    """An exception of the program's, for the tests. sys.exit() in the program is an error here."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind(text)
    return RuntimeError(f"{name}: {text}")


class Remote:
    """Stands in the tests for an object of the program's: the program's process does what is done
    with it."""

    def __init__(self, ask, number: int):
        self.__dict__.update(_ask=ask, _number=number)

    def __call__(self, *args, **kwargs):
        return self._ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str):
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value):
        self._ask("setattr", self, name, value)

    def __iter__(self):
        return iter(self._ask("list", self))


# ---- the program's process
#
# What goes through the socket for `assert mean([1, 2]) == 1.5` (a list is sent as its type and its
# parts, see encode below):
#
#     tests      load     "def mean(numbers): return sum(numbers) / len(numbers)"
#     program    null
#     tests      find     ["mean"]
#     program    {"mean": object 0}                      kept at objects[0]; the tests get a Remote
#     tests      call     object 0, [1, 2]
#     program    1.5                                     or {"error": ["TypeError", "..."]}
#
# Whatever a program does in its own process, it can only change these answers. It does not know the
# assertions, so the only way to a pass is to answer right.

def serve(stream) -> None:
    """Do what the tests' process asks for: (operation, arguments, named arguments) -> its result,
    or the exception that it raised."""
    program = types.ModuleType("program")
    sys.modules["program"] = program            # where pickle and dataclasses look for classes
    process = os.getpid()
    objects = []

    def load(code: str) -> None:
        exec(compile(code, "program", "exec"), program.__dict__)

    def find(names: list) -> dict:
        return {name: program.__dict__[name] for name in names if name in program.__dict__}

    def call(function, *args, **kwargs):
        return function(*args, **kwargs)

    operations = {"load": load, "find": find, "call": call, "getattr": getattr,
                  "setattr": setattr, "list": list}
    send(stream, "ready")
    while True:
        operation, args, kwargs = decode(receive(stream), objects.__getitem__)
        try:
            result = operations[operation](*args, **kwargs)
            answer = {"value": encode(result, objects)}
        except BaseException as error:
            answer = {"error": [type(error).__name__, str(error)]}
        if os.getpid() != process:
            os._exit(0)                         # the program forked, and this is the copy
        send(stream, answer)


# ---- values between the two processes

SCALARS = (bool, int, float, str)
CONTAINERS = (list, tuple, set, frozenset, bytes, dict)
BUILTIN_TYPES = {kind.__name__: kind for kind in (*SCALARS, *CONTAINERS, complex)}


def encode(value, objects: list | None = None):
    """A value as JSON can hold it: itself, or [type, parts]. A type that is derived from a builtin
    one becomes that one. Any other object is kept in `objects` and sent as its index.

    >>> encode([1, (2.5, None), {"a"}])
    ['list', [1, ['tuple', [2.5, None]], ['set', ['a']]]]
    """
    if value is None:
        return None
    for kind in SCALARS:
        if isinstance(value, kind):
            return kind(value)
    for kind in CONTAINERS:
        if isinstance(value, kind):
            parts = value.items() if kind is dict else value
            return [kind.__name__, [encode(part, objects) for part in parts]]

    if isinstance(value, Remote):
        return ["object", value._number]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if getattr(value, "shape", None) == ():                  # a number of numpy's
        return encode(value.item(), objects)
    if isinstance(value, numbers.Number):                    # Fraction or Decimal
        return ["Fraction", list(value.as_integer_ratio())]
    if isinstance(value, type) and value in BUILTIN_TYPES.values():
        return ["type", value.__name__]
    if objects is None:
        raise TypeError(f"tests cannot hand over a {type(value).__name__}")
    objects.append(value)
    return ["object", len(objects) - 1]


def decode(data, find_object):
    """The value that encode() was given. Its types are builtin ones, apart from what
    find_object(index) returns: nothing that the sender defined runs here.

    >>> decode(["list", [1, ["tuple", [2.5, None]], ["set", ["a"]]]], find_object=None)
    [1, (2.5, None), {'a'}]
    """
    if not isinstance(data, list):
        return data
    kind, content = data
    if kind == "object":
        return find_object(content)
    if kind == "complex":
        return complex(*content)
    if kind == "Fraction":
        from fractions import Fraction
        return Fraction(*content)
    if kind == "type":
        return BUILTIN_TYPES[content]
    return BUILTIN_TYPES[kind]([decode(part, find_object) for part in content])


def send(stream, message) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def receive(stream):
    line = stream.readline()
    if not line:
        raise EOFError("it ended before its tests did")
    return json.loads(line)


# ---- what confines both
#
# The constants are those of linux/sched.h, mount.h, fcntl.h, prctl.h and capability.h. The number
# of the system call mount_setattr, for which Python and older C libraries have no function, is the
# same on all processors.

CLONE_NEWNS = 0x00020000            # mounts
CLONE_NEWIPC = 0x08000000           # System V memory and queues
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
MOUNT_ATTR_RDONLY = 1
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION_3 = 0x20080522


def confine(libc) -> str:
    """Cut this process off from the rest of the system, as far as the system allows -> two digits:
    1 if it has namespaces of its own, and 1 if it has a root folder of its own."""
    if sys.platform != "linux":
        return "00"

    # The limit on processes goes by the real user, and does not hold for root. Access to files
    # goes by the effective user.
    user = os.geteuid()
    group = os.getegid()
    if os.getuid() == 0:
        os.setresuid(NOBODY, 0, 0)

    # Only root may have the other namespaces. In a user namespace of its own, any process is root.
    flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    has_namespaces = libc.unshare(flags) == 0
    has_root = False
    if has_namespaces:
        try:
            # Who makes files in there must have a number in there.
            write_file("/proc/self/uid_map", f"{NOBODY} {user} 1")
            write_file("/proc/self/setgroups", "deny")
            write_file("/proc/self/gid_map", f"{NOBODY} {group} 1")
            change_root(libc)
            has_root = True
        except OSError:
            pass

    # Give up the rights of root, which could undo all this, and never get any by a setuid program.
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3)
    no_rights = (ctypes.c_uint32 * 6)()
    libc.capset(header, no_rights)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return f"{has_namespaces:d}{has_root:d}"


def change_root(libc) -> None:
    """Make a file system in memory the root folder. It has the folders of the system and of Python
    and a few devices, which nobody can change, and empty folders for files.

    It is built on /proc, a folder that is always there and that programs can do without."""
    root = "/proc"
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY)

    def check(status: int) -> None:
        if status != 0:
            raise OSError(ctypes.get_errno(), "this system does not allow another root folder")

    def show(path: str) -> None:
        place = (root + path).encode()
        check(libc.mount(path.encode(), place, None, MS_BIND | MS_REC, None))
        check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, place, AT_RECURSIVE, read_only,
                           ctypes.sizeof(read_only)))

    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(b"tmpfs", root.encode(), b"tmpfs", 0, FILE_SYSTEM))
    for folder in (*SYSTEM_FOLDERS, sys.base_prefix, sys.prefix):
        if os.path.isdir(folder) and not os.path.exists(root + folder):
            os.makedirs(root + folder)
            show(folder)
    os.makedirs(f"{root}/dev/shm")
    for device in DEVICES:
        write_file(f"{root}/dev/{device}", "")
        show(f"/dev/{device}")
    os.makedirs(f"{root}/tmp", exist_ok=True)

    os.chdir(root)
    check(libc.pivot_root(b".", b"."))
    check(libc.umount2(b".", MNT_DETACH))
    os.chdir("/tmp")


def write_file(file: str, text: str) -> None:
    with open(file, "w") as f:
        f.write(text)


def end_with_parent(libc) -> None:
    """The kernel kills this process when its parent ends, if it is Linux."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def silence() -> None:
    """stdin is empty from here on, and what is printed is dropped."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def set_limits() -> None:
    for name, limit in LIMITS.items():
        if name == "RLIMIT_AS" and sys.platform != "linux":
            continue                            # macOS refuses it: see MEMORY_GAP
        resource.setrlimit(getattr(resource, name), (limit, limit))


if __name__ == "__main__":
    sandbox_main()
