"""Whole builds: stages, variables, caching, failures. A RUN runs for real (tests/images/dockerfiles.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.images.dockerfiles import UID_BASE, Bench, files_of, with_busybox

from tartarus.images.dockerfile.output import MAX_OUTPUT_BYTES, StepOutput
from tartarus.images.oci import ImageConfig, host_platform
from tartarus.images.paths import SYSTEM_PATH
from tartarus.model.errors import BuildFailed, CommandNotFound, ImageNotFound, InvalidRequest, TimeLimit

pytestmark = pytest.mark.anyio


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def real(bench: Bench) -> Bench:
    bench.base("base", with_busybox, ImageConfig(env={"PATH": "/bin"}, cmd=("sh",)))
    return bench


@pytest.fixture
def dry(bench: Bench) -> Bench:
    """Without steps that really run: each makes an empty layer."""

    async def run(step, tree, lock, output):
        bench.runner.ran.append(step)
        bench.runner.before(step)
        return 0

    bench.runner.run = run  # type: ignore[method-assign]
    bench.base("base", lambda tree: (tree / "x").write_text("x"))
    return bench


async def invalid(bench: Bench, dockerfile: str, **options) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await bench.build(dockerfile, **options)
    assert bench.events == []  # refused before anything was done
    return str(caught.value)


# A real build.


@pytest.mark.needs("root", "busybox")
async def test_a_build_from_end_to_end(real: Bench):
    real.write("src/main.txt", "src/skip.log")
    real.write(".dockerignore", content="**/*.log\n")
    built = await real.build(
        """
        ARG WORD=hello
        FROM base AS build
        ARG WORD
        ENV GREETING="$WORD world"
        WORKDIR /lib/build
        COPY src .
        RUN ls && echo "$GREETING" > made && stat -c %u . && rm /etc/group && mkdir -p a/b
        RUN ["/bin/sh", "-c", "cat made; pwd -P; env"]
        FROM base
        COPY --from=build /usr/lib/build /app
        RUN <<EOF
        set -e
        cat /app/made
        echo done > /app/end
        EOF
        USER app
        ENTRYPOINT ["/bin/cat"]
        """.replace("\n        ", "\n")
    )
    shown = files_of(built.layers)
    assert {path: what for path, what in shown.items() if path.startswith("/app")} == {
        "/app/main.txt": "src/main.txt", "/app/made": "hello world\n", "/app/end": "done\n",
    }  # fmt: skip
    assert "/etc/group" in shown
    output = "".join(real.told("output"))
    assert f"main.txt\n{UID_BASE}\nhello world\n/usr/lib/build\n" in output
    assert "skip.log" not in output
    assert "GREETING=hello world" in output
    assert (built.config.user, built.config.entrypoint, built.config.cmd) == ("app", ("/bin/cat",), ())
    assert (len(built.layers), len(built.names), built.steps) == (3, 2, 12)

    again = await real.build(real_text := "FROM base\nRUN echo once > /once\n")
    first = await real.build(real_text)
    assert again.layers == first.layers
    assert (again.cached, first.cached) == (0, 1)
    assert real.told("output") == []


@pytest.mark.needs("root", "busybox")
async def test_a_step_that_fails(real: Bench):
    with pytest.raises(BuildFailed) as caught:
        await real.build(
            "FROM base\n\nRUN echo before >/before\nRUN echo first; \\\n echo '\x1b[31mred' >&2; exit 7\nRUN never\n"
        )
    error = caught.value
    assert error.what == "step 3 of 4 failed (line 4: RUN echo first; echo '?[31mred' >&2; exit 7)"
    assert error.why == "exit status 7\nfirst\nred\n"
    assert error.fix == "open a shell there: tartarus run -it --template build-test-failed -- sh"
    (kept,) = real.runner.kept
    assert "/before" in files_of(kept[0])
    assert len(real.runner.ran) == 2
    # Nothing of it is found the next time.
    with pytest.raises(BuildFailed):
        await real.build("FROM base\n\nRUN echo before >/before\nRUN echo first; \\\n echo '\x1b[31mred' >&2; exit 7\n")
    assert real.told("cached") == ["RUN echo before >/before"]


async def test_what_can_go_wrong_beside_the_step(dry: Bench):
    def fails(error):
        def before(step):
            raise error

        dry.runner.before = before

    for error in (CommandNotFound("no sh"), TimeLimit("too long"), InvalidRequest("there is no user 'x'")):
        fails(error)
        with pytest.raises(BuildFailed, match=str(error)) as caught:
            await dry.build("FROM base\nRUN x\n")
        assert "build-test-failed" in caught.value.fix

    async def keep(layers, config):
        raise TimeLimit("not kept")

    dry.runner.keep_failed = keep  # type: ignore[method-assign]
    with pytest.raises(BuildFailed) as caught:
        await dry.build("FROM base\nRUN x\n")
    assert caught.value.fix == ""
    assert "not kept" in dry.told("note")[0]
    with pytest.raises(ImageNotFound):
        await dry.build("FROM nothing\n")
    with pytest.raises(BuildFailed, match="the image is empty"):
        await dry.build("FROM scratch\nRUN x\n")


# Stages.


async def test_only_the_stages_that_are_needed_are_built(dry: Bench):
    text = (
        "FROM base AS a\nRUN a\n"
        "FROM other AS b\nRUN b\n"
        "FROM a AS c\nRUN c\n"
        "FROM scratch AS d\nCOPY --from=c /x /\n"
        "FROM base AS e\n"
    )
    await dry.build(text, target="D")
    assert [step.argv[-1] for step in dry.runner.ran] == ["a", "c"]
    assert dry.runner.asked == ["base"]
    assert dry.events[-1].step == dry.events[-1].steps == 6
    dry.runner.ran.clear()
    built = await dry.build(text)
    assert (dry.runner.ran, built.names) == ([], ())
    await dry.build(text, target="0")
    assert dry.runner.ran == []  # from the cache


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM base\nCOPY --from=0 x y\n", "not finished there"),
        ("FROM base AS a\nCOPY --from=b x y\nFROM base AS b\n", "not finished there"),
        ("FROM base\nCOPY --from=7 x y\n", "no stage 7"),
        ("FROM $X\n", "nothing once its variables"),
        ("FROM --platform=windows/amd64 base\n", "not this host's"),
        ("FROM --platform=linux/s390x base\n", "not this host's"),
    ],
)
async def test_stages_that_make_no_sense(dry: Bench, text, message):
    target = "a" if "AS a" in text else ""
    assert message in await invalid(dry, text, target=target)


async def test_the_host_s_platform_may_be_asked_for(dry: Bench):
    here = host_platform()
    for wanted in (
        "linux",
        f"linux/{here.architecture}",
        "$BUILDPLATFORM",
        "$TARGETPLATFORM",
        "${TARGETOS}/$TARGETARCH",
    ):
        await dry.build(f"FROM --platform={wanted} base\n")


async def test_targets_that_are_not_there(dry: Bench):
    assert "the stages are: a, 1" in await invalid(dry, "FROM base AS a\nFROM base\n", target="b")
    await invalid(dry, "FROM base\n", target="1")
    await invalid(dry, "FROM base\n", target="-1")


# Variables.


async def env_of(bench: Bench, text: str, **options) -> dict[str, str]:
    bench.runner.ran.clear()
    await bench.build(f"{text}\nRUN x\n", cache_scope=os.urandom(4).hex(), **options)
    return dict(bench.runner.ran[-1].env)


async def test_arg_and_env(dry: Bench):
    assert await env_of(dry, "FROM base") == {"PATH": SYSTEM_PATH}
    env = await env_of(
        dry,
        "ARG OUT=o\nARG GIVEN=g\nFROM base\nARG OUT\nARG GIVEN\nARG IN=$OUT.in\nARG NONE\nARG A=1\nENV A=2 B=${A:-x} C='$A'\n"
        "ARG B=3\nENV PATH=/opt:$PATH D=${NONE-unset}\n",
        build_args={"GIVEN": "given"},
    )
    assert env == {
        "OUT": "o", "GIVEN": "given", "IN": "o.in", "A": "2", "B": "1", "C": "$A", "PATH": f"/opt:{SYSTEM_PATH}", "D": "unset",
    }  # fmt: skip


async def test_the_variables_of_one_instruction_are_those_before_it(dry: Bench):
    # The example of Docker's reference.
    env = await env_of(dry, "FROM base\nENV abc=hello\nENV abc=bye def=$abc\nENV ghi=$abc\n")
    assert (env["abc"], env["def"], env["ghi"]) == ("bye", "hello", "bye")


async def test_arguments_end_with_their_stage_unless_it_is_built_on(dry: Bench):
    text = "ARG G=g\nFROM base AS a\nARG A=1\nENV E=2\nFROM {base} AS b\nCOPY --from=a /x /\n"
    assert set(await env_of(dry, text.format(base="base"))) == {"PATH"}
    assert set(await env_of(dry, text.format(base="a"))) == {"PATH", "A", "E"}


async def test_automatic_arguments_need_arg(dry: Bench):
    assert "TARGETARCH" not in await env_of(dry, "FROM base")
    env = await env_of(dry, "FROM base\nARG TARGETARCH\nARG TARGETSTAGE\n")
    assert (env["TARGETARCH"], env["TARGETSTAGE"]) == (host_platform().architecture, "default")


async def test_arguments_that_nothing_declares(dry: Bench):
    message = await invalid(dry, "FROM base\nARG ONE\n", build_args={"ONEE": "1"})
    assert "'ONEE'" in message
    assert "declared are: ONE" in message
    await invalid(dry, "FROM base\nARG A\n", build_args={"A": "a\0b"})
    await invalid(dry, "FROM base\nARG A\n", build_args={"A": "a\ud800"})
    await invalid(dry, "FROM base\nARG A\n", build_args={"A": "x" * 200_000})
    await invalid(dry, "FROM base\nARG A\n", build_args={f"A{number}": "" for number in range(300)})


async def test_growing_variables_end_at_a_cap(dry: Bench):
    text = "FROM base\nENV A=0123456789\n" + "ENV A=$A$A$A$A$A$A$A$A$A$A\n" * 12
    with pytest.raises(BuildFailed, match="too long"):
        await dry.build(text)
    many = "FROM base\n" + "".join(
        "ENV " + " ".join(f"V{line}_{each}=1" for each in range(1_000)) + "\n" for line in range(5)
    )
    with pytest.raises(BuildFailed, match="more than 4096"):
        await dry.build(many)


async def test_messages_do_not_reach_into_the_terminal(dry: Bench):
    for text in ("ENV A='\x1b[2J", "USER \x1b x", "EXPOSE \x1b", "STOPSIGNAL \x1b", "COPY \x1b /x", "ENV A=${B:?\x1b}"):
        with pytest.raises(BuildFailed) as caught:
            await dry.build(f"FROM base\n{text}\n")
        assert str(caught.value).isprintable()
    assert (await invalid(dry, "FROM base\n", target="\x1b")).isprintable()


# What the image says of itself.


async def test_the_configuration(dry: Bench):
    dry.base(
        "full", lambda tree: None, ImageConfig(env={"A": "1"}, cmd=("old",), labels={"l": "1"}, workdir="/w", user="u", exposed_ports=("1/tcp",))
    )  # fmt: skip
    built = await dry.build(
        'FROM full\nLABEL l=2 "m n"="o p"\nEXPOSE 80 53/udp 8000-8002\nSTOPSIGNAL sigterm\nSHELL ["/bin/bash", "-ec"]\n'
        "HEALTHCHECK CMD x\nCMD a b\nENTRYPOINT c\nVOLUME /data\nMAINTAINER me\nENV B=$A\n"
    )
    assert built.config == ImageConfig(
        env={"PATH": SYSTEM_PATH, "A": "1", "B": "1"},
        cmd=("/bin/bash", "-ec", "a b"),
        entrypoint=("/bin/bash", "-ec", "c"),
        workdir="/w",
        user="u",
        labels={"l": "2", "m n": "o p"},
        exposed_ports=("1/tcp", "80/tcp", "53/udp", "8000/tcp", "8001/tcp", "8002/tcp"),
        shell=("/bin/bash", "-ec"),
        stop_signal="SIGTERM",
        healthcheck=("CMD-SHELL", "x"),
    )
    assert [note.partition(":")[0] for note in built.notes] == ["line 9", "line 10"]
    # An ENTRYPOINT takes the base's CMD away.
    assert (await dry.build('FROM full\nENTRYPOINT ["c"]\n')).config.cmd == ()


@pytest.mark.parametrize(
    "step",
    ["EXPOSE 0", "EXPOSE 70000", "EXPOSE 8080:80", "EXPOSE 1-65535", "EXPOSE 80/icmp", "EXPOSE 9-8", "STOPSIGNAL 99",
     "STOPSIGNAL kill it", "USER $NONE", "USER a b", "WORKDIR $NONE", "ENV $NONE=1", "LABEL a='", "WORKDIR /" + "x" * 5000],
)  # fmt: skip
async def test_values_that_make_no_sense(dry: Bench, step):
    with pytest.raises(BuildFailed) as caught:
        await dry.build(f"FROM base\n\n{step}\n")
    assert f"step 2 of 2 failed (line 3: {step.split()[0]}" in str(caught.value)


async def test_what_a_run_gets(dry: Bench):
    await dry.build('FROM base\nUSER app:staff\nRUN a "b c"\nSHELL ["/s"]\nRUN d\nRUN ["e"]\n')
    assert [step.argv for step in dry.runner.ran] == [("/bin/sh", "-c", 'a "b c"'), ("/s", "d"), ("e",)]
    assert {step.user for step in dry.runner.ran} == {"app:staff"}
    assert {step.workdir for step in dry.runner.ran} == {"/"}


# The cache.


async def hits(bench: Bench, text: str, **options) -> list[str]:
    """The last words of the steps that were found made."""
    await bench.build(text, **options)
    return [each.split()[-1] for each in bench.told("cached")]


TEXT = "FROM base\nARG A=1\nLABEL l=1\nRUN one\nCOPY f /f\nRUN two\n"


async def test_the_cache_hits(dry: Bench):
    dry.write("f")
    assert await hits(dry, TEXT) == []
    assert await hits(dry, TEXT) == ["one", "/f", "two"]
    # What no layer depends on.
    assert await hits(dry, "# c\n" + TEXT.replace("l=1", "l=2") + "CMD x\n") == ["one", "/f", "two"]
    os.utime(dry.context / "f", (1, 1))
    dry.write("unrelated")
    assert await hits(dry, TEXT) == ["one", "/f", "two"]


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ("RUN one", "RUN  three", 0),
        ("ARG A=1", "ARG A=2", 0),
        ("ARG A=1", "ENV A=1 B=2", 0),
        ("RUN one", "USER app\nRUN one", 0),
        ("RUN one", "WORKDIR /w\nRUN one", 0),
        ("RUN one", 'SHELL ["/s"]\nRUN one', 0),
        ("FROM base", "FROM other", 0),
        ("RUN two", "RUN three", 2),
        ("COPY f /f", "COPY f /g", 1),
        ("COPY f /f", "COPY f /f/", 1),
        ("COPY f /f", "COPY --chmod=600 f /f", 1),
        ("COPY f /f", "ADD f /f", 1),
        ("COPY f /f", "COPY <<f /f\n1\nf", 1),
    ],
)
async def test_the_cache_misses(dry: Bench, old, new, kept):
    dry.write("f")
    dry.base("other", lambda tree: None)
    await dry.build(TEXT)
    assert len(await hits(dry, TEXT.replace(old, new))) == kept


async def test_changed_files_and_stages_miss(dry: Bench):
    dry.write("f")
    text = "FROM base AS a\nCOPY f /g\nRUN one\nFROM base\nCOPY --from=a /g /\nCOPY <<EOF /i\n1\nEOF\n"
    await dry.build(text)
    assert len(await hits(dry, text)) == 4
    dry.write("f", content="changed")
    assert len(await hits(dry, text)) == 0
    assert len(await hits(dry, text.replace("\n1\n", "\n2\n"))) == 3


async def test_an_argument_that_a_build_is_given(dry: Bench):
    dry.write("f")
    await dry.build(TEXT)
    assert await hits(dry, TEXT, build_args={"A": "2"}) == []
    # Nothing in front of the ARG depends on it.
    late = "FROM base\nRUN one\nARG A\nRUN two\n"
    await dry.build(late, build_args={"A": "1"})
    assert await hits(dry, late, build_args={"A": "2"}) == ["one"]


async def test_proxies_reach_a_run_and_do_not_count(dry: Bench):
    text = "FROM base\nRUN one\n"
    await dry.build(text, build_args={"HTTP_PROXY": "http://p"})
    assert dry.runner.ran[-1].env["HTTP_PROXY"] == "http://p"
    assert await hits(dry, text, build_args={"https_proxy": "http://q"}) == ["one"]
    # Unless the Dockerfile asks for them.
    declared = "FROM base\nARG HTTP_PROXY\nRUN one\n"
    await dry.build(declared, build_args={"HTTP_PROXY": "http://p"})
    assert await hits(dry, declared, build_args={"HTTP_PROXY": "http://q"}) == []


async def test_scopes_share_nothing(dry: Bench):
    """What a RUN fetched is its tenant's word, even of the same text: a proxy of one may not decide for the other."""
    dry.write("f")
    await dry.build(TEXT, cache_scope="one", build_args={"HTTP_PROXY": "http://evil"})
    assert await hits(dry, TEXT, cache_scope="two") == []
    assert len(await hits(dry, TEXT, cache_scope="one")) == 3


