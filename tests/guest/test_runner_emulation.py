"""A command line run warm is, byte for byte, what the real interpreter makes of it."""

from __future__ import annotations

import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .warm import ENV, Outcome, Warm, build_stub, run_cold

pytestmark = pytest.mark.needs("cc")

# Other interpreters to try, for a release: a colon-separated list.
INTERPRETERS = [os.path.realpath(sys.executable), *filter(None, os.environ.get("TARTARUS_TEST_PYTHONS", "").split(":"))]


@pytest.fixture(scope="module", params=INTERPRETERS, ids=lambda path: Path(path).parts[-3])
def warm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    zygote = Warm(request.param, build_stub(tmp_path_factory.mktemp("stub")), imports="json,decimal,random")
    assert zygote.greeting[:4] == b"TRDY"
    yield zygote
    assert zygote.close() == 0


def same(warm: Warm, *args: str, **options: object) -> Outcome:
    """Run it both ways and compare; returns what it did."""
    cold = run_cold(warm.interpreter, *args, **options)  # type: ignore[arg-type]
    hot = warm.run(*args, **options)  # type: ignore[arg-type]
    assert hot is not None, "refused"
    assert without_addresses(hot) == without_addresses(cold)
    return hot


def without_addresses(outcome: Outcome) -> tuple[bytes, bytes, int]:
    stdout, stderr = (re.sub(rb"0x[0-9a-f]{6,}", b"0x", data) for data in (outcome.stdout, outcome.stderr))
    return stdout, stderr, outcome.status


