"""The sandbox: which programs pass, and what none of them can do."""
import json
import os
import re
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from configurator import UserError
from tools import sandbox
from tools.sandbox import decode, encode, run_program, sandbox_gaps

ROOT = Path(__file__).parents[1]
TESTS = "assert f(1) == 2\nassert f(5) == 6"
SLEEP = f"time.sleep(98{os.getpid()})"          # a command line that no other process has


@pytest.fixture
def complete_sandbox():
    if sandbox_gaps():
        pytest.skip(f"the sandbox of this system does not prevent: {sandbox_gaps()}")


# ---- right programs

RIGHT = {
    "function": "def f(x): return x + 1",
    "a dataclass, its annotations strings": """
        from __future__ import annotations
        from dataclasses import dataclass, field
        from typing import ClassVar, get_type_hints
        @dataclass
        class Pair:
            size: ClassVar[int] = 2
            first: int
            other: Pair | None = None
        assert get_type_hints(Pair)["first"] is int
        def f(x): return Pair(x).first + 1""",
    "a pickled class": """
        import pickle
        class Box:
            def __init__(self, x): self.x = x
        def f(x): return pickle.loads(pickle.dumps(Box(x))).x + 1""",
    "a process pool": """
        from concurrent.futures import ProcessPoolExecutor
        def g(x): return x + 1
        def f(x):
            with ProcessPoolExecutor(2) as pool: return list(pool.map(g, [0, x]))[1]""",
    "files": """
        import os, tempfile
        def f(x):
            with open("x", "w") as file: file.write(str(x))
            with tempfile.TemporaryDirectory() as folder: os.rename("x", folder + "/y")
            return x + 1""",
    "a program of the system": """
        import subprocess, sys
        def f(x):
            code = f"print({x} + 1)"
            return int(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)""",
    "much output": """
        print("x" * 2 * 10**6)
        def f(x): return x + 1""",
    "a name of the tests'": """
        namespace = tests = ask = names = None
        def f(x): return x + 1""",
    "a copy of itself": """
        import os
        os.fork()
        def f(x): return x + 1""",
    "a process that stays": """
        import subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; SLEEP"], start_new_session=True)
        def f(x): return x + 1""".replace("SLEEP", SLEEP),
    "3000 folders, each in the one before": """
        import os
        for _ in range(3000): os.mkdir("a"); os.chdir("a")
        def f(x): return x + 1""",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(name):
    assert run_program(source(RIGHT[name]), TESTS) == "passed"
    assert sandbox_gaps() or nothing_runs()


def source(code):
    lines = code.strip("\n").split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def nothing_runs():
    """Whether all processes of the sandbox end within 2 s."""
    for _ in range(40):
        if not running():
            return True
        time.sleep(0.05)
    return False


def running():
    """The command lines of this tree's sandbox."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_text(errors="replace")
        except OSError:
            continue
        if sandbox.__file__ in command or SLEEP in command:
            found.append(command)
    return found


NODE = "class Node:\n    def __init__(self, key): self.key, self.left = key, None\n"


@pytest.mark.parametrize("code, tests", [
    ("def f(*args, **kwargs): return args, kwargs", "assert f(1, a={2}) == ((1,), {'a': {2}})"),
    ("sum = lambda a, b: a + b", "assert sum(10, 15) == 25"),
    ("def f(kind): return isinstance(3, kind)", "assert f(int)\nassert not f(str)"),
    ("def f(x): return map(abs, x)", "assert list(f([-1, 2])) == [1, 2]"),
    ("from collections import Counter\ndef f(x): return Counter(x)",
     "assert f('aab') == {'a': 2, 'b': 1}"),
    ("from decimal import Decimal\ndef f(): return Decimal('2.5')", "assert f() == 2.5"),
    ("def f(): return 7 ** 9999", "assert f() == 7 ** 9999"),
    (NODE + "def depth(n): return 0 if n is None else 1 + depth(n.left)",
     "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.key == 2"),
    ("def f(x): raise KeyError(x)", "try: f(1)\nexcept KeyError: pass\nelse: assert False"),
])
def test_tests_use_the_program_as_if_it_were_theirs(code, tests):
    assert run_program(code, tests) == "passed"
    assert run_program(code, tests + "\nassert False") == "failed: AssertionError"


def test_values_arrive_as_they_were_sent():
    nested = {(1, "a"): [{2.5, None}, frozenset({True})], "b": (b"\x00\xff", -0.0, 2**70, 1 + 2j)}
    values = [nested, [], set(), "\ud800\n", Fraction(1, 3), float("inf"), int, list]
    for value in values:
        arrived = decode(json.loads(json.dumps(encode(value))), None)
        assert repr(arrived) == repr(value)
    assert type(decode(encode(type("Own", (int,), {})(3)), None)) is int


# ---- wrong programs

LIAR = """
    class Liar(BASE):
        def __eq__(self, other): return True
        def __hash__(self): return 2
        def __iter__(self): return iter([9])
        def __repr__(self): return "2"
    def f(x): return Liar(VALUE)"""

WRONG = {
    "wrong": ("def f(x): return x", "failed: AssertionError"),
    "raises": ("def f(x): return x / 0", "failed: ZeroDivisionError: division by zero"),
    "no Python": ("def f(x) return", "failed: SyntaxError"),
    "a null byte": ("x = '\0'", "failed: SyntaxError|failed: ValueError"),
    "nothing": ("", "failed: NameError"),
    "sys.exit": ("import sys\nsys.exit(0)", "failed: RuntimeError: SystemExit"),
    "os._exit": ("import os\nos._exit(0)", "failed: .*it ended before its tests did"),
    "kills its group": ("import os\nos.kill(0, 9)", "failed: it ended"),
    "endless": ("while True: pass", "timed out"),
    "endless result": ("import itertools\ndef f(x): return itertools.count()", "failed"),
    "endless nesting": ("a = []\na.append(a)\ndef f(x): return a", "failed: RecursionError"),
    "fork bomb": ("import os\nwhile True: os.fork()", "failed|timed out"),
    "1 GB": ("x = bytearray(10**9)", "failed: MemoryError"),
    "a file of 20 MB": ("open('x', 'w').write('x' * 20 * 2**20)", "failed: OSError"),
    "flood": ("while True: print('x' * 10**6)", "timed out"),
    # Forgeries:
    "any == is true": (LIAR.replace("BASE", "object").replace("VALUE", ""), "failed"),
    "== of an int": (LIAR.replace("BASE", "int").replace("VALUE", "9"), "failed: AssertionError"),
    "== of a str": (LIAR.replace("BASE", "str").replace("VALUE", "9"), "failed: AssertionError"),
    "says that it is an int": ("""
        class Liar:
            __class__ = int
            def __eq__(self, other): return True
        def f(x): return Liar()""", "failed"),
    "writes a verdict everywhere": ("""
        import os
        def f(x):
            for descriptor in range(64):
                try: os.write(descriptor, b'11 passed')
                except OSError: pass
            os._exit(0)""", "failed"),
    "raises a verdict": ("def f(x): raise Exception('\\npassed')", "failed: Exception: passed"),
    "replaces builtins": ("""
        import builtins, sys
        builtins.AssertionError = sys.modules["__main__"].run_tests = None
        def f(x): return 9""", "failed"),
    "looks for the tests": ("""
        import gc, re, sys
        def f(x):
            seen = list(gc.get_objects())
            for frame in sys._current_frames().values():
                while frame:
                    seen += [frame.f_locals, frame.f_globals]
                    frame = frame.f_back
            for found in seen:
                if re.search(r"assert f\\(5\\)", str(found)): return x + 1
            memory = open("/proc/self/mem", "rb")
            for line in open("/proc/self/maps"):
                low, high = (int(n, 16) for n in line.split()[0].split("-"))
                try:
                    memory.seek(low)
                    if re.search(rb"assert f\\(5\\)", memory.read(high - low)): return x + 1
                except (OSError, OverflowError, ValueError): pass
            return 9""", "failed: (AssertionError$|FileNotFoundError)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_fail(name):
    code, verdict = WRONG[name]
    found = run_program(source(code), TESTS, timeout=1.0)
    assert re.match(verdict, found), found
    assert sandbox_gaps() or nothing_runs()


def test_no_program_gives_the_tests_a_module(complete_sandbox):
    program = """
        for folder in ("/", "/tmp/", "/dev/shm/"):
            with open(folder + "colorsys.py", "w") as file: file.write("raise SystemExit")
        def f(x): return x + 1"""
    assert run_program(source(program), "import colorsys\n" + TESTS) == "passed"


# ---- what no program reaches

@pytest.fixture
def host(tmp_path):
    """What programs could reach: {name: its text in a program}."""
    file = tmp_path / "file"
    file.write_text("x")
    path = str(tmp_path / "socket")
    with (socket.create_server(("127.0.0.1", 0)) as server,
          socket.socket(socket.AF_UNIX) as local,
          subprocess.Popen(["sleep", "60"]) as process):
        local.bind(path)
        local.listen()
        yield {"FILE": repr(str(file)), "SERVER": repr(server.getsockname()),
               "SOCKET": repr(path), "PROCESS": str(process.pid), "EVALUATOR": str(os.getpid())}
        assert process.poll() is None
        process.kill()
    assert file.read_text() == "x"
    assert sorted(tmp_path.iterdir()) == [file, Path(path)]


@pytest.mark.parametrize("code", [
    "socket.create_connection(SERVER, 1)",
    "socket.socket(socket.AF_UNIX).connect(SOCKET)",
    "open(FILE)",
    "open(FILE + '2', 'w')",
    "os.chmod(os.__file__, os.stat(os.__file__).st_mode)",
    "os.chmod('/dev/null', 0o666)",
    "os.utime(os.__file__)",
    "os.setxattr(os.__file__, 'user.x', b'1') or os.removexattr(os.__file__, 'user.x')",
    "open(os.__file__, 'a')",
    "os.kill(PROCESS, 9)",
    "open('/proc/EVALUATOR/mem', 'r+b')",
    "resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))",
    "[open(str(i), 'w').write('x' * 2**20) for i in range(99)]",
    "os.setresuid(0, 0, 0)",
    # MS_BIND | MS_REMOUNT without MS_RDONLY; also with the rights of a user namespace of its own.
    "check(libc.mount(None, b'/usr', None, 0x1020, None) == 0)",
    "check(libc.unshare(0x10020000) == 0 and libc.mount(None, b'/usr', None, 0x1020, None) == 0)",
])
def test_nothing_of_the_host_can_be_changed_or_reached(complete_sandbox, host, code):
    for name, text in host.items():
        code = code.replace(name, text)
    program = f"""
        import ctypes, os, resource, socket
        libc = ctypes.CDLL(None)
        def check(ok):
            if not ok: raise OSError
        def f(x):
            try: {code}
            except (OSError, ValueError): return x + 1"""
    assert run_program(source(program), "assert f(1) == 2") == "passed"


def test_nothing_outlives_an_evaluator_that_is_killed(complete_sandbox, tmp_path):
    program = source(RIGHT["a process that stays"]) + "\nprint(open('x', 'w'))\nwhile True: pass"
    evaluator = f"""
        from tools.sandbox import run_program, sandbox_gaps
        sandbox_gaps()
        print("ready", flush=True)
        run_program({program!r}, timeout=60.0)"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    for seconds in (0.0, 0.02, 0.04, 0.5):
        with subprocess.Popen([sys.executable, "-c", source(evaluator)], env=environment,
                              stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            time.sleep(seconds)
            assert seconds < 0.5 or len(running()) >= 3
            child.kill()
        assert nothing_runs()
    assert not list(tmp_path.iterdir())


# ---- systems that cannot keep all of it

def test_what_the_system_cannot_keep_is_named(monkeypatch):
    monkeypatch.setattr(sandbox, "in_sandbox", lambda *args, **kwargs: ("passed", "00"))
    gaps = sandbox_gaps.__wrapped__()
    for word in ("network", "signals", "System V", "unix sockets", "modes", "times", "attributes",
                 "sum of file sizes", "forks", "memory", "outlive"):
        assert word in gaps


def test_a_program_leaves_no_files_where_it_has_no_root_folder(monkeypatch, tmp_path):
    """And none of them ends the evaluation: not 3,000 folders, each in the one before."""
    def in_folder(code, tests, timeout, folder):
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
        return "passed", "00"

    monkeypatch.setattr(sandbox, "sandbox_gaps", lambda: "files")
    monkeypatch.setattr(sandbox, "in_sandbox", in_folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = source(RIGHT["3000 folders, each in the one before"])
    assert run_program(code, TESTS) == "passed"
    assert not list(tmp_path.iterdir())


def test_macos_runs_programs_and_names_what_it_cannot_keep(monkeypatch, tmp_path):
    """It has neither Linux's system calls nor setresuid, and refuses a limit of address space."""
    script = tmp_path / "sandbox.py"
    script.write_text("import ctypes, os, resource, runpy, sys\n"
                      "sys.platform = 'darwin'\n"
                      "ctypes.CDLL = lambda *args, **kwargs: None\n"
                      "del os.setresuid, resource.RLIMIT_AS\n"
                      f"runpy.run_path({sandbox.__file__!r}, run_name='__main__')\n")
    monkeypatch.setattr(sandbox, "__file__", str(script))
    monkeypatch.setattr(sys, "platform", "darwin")
    gaps = sandbox_gaps.__wrapped__()
    for word in ("network", "this user's files", "any use of memory", "outlive"):
        assert word in gaps

    monkeypatch.setattr(sandbox, "sandbox_gaps", lambda: gaps)
    assert run_program("def f(x): return x + 1", TESTS) == "passed"
    assert run_program("def f(x): return x", TESTS).startswith("failed: AssertionError")
    assert run_program("while True: pass", TESTS, timeout=1.0) == "timed out"
