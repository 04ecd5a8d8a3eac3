"""Reading Dockerfiles: the rules of Docker's reference, and what is refused, each with its line and a way out."""

from __future__ import annotations

import contextlib

import pytest

from tartarus.images.dockerfile import instructions as are
from tartarus.images.dockerfile.limits import MAX_INSTRUCTIONS, MAX_STAGES, MAX_TEXT_BYTES, MAX_VALUE
from tartarus.images.dockerfile.parser import parse
from tartarus.images.dockerfile.words import Budget, expand, split_words
from tartarus.model.errors import InvalidRequest


def steps(text: str) -> tuple[are.Instruction, ...]:
    return parse(f"FROM scratch\n{text}").stages[0].steps


def step(text: str) -> are.Instruction:
    (found,) = steps(text)
    return found


def refused(text: str) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    return caught.value


# Lines.


def test_comments_blank_lines_and_indentation():
    text = "\ufeff# a comment\n\n  FROM scratch\r\n   # another\n\tlabel a=1\n"
    (stage,) = parse(text).stages
    assert (stage.start.line, stage.steps[0].line) == (3, 5)
    assert isinstance(stage.steps[0], are.Label)


def test_a_continued_line_passes_over_comments_and_empty_lines():
    found = step("RUN apt-get install \\\n  # why\n  one \\\n\n  two   \\  \n  three\n")
    assert isinstance(found, are.Run)
    assert found.argv == ("apt-get install   one   two     three",)
    assert found.text == "RUN apt-get install one two three"


def test_a_doubled_backslash_does_not_continue_a_line():
    assert [type(each) for each in steps("RUN echo \\\\\nRUN b\n")] == [are.Run, are.Run]


def test_a_hash_inside_of_a_line_is_no_comment():
    found = step("RUN echo hello # world\n")
    assert isinstance(found, are.Run)
    assert found.argv == ("echo hello # world",)


def test_the_escape_directive():
    found = parse("# escape=`\nFROM scratch\nRUN dir `\n  c:\\\nENV A=a` b\n")
    assert found.escape == "`"
    run, env = found.stages[0].steps
    assert isinstance(run, are.Run)
    assert run.argv == ("dir   c:\\",)
    assert isinstance(env, are.Env)
    assert env.pairs == (("A", "a` b"),)


def test_a_directive_after_anything_else_is_a_comment():
    assert parse("\n# escape=`\nFROM scratch\n").escape == "\\"
    assert parse("# about directive\n# escape=`\nFROM scratch\n").escape == "\\"


@pytest.mark.parametrize(
    "syntax",
    ["docker/dockerfile:1", "docker/dockerfile:1.7", "docker.io/docker/dockerfile:1", "docker/dockerfile:1.7-labs"],
)
def test_docker_s_own_syntax_is_accepted(syntax):
    assert parse(f"#syntax = {syntax}\nFROM scratch\n").stages


@pytest.mark.parametrize("syntax", ["evil.example/frontend", "docker/dockerfile:2", "docker/dockerfile", "a\x00"])
def test_no_other_program_may_be_chosen_to_read_the_file(syntax):
    refused(f"# syntax={syntax}\nFROM scratch\n")


# Here-documents.


def test_a_here_document_alone_is_the_script():
    found = step("RUN <<EOF\necho a\n  # kept\necho $B\nEOF\n")
    assert isinstance(found, are.Run)
    assert (found.argv, found.in_shell) == (("echo a\n  # kept\necho $B\n",), True)


def test_a_here_document_for_a_program_is_left_to_the_shell():
    first, second = steps("RUN python3 - <<EOF >/x && true\nprint(1)\nEOF\nRUN cat <<'A' <<-B\n1\nA\n\t2\n\tB\n")
    assert isinstance(first, are.Run)
    assert first.argv == ("python3 - <<EOF >/x && true\nprint(1)\nEOF",)
    assert isinstance(second, are.Run)
    assert second.argv == ("cat <<'A' <<-B\n1\nA\n\t2\nB",)