async def test_no_two_inputs_make_one_key(dry: Bench):
    texts = [
        'RUN ["a", "b"]',
        'RUN ["a b"]',
        'RUN ["ab"]',
        "RUN a b",
        'RUN ["/bin/sh", "-c", "a", "b"]',
        "ENV A=a\nRUN b",
        "ENV Aa=\nRUN b",
    ]
    keys = {(await dry.build(f"FROM base\n{text}\n")).names for text in texts}
    assert len(keys) == len(texts)


async def test_builds_at_the_same_moment_do_the_work_once(dry: Bench):
    dry.write("f")

    async def slow(step, tree, lock, output):
        dry.runner.ran.append(step)
        await asyncio.sleep(0.1)
        return 0

    dry.runner.run = slow  # type: ignore[method-assign]
    one, two = await asyncio.gather(dry.build(TEXT), dry.build(TEXT))
    assert one.layers == two.layers
    assert len(dry.runner.ran) == 2


# The end of builds.


async def test_a_cancelled_build_leaves_nothing(dry: Bench):
    for number in range(300):
        dry.write(f"many/{number}")

    async def stuck(step, tree, lock, output):
        (tree / "half").write_text("x")
        await asyncio.Event().wait()
        return 0

    dry.runner.run = stuck  # type: ignore[method-assign]
    descriptors = set(os.listdir("/proc/self/fd"))
    for text, delay in (
        ("FROM base\nRUN x\n", 0.05),
        ("FROM base\nCOPY many /\n", 0.01),
        ("FROM base\nCOPY many /\n", 0.03),
    ):
        work = asyncio.create_task(dry.build(text))
        await asyncio.sleep(delay)
        work.cancel()
        await asyncio.wait([work])
        assert work.cancelled() or work.result().layers
        assert [path.name for path in (dry.place / "layers").iterdir() if path.name.startswith(".")] == []
    assert set(os.listdir("/proc/self/fd")) == descriptors


