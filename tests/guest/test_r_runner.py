"""The parked R does what a fresh Rscript does: values shown, errors, arguments, input, environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tartarus.guest.channel import GuestChannel
from tartarus.guest.command_lines import NotKnown, program_of
from tartarus.model.errors import TemplateFailed

from .parking import both, finish, no_cold, parked, request

pytestmark = [pytest.mark.anyio, pytest.mark.needs("r")]

LOOK = "grep -E '^(Sig(Ign|Blk)|Cap|NoNewPrivs|Seccomp|Umask)' /proc/self/status; ulimit -a; ls /proc/self/fd | wc -l"
SAME = [
    f'system("{LOOK}"); length(list.files("/proc/self/fd"))',
    "1:3",
    "invisible(5); x <- 2; (x)",
    "print(commandArgs()); commandArgs(TRUE)",
    "ls(all.names = TRUE); search(); environmentName(globalenv())",
    "f <- function() stop('bad'); f()",
    "stop('at the top')",
    "warning('first'); message('second'); suppressWarnings(as.integer('x')); as.integer('y')",
    "for (i in 1:3) warning(i)",
    "quit(status = 7)",
    "q('no', 3, FALSE)",
    "undefined",
    "x <- (1 +",
    "x y",
    "interactive(); sys.calls(); sys.nframe(); exists('.Random.seed')",
    "getwd(); Sys.getenv('A'); nchar(Sys.getenv('R_HOME')) > 0",
    "tryCatch(stop('caught'), error = function(e) print(e))",
    "setClass('P', representation(x = 'numeric')); new('P', x = 1)",
    "invisible(reg.finalizer(globalenv(), function(e) cat('bye\\n'), onexit = TRUE)); cat('no line end')",
    "getOption('warn'); options('keep.source', 'echo', 'digits', 'browserNLdisabled')",
    "showConnections(); nchar(tempdir()) > 5; basename(dirname(tempdir())); list.files(all.files = TRUE)",
    "traceback(); options(error = quote({cat('handled\\n'); q(status = 4)})); stop('x')",
    "tools::pskill(Sys.getpid(), 15); Sys.sleep(10)",
    "summary(lm(dist ~ speed, cars))$r.squared",
    "cat(system('echo from a child', intern = TRUE), '\\n'); system('echo to stdout')",
    "isatty(stdin()); isatty(stdout()); Sys.getlocale('LC_CTYPE'); loadedNamespaces()",
    "'é'; nchar('é'); Encoding('é')",
]


@pytest.mark.parametrize("code", SAME)
async def test_an_expression_runs_as_in_a_fresh_r(guest: GuestChannel, tmp_path: Path, code: str) -> None:
    warm, cold = await both(guest, tmp_path, "r", "Rscript", "-e", code, "one", "-two", "th ree", env={"A": "b"})
    assert warm == cold


async def test_several_expressions(guest: GuestChannel, tmp_path: Path) -> None:
    argv = ("Rscript", "-e", "x <- 1 +", "-e", "2\nx", "-e", "commandArgs()", "a")
    warm, cold = await both(guest, tmp_path, "r", *argv)
    assert warm == cold


SCRIPTS = {
    "values.R": "#!/usr/bin/env Rscript\nx <- c(a = 1)\nx\ny <- 5; y\ncommandArgs(trailingOnly = TRUE)\ncommandArgs()\nls()",
    "fails.R": "f <- function(x) {\n  stop('inside ', x)\n}\ncat('before\\n')\nf(1)\ncat('after\\n')\n",
    "reads.R": "a <- readLines(stdin(), 1)\nthis line is read\na\nreadLines(file('stdin'))\n",
    "syntax.R": "1\n2 3\n4\n",
    "open.R": "1\nf <- function( {\n",
    "a file.R": "commandArgs()\n",
    "long.R": "".join(f"x{i} <- {i} # {'x' * 70}\n" for i in range(2000)) + "sum(sapply(ls(), get))\n",
    "crlf.R": "x <- 1\r\nx\r\n",
    "empty.R": "",
    "source.R": "source('values.R', echo = TRUE)\n",
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_a_script_runs_as_in_a_fresh_r(guest: GuestChannel, tmp_path: Path, name: str) -> None:
    for script, text in SCRIPTS.items():
        (tmp_path / script).write_bytes(text.encode())
    warm, cold = await both(guest, tmp_path, "r", "Rscript", name, "a", "--b", "-e", "c d", stdin=b"in\nput\n")
    assert warm == cold


async def test_environment_and_directory_are_the_commands(guest: GuestChannel, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = "basename(getwd()); Sys.getenv('A'); format(.POSIXct(0), '%H'); Sys.getenv('PATH')"
    env = {"A": "b=c", "TZ": "Asia/Tokyo"}
    warm, cold = await both(guest, tmp_path, "r", "Rscript", "-e", code, env=env, cwd=str(tmp_path / "elsewhere"))
    assert warm == cold
    assert warm.out.splitlines()[:3] == ['[1] "elsewhere"', '[1] "b=c"', '[1] "09"']


async def test_what_was_loaded_is_there_and_numbers_differ(guest: GuestChannel, tmp_path: Path) -> None:
    drawn = set()
    for _ in range(2):
        waiting = await parked(
            guest, tmp_path, "r", imports=("splines",), script="stopifnot(runif(1) < 1); library(tools); hidden <- 1"
        )
        code = "'splines' %in% loadedNamespaces(); 'package:tools' %in% search(); exists('hidden'); runif(1)"
        taken = waiting.offer(request(tmp_path, "Rscript", "-e", code), no_cold)
        assert taken is not None
        *facts, number = (await finish(taken)).out.splitlines()
        assert facts == ["[1] TRUE", "[1] TRUE", "[1] FALSE"]
        drawn.add(number)
    assert len(drawn) == 2


async def test_nothing_of_the_runner_stays(guest: GuestChannel, tmp_path: Path) -> None:
    waiting = await parked(guest, tmp_path, "r")
    taken = waiting.offer(request(tmp_path, "Rscript", "-e", "1"), no_cold)
    assert taken is not None
    await finish(taken)
    assert list((tmp_path / ".scratch").iterdir()) == []


async def test_a_profile_is_read_by_a_cold_start(guest: GuestChannel, tmp_path: Path) -> None:
    waiting = await parked(guest, tmp_path, "r")
    (tmp_path / ".Rprofile").write_text("cat('profile\\n')\n")
    asked = request(tmp_path, "Rscript", "-e", "1")
    taken = waiting.offer(asked, lambda: guest.exec(asked))
    assert taken is not None
    assert not (await taken.started())[1]
    assert (await finish(taken)).out == "profile\n[1] 1\n"


async def test_a_missing_script_is_reported_by_a_cold_start(guest: GuestChannel, tmp_path: Path) -> None:
    waiting = await parked(guest, tmp_path, "r")
    asked = request(tmp_path, "Rscript", "missing.R")
    taken = waiting.offer(asked, lambda: guest.exec(asked))
    assert taken is not None
    assert await finish(taken) == await finish(guest.exec(asked))


@pytest.mark.parametrize(
    "argv",
    [
        (), ("-",), ("--version",), ("--vanilla", "x.R"), ("-e",), ("-e", ""), ("-e", "-1"), ("-e", "a\tb"),
        ("-e", "'~+~'"), ("-e", "1", "--slave"), ("--default-packages=base", "x.R"), ("",), ("a\tb.R",),
    ],
)  # fmt: skip
def test_other_options_are_left_to_a_fresh_r(argv: tuple[str, ...]) -> None:
    with pytest.raises(NotKnown):
        program_of("r", ("Rscript", *argv))


@pytest.mark.parametrize(
    "name", ["R_LIBS", "R_PROFILE_USER", "LANG", "OMP_NUM_THREADS", "TMPDIR", "HOME", "LD_PRELOAD"]
)
async def test_variables_read_at_start_need_a_fresh_r(guest: GuestChannel, tmp_path: Path, name: str) -> None:
    waiting = await parked(guest, tmp_path, "r")
    assert waiting.offer(request(tmp_path, "Rscript", "-e", "1", env={name: "x"}), no_cold) is None
    assert waiting.waits


async def test_a_warm_up_that_fails_says_why(guest: GuestChannel, tmp_path: Path) -> None:
    with pytest.raises(TemplateFailed, match="nosuchpackage"):
        await parked(guest, tmp_path, "r", imports=("nosuchpackage",))