def test_files_written_in_a_copy():
    found = step('COPY <<a.txt <<-"b.txt" c /dir/\nA $X\na.txt\n\tB $X\n\tb.txt\n')
    assert isinstance(found, are.Copy)
    assert found.sources == ("c",)
    assert [(each.name, each.content, each.expand) for each in found.inline] == [
        ("a.txt", "A $X\n", True),
        ("b.txt", "B $X\n", False),
    ]


def test_what_only_looks_like_a_here_document():
    for command in ("echo $((1<<2))", "cat <<<word", "a << EOF", "echo '<<EOF'"):
        found = step(f"RUN {command}\n")
        assert isinstance(found, are.Run)
        assert found.argv == (command,)


# Instructions.


def test_shell_and_exec_form():
    run, cmd, odd = steps('RUN ["/bin/x", "a b"]\nCMD echo $X\nENTRYPOINT [\'not json\']\n')
    assert isinstance(run, are.Run)
    assert (run.argv, run.in_shell) == (("/bin/x", "a b"), False)
    assert isinstance(cmd, are.Cmd)
    assert (cmd.argv, cmd.in_shell) == (("echo $X",), True)
    # As Docker does with what is no JSON, to everybody's surprise.
    assert isinstance(odd, are.Entrypoint)
    assert odd.in_shell


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("ENV A=1 B=two", (("A", "1"), ("B", "two"))),
        ('ENV A="one two" B=x\\ y', (("A", '"one two"'), ("B", "x\\ y"))),
        ("ENV A one two  three", (("A", "one two  three"),)),
        ("ENV A='x=y'", (("A", "'x=y'"),)),
        ("ENV A=", (("A", ""),)),
    ],
)
def test_env(text, pairs):
    found = step(text)
    assert isinstance(found, are.Env)
    assert found.pairs == pairs


def test_arg_and_copy_and_the_rest():
    arg, copy, add, health, none, shell, volume = steps(
        "ARG A B=2\n"
        'COPY --from=0 --chown=a:b --chmod=755 --link ["a b", "c", "/d/"]\n'
        "ADD a.tar /x\n"
        "HEALTHCHECK --interval=30s --retries=3 CMD curl localhost\n"
        "HEALTHCHECK NONE\n"
        'SHELL ["/bin/bash", "-c"]\n'
        "VOLUME /data\n"
    )
    assert isinstance(arg, are.Arg)
    assert arg.pairs == (("A", None), ("B", "2"))
    assert isinstance(copy, are.Copy)
    assert (copy.sources, copy.destination) == (("a b", "c"), "/d/")
    assert (copy.origin, copy.chown, copy.chmod, copy.unpack) == ("0", "a:b", "755", False)
    assert isinstance(add, are.Copy)
    assert add.unpack
    assert isinstance(health, are.Healthcheck)
    assert health.test == ("CMD-SHELL", "curl localhost")
    assert isinstance(none, are.Healthcheck)
    assert none.test == ("NONE",)
    assert isinstance(shell, are.Shell)
    assert shell.argv == ("/bin/bash", "-c")
    assert isinstance(volume, are.Noted)


def test_stages():
    found = parse("ARG V=1\nFROM a:${V} AS Build\nRUN x\nFROM --platform=linux/amd64 b\nfrom build as c\n")
    assert [each.pairs for each in found.arguments] == [(("V", "1"),)]
    assert [(stage.name, stage.start.base, stage.start.platform) for stage in found.stages] == [
        ("build", "a:${V}", ""),
        ("1", "b", "linux/amd64"),
        ("c", "build", ""),
    ]