KILLED = """
import asyncio, sys
from pathlib import Path
from tests.images.dockerfiles import Bench
bench = Bench(Path(sys.argv[1]))
bench.base("base", lambda tree: (tree / "x").write_text("x"))
bench.write("f")
async def run(step, tree, lock, output):
    (tree / "half").write_text("x")
    print("there", flush=True)
    await asyncio.Event().wait()
bench.runner.run = run
asyncio.run(bench.build("FROM base\\nCOPY f /f\\nRUN x\\n"))
"""


async def test_a_killed_build_leaves_whole_layers_only(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    from tartarus.images import LayerStore

    LayerStore(tmp_path / "layers")
    (left,) = (tmp_path / "layers").iterdir()
    assert (left / "tree/f").read_text() == "f"


# Output.


def test_output_is_text_and_bounded():
    said: list[str] = []
    output = StepOutput(said.append)
    for byte in "héllo\n".encode():
        output(1, bytes([byte]))
    output(2, b"\xff\n")
    assert "".join(said) == "héllo\n\ufffd\n"
    output(1, b"x" * 100 + b"\n")
    for _ in range(20):
        output(1, b"y" * (1 << 20))
    assert sum(len(text) for text in said) < MAX_OUTPUT_BYTES + 1_000
    assert "not shown" in said[-1]
    output(1, b"\nlast \x1b]0;title\x07\x1b[2Jword\n10%\r50%\r100%\n\n")
    assert output.last_lines().split("\n")[-2:] == ["last word", "100%"]


async def test_events_tell_where_a_build_is(dry: Bench):
    await dry.build("FROM base\n\nRUN \\\n  x\n")
    assert [(event.kind, event.step, event.steps, event.line, event.text) for event in dry.events] == [
        ("started", 1, 2, 1, "FROM base"),
        ("progress", 1, 2, 1, "found base"),
        ("done", 1, 2, 1, "FROM base"),
        ("started", 2, 2, 3, "RUN x"),
        ("done", 2, 2, 3, "RUN x"),
    ]