PROGRAMS = {
    "hello": "print('hello')",
    "nothing": "",
    "unicode": "print('h\u00e9llo \u2603 \U0001f600'); import sys; sys.stderr.write('\u2603\\n')",
    "surrogate output": "import sys; print('\\udcff', file=sys.stdout)",
    "surrogate output on stderr": "import sys; print('\\ud800', file=sys.stderr)",
    "bytes": "import sys; sys.stdout.buffer.write(bytes(range(256)))",
    "namespace": "print({k: v for k, v in globals().items() if k != '__loader__'}); print(sorted(dir()))",
    "loader": "print(type(__loader__).__name__, __spec__, __name__, __package__, __doc__)",
    "main module": "import sys; m = sys.modules['__main__']; print(m.__dict__ is globals(), m.__name__, repr(m)[:20])",
    "argv": "import sys; print(sys.argv, getattr(sys, 'orig_argv', None), sys.path[0])",
    "path": "import sys; print(sys.path)",
    "executable": "import sys; print(sys.executable, sys._base_executable, sys.prefix, sys.exec_prefix)",
    "flags": "import sys; print(sys.flags, sys.dont_write_bytecode, sys.flags == tuple(sys.flags))",
    "environ": "import os; print(sorted(os.environ.items()), sorted(os.environb.items()))",
    "real environ": "import os; os.environ['NEW'] = 'x'; os.system('env | grep -v ^_= | grep -v ^PWD= | sort')",
    "getenv in C": "import ctypes; g = ctypes.CDLL(None).getenv; g.restype = ctypes.c_char_p; print(g(b'HOME'), g(b'X'))",
    "streams": "import sys\nfor s in (sys.stdin, sys.stdout, sys.stderr):\n"
    "  print(s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through, s.newlines, s.fileno(),"
    " type(s.buffer).__name__, s.buffer.raw.mode, s.buffer.raw.closefd, s.buffer.raw.name, repr(s))\n"
    "print(sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__)",
    "signals": "import signal\nfor n in sorted(signal.valid_signals()): print(n, signal.getsignal(n))\n"
    "print(signal.pthread_sigmask(0, []), signal.getitimer(0))",
    "descriptors": "import os; print(sorted(set(os.listdir('/proc/self/fd')) - {'3'}))",
    "umask": "import os; print(oct(os.umask(0)))",
    "process group": "import os; print(os.getpid() == os.getpgrp() == os.getsid(0))",
    "gc": "import gc; print(gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.callbacks)",
    "limits": "import sys; print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile())",
    "hooks": "import sys; print(sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__,"
    " sys.unraisablehook is sys.__unraisablehook__, len(sys.meta_path), len(sys.path_hooks), hasattr(sys, 'last_value'))",
    "builtins": "import builtins; print(sorted(dir(builtins))); print(exit, quit)",
    "threads": "import threading, _thread; t = threading.current_thread(); print(t, t is threading.main_thread(),"
    " t.native_id == __import__('os').getpid(), threading.enumerate(), _thread._count())" if False else
    "import threading, os; t = threading.current_thread(); print(t.name, t is threading.main_thread(), t.daemon,"
    " t.native_id == os.getpid(), len(threading.enumerate()))",
    "locale": "import locale, sys; print(locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(),"
    " sys.getfilesystemencoding(), sys.getfilesystemencodeerrors(), open('/dev/null').encoding)",
    "frames": "import sys\ntry: sys._getframe(1)\nexcept ValueError as e: print(e)\nprint(sys._getframe().f_back)",
    "frames in a function": "import sys, traceback\ndef f():\n  traceback.print_stack()\n  print(sys._getframe().f_back.f_back)\nf()",
    "stack of a thread": "import threading, traceback\nt = threading.Thread(target=traceback.print_stack); t.start(); t.join()",
    "inspect stack": "import inspect; print(len(inspect.stack()), inspect.stack()[0].function)",
    "warning beyond the top": "import warnings; warnings.warn('w', stacklevel=2); warnings.warn('v')",
    "deprecation": "import warnings; warnings.warn('old', DeprecationWarning)\ndef f(): warnings.warn('x', DeprecationWarning, 2)\nf()",
    "recursion depth": "n = 0\ndef f():\n  global n\n  n += 1\n  f()\ntry: f()\nexcept RecursionError as e: print(n, e)",
    "recursion error": "def f(): f()\nf()",
    "deep recursion": "import sys; sys.setrecursionlimit(5000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(4000))",
    "exception": "def f(x):\n  return 1 / x\nf(0)",
    "exception in a call chain": "def a(): b()\ndef b(): raise KeyError('k')\na()",
    "chained": "try:\n  1/0\nexcept ZeroDivisionError as e:\n  raise ValueError('no') from e",
    "context": "try:\n  1/0\nexcept ZeroDivisionError:\n  {}['x']",
    "suppressed": "try:\n  1/0\nexcept ZeroDivisionError:\n  raise ValueError from None",
    "multi-line message": "raise ValueError('a\\nb')",
    "own exception": "class E(Exception):\n  def __str__(self): raise RuntimeError\nraise E",
    "exception after output": "import sys; print('out'); sys.stderr.write('err\\n'); print('more'); raise ValueError(1)",
    "unimportable": "import no_such_module",
    "import error": "from os import nonsense",
    "name suggestion": "prin('x')",
    "attribute suggestion": "import sys; sys.exitt",
    "base exception": "raise BaseException('b')",
    "generator exit": "raise GeneratorExit",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "keyboard interrupt subclass": "class K(KeyboardInterrupt): pass\nraise K('x')",
    "exit": "import sys; sys.exit()",
    "exit zero": "raise SystemExit(0)",
    "exit three": "import sys; print('x'); sys.exit(3)",
    "exit 256": "import sys; sys.exit(256)",
    "exit minus one": "import sys; sys.exit(-1)",
    "exit huge": "import sys; sys.exit(2**70)",
    "exit minus huge": "import sys; sys.exit(-2**70)",
    "exit true": "import sys; sys.exit(True)",
    "exit text": "import sys; print('out'); sys.exit('bye')",
    "exit tuple": "import sys; sys.exit((1, 2))",
    "exit float": "raise SystemExit(1.5)",
    "exit without stderr": "import sys; sys.stderr = None; sys.exit('bye')",
    "exit of builtin": "exit(4)",
    "exit in a function": "def f():\n  raise SystemExit(9)\nf()",
    "exit with a bad str": "class C:\n  def __str__(self): 1/0\nimport sys; sys.exit(C())",
    "exit now": "import os; print('lost'); os._exit(6)",
    "abort": "import os; os.abort()",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "atexit": "import atexit\natexit.register(print, 'one')\natexit.register(print, 'two')\nprint('body')",
    "atexit error": "import atexit\ndef f(): 1/0\natexit.register(print, 'after'); atexit.register(f)",
    "atexit exit": "import atexit, sys\natexit.register(sys.exit, 5)",
    "atexit after exception": "import atexit\natexit.register(print, 'cleanup')\nraise ValueError",
    "excepthook": "import sys\nsys.excepthook = lambda t, v, tb: print('hook', t, v, tb.tb_frame.f_back)\n1/0",
    "broken excepthook": "import sys\ndef h(t, v, tb): raise TypeError('in hook')\nsys.excepthook = h\n1/0",
    "exiting excepthook": "import sys\nsys.excepthook = lambda *a: sys.exit(8)\n1/0",
    "no excepthook": "import sys\ndel sys.excepthook\n1/0",
    "excepthook and last": "import sys\ndef h(t, v, tb): print(sys.last_type, sys.last_value, sys.last_traceback is tb)\n"
    "sys.excepthook = h\n1/0",
    "unraisable": "class D:\n  def __del__(self): 1/0\nd = D(); del d; print('on')",
    "destructor at exit": "class D:\n  def __del__(self): print('gone')\nd = D()",
    "destructors at exit": "class D:\n  def __init__(s, n): s.n = n\n  def __del__(s): print('gone', s.n)\na = D(1); b = D(2); c = [D(3)]",
    "cyclic destructor": "class D:\n  def __del__(self): print('gone')\nd = D(); d.me = d",
    "destructor sees globals": "x = 'still'\nclass D:\n  def __del__(self): print(x)\nd = D()",
    "destructor imports": "class D:\n  def __del__(self):\n    import wave\n    print(wave)\nd = D()",
    "file name at exit": "import atexit\natexit.register(lambda: print('__file__' in globals(), '__cached__' in globals()))",
    "frames at exit": "import atexit, sys\natexit.register(lambda: print(sys._getframe().f_back))",
    "destructor in a function's default": "class D:\n  def __del__(self): print('gone')\ndef f(d=D()): pass",
    "destructor on exit()": "import sys\nclass D:\n  def __del__(self): print('gone')\nd = D()\nsys.exit(2)",
    "destructor after an exception": "class D:\n  def __del__(self): print('gone')\nd = D()\n1/0",
    "destructor of a local after an exception": "class D:\n  def __del__(self): print('gone')\ndef f():\n  d = D()\n  1/0\nf()",
    "generator left open": "def g():\n  try: yield\n  finally: print('closed')\nx = g(); next(x)",
    "finalize": "import weakref\nclass C: pass\nc = C(); weakref.finalize(c, print, 'final')",
    "file left open": "f = open('/proc/self/fd/1', 'w'); f.write('unflushed')",
    "closed stdout": "import sys; sys.stdout.close()",
    "no stdout": "import sys; sys.stdout = None; print('x')",
    "replaced stdout": "import sys, io; sys.stdout = io.StringIO(); print('x')",
    "stdout without flush": "import sys\nclass S:\n  def write(self, t): pass\nsys.stdout = S(); print('x')",
    "closed descriptor": "import os; print('x'); os.close(1)",
    "thread": "import threading\nt = threading.Thread(target=lambda: print('in thread')); t.start(); print('main')\nt.join()",
    "thread left running": "import threading, time\ndef f():\n  time.sleep(0.05)\n  print('late')\nthreading.Thread(target=f).start()\nprint('main')",
    "thread exception": "import threading\ndef f(): 1/0\nt = threading.Thread(target=f, name='T'); t.start(); t.join()",
    "daemon thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('main')",
    "thread exit order": "import threading, atexit, time\natexit.register(print, 'atexit')\n"
    "def f():\n  time.sleep(0.05); print('thread')\nthreading.Thread(target=f).start()",
    "fork": "import os\nif os.fork() == 0:\n  print('child', flush=True); os._exit(3)\nprint(os.wait()[1])",
    "fork and fall off": "import os, sys\nprint('before', flush=True)\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('both', bool(pid))",
    "subprocess": "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True))",
    "subprocess signals": "import subprocess; print(subprocess.check_output(['sh', '-c', 'trap; grep SigIgn /proc/self/status']))",
    "exec": "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(2)'])",
    "system": "import os; print(os.system('exit 3'))",
    "print to closed pipe": "import os, sys\nr, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)\nprint('x')",
    "broken pipe now": "import os, sys\nr, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)\nprint('x' * 100000)",
    "full device": "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('x')",
    "hash randomised": "import sys; print(sys.flags.hash_randomization)",
    "asyncio": "import asyncio\nasync def f():\n  await asyncio.sleep(0.001); return 5\nprint(asyncio.run(f()))",
    "asyncio exception": "import asyncio\nasync def f(): 1/0\nasyncio.run(f())" if sys.version_info >= (3, 11) else "1/0",
    "dataclass and enum": "import dataclasses, enum\n@dataclasses.dataclass\nclass A:\n  x: int = 1\nclass B(enum.Enum):\n  Y = 2\nprint(A(), B.Y)",
    "pickle of main's class": "import pickle\nclass A: pass\na = pickle.loads(pickle.dumps(A())); print(type(a) is A, A.__module__)",
    "logging": "import logging; logging.warning('w'); logging.getLogger('x').error('e')",
    "input": "print(input('? '), input())\nimport sys; print(sys.stdin.read())",
    "input at the end": "input(); input(); input(); input()",
    "future": "from __future__ import annotations\ndef f(x: Undefined): pass\nprint(f.__annotations__)",
    "annotations": "x: int = 3\nprint(__annotations__)",
    "type of modules": "import json, decimal; print(json.__name__, decimal.Decimal('1.10') + 1)",
    "c output": "import ctypes; ctypes.CDLL(None).printf(b'from C\\n'); print('from Python')",
    "settrace": "import sys\nseen = []\nsys.settrace(lambda f, e, a: seen.append((e, f.f_code.co_name)))\ndef f(): pass\nf()\n"
    "sys.settrace(None); print(seen)",
    "alarm": "import signal\nsignal.signal(signal.SIGALRM, lambda n, f: print('alarm', n, f.f_code.co_name))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()",
    "pdb hooks": "import sys; print(hasattr(sys, 'ps1'), sys.stdin.isatty())",
    "site": "import site; print(site.ENABLE_USER_SITE, site.PREFIXES)",
    "modules": "import sys; print([n for n in sys.modules if 'runner' in n or 'tartarus' in n])",
    "code objects": "print(f.__code__.co_filename) if 'f' in dir() else print((lambda: 0).__code__.co_filename)",
    "doc": "'the doc'\nprint(__doc__)",
    "exception group": "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])" if sys.version_info >= (3, 11) else "1/0",
    "note": "e = ValueError('x'); getattr(e, 'add_note', print)('note'); raise e",
    "help": "import pydoc; print(len(pydoc.render_doc(len)) > 10)",
    "eval frames": "print(eval('__import__(\"sys\")._getframe().f_back.f_back'))",
    "memory error": "x = bytearray(1 << 62)",
    "int digits": "print(len(str(10 ** 4000)))\nint('1' * 5000)",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_given_as_text(warm: Warm, name: str) -> None:
    same(warm, "-c", PROGRAMS[name], stdin=b"line 1\nline 2\r\nrest\n")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_in_a_file(warm: Warm, name: str, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text(PROGRAMS[name], "utf-8")
    same(warm, "prog.py", "an", "argument", cwd=str(tmp_path), stdin=b"line 1\nline 2\r\nrest\n")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_on_standard_input(warm: Warm, name: str) -> None:
    same(warm, "-", "arg", stdin=PROGRAMS[name].encode())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_as_a_module(warm: Warm, name: str, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text(PROGRAMS[name], "utf-8")
    same(warm, "-m", "prog", "arg", cwd=str(tmp_path), env={**ENV, "PYTHONDONTWRITEBYTECODE": "1"}, stdin=b"a\nb\n")


@pytest.mark.parametrize(
    "name", ["exception after output", "exit text", "atexit after exception", "excepthook", "logging"]
)
@pytest.mark.parametrize("mode", ["-c", "file", "-"])
def test_the_order_of_both_outputs_in_one_file(warm: Warm, name: str, mode: str, tmp_path: Path) -> None:
    (tmp_path / "prog.py").write_text(PROGRAMS[name], "utf-8")
    args = {"-c": ["-c", PROGRAMS[name]], "file": ["prog.py"], "-": ["-"]}[mode]
    same(warm, *args, cwd=str(tmp_path), stdin=PROGRAMS[name].encode() if mode == "-" else b"", one_file=True)