# Refusals.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no FROM"]),
        ("RUN x\n", ["line 1", "before the first FROM"]),
        ("FROM scratch\n\nCOPPY a b\n", ["line 3", "COPPY", "did you mean COPY?"]),
        ("FROM scratch\nXYZZY\n", ["line 2", "known are"]),
        ("FROM scratch\nRUN\n", ["line 2", "RUN", "needs an argument"]),
        ("FROM scratch\nRUN --mount=type=cache,target=/x y\n", ["line 2", "--mount", "leave it out"]),
        ("FROM scratch\nRUN --network=none y\n", ["--network"]),
        ("FROM scratch\nRUN --security=insecure y\n", ["--security"]),
        ("FROM scratch\nRUN --privileged y\n", ["unknown option --privileged"]),
        ("FROM scratch\nCOPY --form=x a b\n", ["did you mean --from?"]),
        ("FROM scratch\nCOPY --from=$X a b\n", ["--from"]),
        ("FROM scratch\nCOPY --chown a b\n", ["needs a value"]),
        ("FROM scratch\nCOPY a\n", ["source and a destination"]),
        ("FROM scratch\nCOPY --parents a b\n", ["--parents"]),
        ("FROM scratch\nADD https://example.com/x /x\n", ["not fetched", "RUN"]),
        ("FROM scratch\nADD git@example.com:x.git /x\n", ["not fetched"]),
        ("FROM scratch\nADD --checksum=sha256:0 x /x\n", ["--checksum"]),
        ("FROM scratch\nONBUILD RUN x\n", ["ONBUILD", "not supported"]),
        ("FROM scratch\nSHELL /bin/sh\n", ["JSON"]),
        ('FROM scratch\nCMD ["a", 1]\n', ["must be a string"]),
        ('FROM scratch\nCMD ["a\\u0000b"]\n', ["NUL"]),
        ("FROM scratch\nENV A\n", ["has no value"]),
        ("FROM scratch\nENV A=1 B\n", ["NAME=value"]),
        ("FROM scratch\nARG 1A\n", ["is no name"]),
        ("FROM scratch\nHEALTHCHECK CMD\n", ["HEALTHCHECK"]),
        ("FROM scratch\nHEALTHCHECK --interval=soon CMD x\n", ["--interval"]),
        ("FROM a AS b AS c\n", ["FROM image AS name"]),
        ("FROM a AS -x\n", ["can't name a stage"]),
        ("FROM a AS b\nFROM c AS B\n", ["line 2", "second stage"]),
        ("FROM scratch\nRUN <<EOF\nx\n", ["line 2", "never closed"]),
        ("FROM scratch\nRUN <<EOF\n#!/bin/sh\nEOF\n", ["#!", "RUN python3 <<EOF"]),
        ("FROM scratch\nRUN a\0b\n", ["line 2", "NUL"]),
        ("# escape=x\nFROM scratch\n", ["escape"]),
        ("FROM a\ud800\n", ["UTF-8"]),
    ],
)
def test_what_is_refused_says_where_and_what_to_do(text, words):
    message = str(refused(text))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text",
    ["FROM a AS \x1b[2J", "\x1b]0;x\x07 a", "FROM a\nRUN --\x1b=1 x", "FROM a\nARG \x1b=1", "FROM a\nHEALTHCHECK --retries=\x9b CMD x"],
)  # fmt: skip
def test_messages_do_not_reach_into_the_terminal(text):
    assert str(refused(text)).isprintable()


def test_everything_has_a_cap():
    assert "too long" in str(refused("#" * (MAX_TEXT_BYTES + 1)))
    assert "too many instructions" in str(refused("FROM a\n" + "RUN x\n" * MAX_INSTRUCTIONS))
    assert "too many stages" in str(refused("FROM a\n" * (MAX_STAGES + 1)))
    assert "too many words" in str(refused("FROM a\nENV " + "A=1 " * 5_000))


