"""The options of `run` and `exec`, declared once, as data: click and the quick parser both read them.

Plain classes and no imports, since `tartarus run` waits for this module.
"""

from __future__ import annotations

FLAG, TEXT, LIST, NUMBER = "flag", "text", "list", "number"


class Option:
    """One option. `name` is its key in the parsed values; `kind` says what it holds."""

    __slots__ = ("choices", "default", "flags", "help", "kind", "metavar", "name")

    def __init__(
        self, name: str, flags: tuple[str, ...], text: str, *, kind: str = TEXT, metavar: str = "",
        choices: tuple[str, ...] = (), default: str | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.flags = flags
        self.help = text
        self.kind = kind
        self.metavar = metavar
        self.choices = choices
        self.default = default

    def initial(self) -> bool | str | tuple[str, ...] | None:
        """The value when the option is not given."""
        if self.kind == FLAG:
            return False
        return () if self.kind == LIST else self.default


INTERACTIVE = Option(
    "interactive", ("-i", "--interactive"), "Forward standard input even from a terminal; pipes and files always are.",
    kind=FLAG,
)  # fmt: skip
TTY = Option("tty", ("-t", "--tty"), "Give the command a terminal.", kind=FLAG)
ENV = Option(
    "env", ("-e", "--env"), "Set a variable; NAME alone passes your own value on. May be repeated.", kind=LIST,
    metavar="NAME[=VALUE]",
)  # fmt: skip
WORKDIR = Option("workdir", ("-w", "--workdir"), "Directory the command starts in.", metavar="PATH")

RUN = (
    Option("template", ("--template",), "What to make the sandbox from.", metavar="NAME", default="host"),
    Option("request", ("--request",), "A saved request (JSON or YAML) to start from, as tartarus migrate writes "
           "them; other options and a command come over it.", metavar="FILE"),
    Option("snapshot", ("--snapshot",), "A snapshot to go on from; it brings its own template.", metavar="ID"),
    Option(
        "isolation", ("--isolation",), "How strongly to hold it; auto takes the strongest this host can give.",
        choices=("auto", "process", "container", "gvisor", "microvm", "wasm"), default="auto",
    ),
    Option("memory", ("--memory",), "Memory limit, such as 512MiB.", metavar="SIZE"),
    Option("cpus", ("--cpus",), "CPU limit, such as 2, 0.5 or 250m.", metavar="N"),
    Option("pids", ("--pids",), "Limit of processes and threads.", kind=NUMBER, metavar="N"),
    Option("disk", ("--disk",), "How much it may write, such as 1GiB.", metavar="SIZE"),
    Option("fuel", ("--fuel",), "For a WebAssembly module: end it after about so many instructions.", kind=NUMBER,
           metavar="N"),
    Option("timeout", ("--timeout",), "End the sandbox after this long, such as 30s or 10m (exit status 124).",
           metavar="DURATION"),
    Option("idle", ("--idle",), "Hibernate it after so long without work, such as 5m; what is asked of it wakes it.",
           metavar="DURATION"),
    Option("stop_signal", ("--stop-signal",), "What asks it to end: a name or number; the template's, or TERM.",
           metavar="SIGNAL"),
    Option("stop_grace", ("--stop-grace",), "How long it then has, such as 30s; the last part of --timeout, too.",
           metavar="DURATION"),
    ENV,
    WORKDIR,
    Option("mount", ("--mount",), "Show a file or directory of this host in the sandbox. May be repeated.", kind=LIST,
           metavar="SRC:DST[:ro]"),
    Option("secret", ("--secret",), "Give it a secret, as a file in /run/secrets or in its environment, or have "
           "one added to its requests for a domain. May be repeated.", kind=LIST,
           metavar="NAME[,as=env|proxy][,target=T]"),
    Option("security", ("--security",), "Harden it further: seccomp_profile=ember, drop_capabilities=ALL, "
           "kernel_lockdown=integrity and others. May be repeated.", kind=LIST, metavar="KEY=VALUE"),
    Option("network", ("--network",), "What it may reach: none, open (every public address), or a contract's file.",
           metavar="none|open|FILE", default="none"),
    Option("allow", ("--allow",), "Let it reach this and nothing else: example.org:443, *.example.org, "
           "203.0.113.0/24:80,443. May be repeated. With /direct (git.example.org:22/direct) a domain is open to more "
           "than TLS and HTTP.", kind=LIST, metavar="TO[:PORTS]"),
    Option("publish", ("--publish", "-p"), "Show a port of the sandbox on this host, at 127.0.0.1 unless another "
           "address is given. May be repeated.", kind=LIST, metavar="[IP:]HOST:GUEST"),
    INTERACTIVE,
    TTY,
    Option("detach", ("-d", "--detach"), "Print the sandbox's id and leave it running.", kind=FLAG),
    Option("name", ("--name",), "A name to find it by.", metavar="NAME"),
    Option("label", ("--label",), "A label to find it by. May be repeated.", kind=LIST, metavar="KEY=VALUE"),
    Option("json", ("--json",), "Print one JSON object with the result instead of the output.", kind=FLAG),
    Option("quiet", ("-q", "--quiet"), "No status lines.", kind=FLAG),
    Option("verbose", ("-v", "--verbose"), "Status lines even when standard error is no terminal.", kind=FLAG),
)  # fmt: skip
EXEC = (
    INTERACTIVE,
    TTY,
    ENV,
    WORKDIR,
    Option("timeout", ("--timeout",), "Kill the command after this long (exit status 124).", metavar="DURATION"),
)