@pytest.mark.parametrize(
    "text",
    [
        "RUN " + "\\\n" * 500_000,
        "\n" * 1_000_000,
        "FROM a\nRUN " + "<<A " * 2_000,
        "FROM a\nCMD " + "[" * 1_000_000,
        "FROM a\nCOPY " + "--chown=a " * 90_000,
        "FROM a\nHEALTHCHECK --interval=" + "1m" * 400_000 + "x CMD y",
        "# syntax=" + " " * 1_000_000,
        "FROM a\nENV " + "\\" * 1_000_000,
        "FROM a\nENV A=" + "'" * 1_000_000,
    ],
    ids=["continued", "blank", "documents", "nesting", "options", "duration", "directive", "escapes", "quotes"],
)
def test_a_hostile_megabyte_is_read_in_a_moment(text):
    # What is quadratic takes longer than the limit of every test.
    with contextlib.suppress(InvalidRequest):
        parse(text)


# Words.

VARIABLES = {"X": "value", "EMPTY": "", "TWO": "one two"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The table of Docker's reference, "Environment replacement", and the tests of its builder.
        ("$X", "value"),
        ("${X}", "value"),
        ("a${X}b", "avalueb"),
        ("$Xy", ""),
        ("\\$X", "$X"),
        ("\\${X}", "${X}"),
        ("'$X'", "$X"),
        ('"$X"', "value"),
        ('"\\$X"', "$X"),
        ('"a\\b"', "a\\b"),
        ('"a\\"b"', 'a"b'),
        ("a\\b", "ab"),
        ("a\\", "a"),
        ("${X:-word}", "value"),
        ("${UNSET:-word}", "word"),
        ("${EMPTY:-word}", "word"),
        ("${EMPTY-word}", ""),
        ("${UNSET-word}", "word"),
        ("${X:+word}", "word"),
        ("${UNSET:+word}", ""),
        ("${EMPTY:+word}", ""),
        ("${EMPTY+word}", "word"),
        ("${UNSET:-${X}}", "value"),
        ("${UNSET:-$UNSET}", ""),
        ("${UNSET:-'a}b'}", "a}b"),
        ("${X:?gone}", "value"),
        ("$", "$"),
        ("a$", "a$"),
        ("$ X", "$ X"),
        ("$1x", "x"),
        ("he'llo x'", "hello x"),
        ("$TWO", "one two"),
        ("", ""),
    ],
)
def test_expansion(text, expected):
    assert expand(text, VARIABLES) == expected


@pytest.mark.parametrize("text", ["${", "${X", "${X:", "${X:-", "${}", "${:x}", "${{X}}", "'", '"', '"$X', "${X:?"])
def test_expansion_of_what_is_not_closed_is_refused(text):
    with pytest.raises(InvalidRequest):
        expand(text, VARIABLES)


@pytest.mark.parametrize("text", ["${X#v}", "${X%e}", "${X/a/b}", "${X:=a}", "${X^^}"])
def test_forms_that_are_not_supported_are_named(text):
    with pytest.raises(InvalidRequest, match="not supported"):
        expand(text, VARIABLES)


def test_a_variable_that_must_be_set():
    with pytest.raises(InvalidRequest, match="UNSET is not set: tell me"):
        expand("${UNSET:?tell me}", VARIABLES)


def test_doubling_lines_end_at_the_cap():
    budget, value = Budget(), "x" * 1_000
    while len(value) <= MAX_VALUE // 2:
        value = expand("$A$A", {"A": value}, budget=budget)
    with pytest.raises(InvalidRequest, match="too long"):
        expand("$A$A", {"A": value}, budget=budget)


def test_all_expansions_together_have_a_cap():
    budget = Budget(left=1_000)
    expand("$A", {"A": "x" * 400}, budget=budget)
    with pytest.raises(InvalidRequest, match="too long"):
        expand("$A", {"A": "x" * 400}, budget=budget)


def test_nesting_has_a_cap():
    with pytest.raises(InvalidRequest, match="too deep"):
        expand("${A:-" * 10_000 + "}" * 10_000, {})


def test_words_keep_their_quotes():
    assert split_words('a \'b c\' "d \\" e" f\\ g h') == ["a", "'b c'", '"d \\" e"', "f\\ g", "h"]
