"""Building: each needed stage's steps in order, every layer cached by what it is made of.

A layer's key is a digest of the layers below it and of all that the step depends on: a RUN's arguments, variables,
directory and user; a COPY's files, by content. So a changed label costs nothing, and a changed file what comes
after it. Layers live in the LayerStore, which makes each once, whole or not at all.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from tartarus.images.dockerfile import instructions as are
from tartarus.images.dockerfile.config import absolute, command, configure, plain, workdir
from tartarus.images.dockerfile.context import Watch
from tartarus.images.dockerfile.copying import (
    CopyJob,
    InlineFile,
    Placement,
    has_directory,
    make_directory,
    parse_mode,
)
from tartarus.images.dockerfile.limits import CopyLimits
from tartarus.images.dockerfile.output import StepOutput
from tartarus.images.dockerfile.parser import parse
from tartarus.images.dockerfile.planning import Plan, StagePlan, make_plan
from tartarus.images.dockerfile.steps import Base, Built, Event, RunStep, StepRunner, Watcher
from tartarus.images.dockerfile.variables import Scope
from tartarus.images.dockerfile.words import Budget, printable
from tartarus.images.oci import ImageConfig, host_platform
from tartarus.images.paths import SYSTEM_PATH
from tartarus.images.store import LayerStore
from tartarus.model.errors import (
    BuildFailed,
    CommandNotFound,
    ImageRefused,
    InvalidRequest,
    NotExecutable,
    ResourceLimit,
    TartarusError,
    TimeLimit,
)

_FORMAT: Final = 1
"""Part of every key: to be raised when a layer of the same key would come out differently."""
_NAME: Final = "build-"
_STEP_ERRORS: Final = (CommandNotFound, ImageRefused, InvalidRequest, NotExecutable, ResourceLimit, TimeLimit)

T = TypeVar("T")


class BuildRequest(msgspec.Struct, frozen=True):
    """A build. `dockerfile` is its text; `context` the directory that COPY takes from, which may be hostile.

    `cache_scope` says who shares layers: two builds with different ones share nothing that a step of theirs made.
    It must name the tenant, since what a RUN fetched is its tenant's word, and what else decides over a RUN's result
    without being in the Dockerfile, such as the kind of network; a fresh one builds without the cache.
    """

    dockerfile: str
    context: Path | None = None
    build_args: Mapping[str, str] = {}
    target: str = ""
    cache_scope: str = ""
    limits: CopyLimits = CopyLimits()


class _Failed(Exception):
    """Leaves the layer store's build, so that nothing is kept of it, and goes no further."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _State(msgspec.Struct):
    """A stage as far as it is built. `layers` top first; `names` are our own layers', lowest first."""

    layers: tuple[Path, ...]
    key: str
    config: ImageConfig
    scope: Scope
    names: tuple[str, ...] = ()
    cmd_is_own: bool = False


async def build(
    request: BuildRequest, runner: StepRunner, store: LayerStore, uid_base: int | None, watcher: Watcher
) -> Built:
    """Build a Dockerfile's target.

    `uid_base` is added to the owners of files (None: all are the daemon's user's). `watcher` is called in the event
    loop and must not block.

    Raises InvalidRequest for a Dockerfile, arguments or a target that make no sense, before anything is done;
    BuildFailed for a step that failed; what `runner` raises for a base; NoSpace.
    """
    budget = Budget()
    dockerfile = await asyncio.to_thread(parse, request.dockerfile)
    plan = await asyncio.to_thread(make_plan, dockerfile, request.target, request.build_args, host_platform(), budget)
    return await _Build(request, runner, store, uid_base, watcher, plan, budget, dockerfile.escape).all()


class _Build:
    def __init__(
        self,
        request: BuildRequest,
        runner: StepRunner,
        store: LayerStore,
        uid_base: int | None,
        watcher: Watcher,
        plan: Plan,
        budget: Budget,
        escape: str,
    ) -> None:
        self._request = request
        self._runner = runner
        self._store = store
        self._uid_base = uid_base
        self._watcher = watcher
        self._plan = plan
        self._budget = budget
        self._escape = escape
        self._stages: dict[int, _State] = {}
        self._bases: dict[str, Base] = {}
        self._notes: list[str] = []
        self._number = 0
        self._cached = 0
        self._step: are.Instruction | None = None

    async def all(self) -> Built:
        """Build all planned stages; the last one is the result."""
        for plan in self._plan.stages:
            self._begin(plan.stage.start)
            state = await self._start(plan)
            self._tell("done")
            for step in plan.stage.steps:
                self._begin(step)
                await self._do(state, step, plan)
            self._stages[plan.stage.index] = state
        return Built(
            layers=state.layers,
            config=state.config,
            key=self._key("result", state.key, state.config),
            names=state.names,
            notes=tuple(self._notes),
            cached=self._cached,
            steps=self._plan.steps,
        )

    async def _start(self, plan: StagePlan) -> _State:
        scope = Scope(self._request.build_args, self._plan.global_args, self._budget, self._escape)
        if isinstance(plan.base, int):
            below = self._stages[plan.base]
            scope.args.update(below.scope.args)
            state = _State(below.layers, below.key, below.config, scope, below.names)
        elif plan.base:
            base = await self._base(plan.base)
            state = _State(base.layers, self._key("base", base.key), base.config, scope)
        else:
            state = _State((), self._key("scratch"), ImageConfig(), scope)
        # As Docker has it: an image without a PATH gets one, and ENV can add to it.
        state.config = msgspec.structs.replace(state.config, env={"PATH": SYSTEM_PATH, **state.config.env})
        scope.env = state.config.env
        return state

    async def _do(self, state: _State, step: are.Instruction, plan: StagePlan) -> None:
        try:
            if isinstance(step, are.Run):
                await self._run(state, step)
            elif isinstance(step, are.Copy):
                await self._copy(state, step, plan)
            elif isinstance(step, are.Workdir):
                await self._workdir(state, step)
            else:
                self._describe(state, step)
                self._tell("done")
        except (InvalidRequest, ImageRefused) as error:
            shown = printable(error)
            why = shown.what if not shown.why else f"{shown.what}: {shown.why}"
            raise BuildFailed(self._where(), why=why, fix=shown.fix) from error

    def _describe(self, state: _State, step: are.Instruction) -> None:
        if isinstance(step, are.Arg):
            state.scope.declare(step)
        elif isinstance(step, are.Noted):
            self._notes.append(f"line {step.line}: {step.why}")
            self._tell("note", step.why)
        else:
            state.config = configure(state.config, step, state.scope, cmd_is_own=state.cmd_is_own)
            state.scope.env = state.config.env
            state.cmd_is_own = state.cmd_is_own or isinstance(step, are.Cmd)

    async def _run(self, state: _State, step: are.Run) -> None:
        if not state.layers:
            raise InvalidRequest(
                "there is nothing to run it with",
                why="the image is empty",
                fix="build on an image, or COPY a program first",
            )
        argv = command(step.argv, in_shell=step.in_shell, config=state.config)
        env, counted = state.scope.run_environment()
        config = state.config
        key = self._key("run", state.key, argv, sorted(counted.items()), config.workdir, config.user)
        run = RunStep(state.layers, argv, env, config.workdir or "/", config.user, step.text)
        output = StepOutput(functools.partial(self._tell, "output"))

        async def make(tree: Path, lock: int) -> dict[str, Any]:
            status = await self._runner.run(run, tree, lock, output)
            if status != 0:
                raise _Failed(status)
            return self._facts(step)

        try:
            await self._layer(state, key, make)
        except _Failed as error:
            await self._explain(state, f"exit status {error.status}", output)
        except _STEP_ERRORS as error:
            await self._explain(state, str(error), output)

    async def _explain(self, state: _State, reason: str, output: StepOutput) -> None:
        """Raise BuildFailed, with a template to look into where there is something to look into."""
        last = output.last_lines()
        fix = ""
        if state.layers:
            try:
                template = await self._runner.keep_failed(state.layers, state.config)
                fix = f"open a shell there: tartarus run -it --template {template} -- sh"
            except (TartarusError, OSError) as error:
                # The step's failure is what people must see.
                self._tell("note", f"the state before the step could not be kept: {error}")
        raise BuildFailed(self._where(), why=f"{reason}\n{last}\n" if last else reason, fix=fix)

    async def _copy(self, state: _State, step: are.Copy, plan: StagePlan) -> None:
        sources = [plain(state.scope.expand(source)) for source in step.sources]
        inline = [
            InlineFile(each.name, state.scope.expand(each.content, quotes=False) if each.expand else each.content)
            for each in step.inline
        ]
        placement = Placement(
            destination=_destination(state.scope.expand(step.destination), state.config.workdir),
            chown=plain(state.scope.expand(step.chown)),
            mode=parse_mode(state.scope.expand(step.chmod)),
            keep_owner=bool(step.origin),
            unpack=step.unpack,
        )
        source, what, origin = await self._source(step, plan)
        stop = threading.Event()
        watch = Watch(self._request.limits, stop)
        job = CopyJob(state.layers, self._uid_base, source, what, origin, sources, inline, placement, watch)

        async def make(place: Path, lock: int) -> dict[str, Any]:
            del lock  # nothing but this process writes
            await _apart(stop, job.write, place)
            return self._facts(step)

        try:
            await self._layer(state, self._key("copy", state.key, *await _apart(stop, job.identity)), make)
        finally:
            job.close()

    async def _source(self, step: are.Copy, plan: StagePlan) -> tuple[tuple[Path, ...], str, str]:
        """(what a COPY takes from, its name for people, the key of the stage or image that it is)."""
        if not step.origin:
            if step.sources and self._request.context is None:
                raise InvalidRequest(
                    "this build has no context to copy from", fix="give the directory that the files are in"
                )
            context = self._request.context
            return (context,) if step.sources and context is not None else (), "the build context", ""
        found = plan.origins[step.origin]
        if isinstance(found, int):
            layers, key, what = self._stages[found].layers, self._stages[found].key, f"the stage {step.origin!r}"
        else:
            base = await self._base(found)
            layers, key, what = base.layers, self._key("base", base.key), f"the image {found!r}"
        if not layers:
            raise InvalidRequest(f"{what} has no files")
        return layers, what, key

    async def _workdir(self, state: _State, step: are.Workdir) -> None:
        path = workdir(state.config, step, state.scope)
        if path != "/" and not await asyncio.to_thread(has_directory, state.layers, self._uid_base, path):
            stop = threading.Event()

            async def make(place: Path, lock: int) -> dict[str, Any]:
                del lock
                await _apart(stop, make_directory, place, state.layers, self._uid_base, path, state.config.user)
                return self._facts(step)

            await self._layer(state, self._key("workdir", state.key, path, state.config.user), make)
        else:
            self._tell("done")
        state.config = msgspec.structs.replace(state.config, workdir=path)

    async def _layer(self, state: _State, key: str, make: Callable[[Path, int], Any]) -> None:
        """Find or make the layer, and put it on top."""
        name = f"{_NAME}{key}"
        place = await asyncio.to_thread(self._store.find, name)
        if place is None:
            place = await self._store.get(name, make)
            self._tell("done")
        else:
            self._cached += 1
            self._tell("cached")
        state.layers = (place, *state.layers)
        state.key = key
        state.names = (*state.names, name)

    async def _base(self, reference: str) -> Base:
        if reference not in self._bases:
            self._bases[reference] = await self._runner.base(reference, functools.partial(self._tell, "progress"))
        return self._bases[reference]

    def _begin(self, step: are.Instruction) -> None:
        self._number += 1
        self._step = step
        self._tell("started")

    def _tell(self, kind: Any, text: str = "") -> None:
        step = self._step
        assert step is not None
        self._watcher(Event(kind, text or step.text, self._number, self._plan.steps, step.line))

    def _where(self) -> str:
        assert self._step is not None
        return f"step {self._number} of {self._plan.steps} failed (line {self._step.line}: {self._step.text})"

    def _facts(self, step: are.Instruction) -> dict[str, Any]:
        return {"step": step.text, "line": step.line}

    def _key(self, *inputs: object) -> str:
        scope = (_FORMAT, self._request.cache_scope, self._uid_base)
        return hashlib.sha256(msgspec.msgpack.encode((scope, inputs))).hexdigest()


def _destination(text: str, base: str) -> str:
    """Absolute, with a slash at its end where it names a directory whatever is there."""
    if not plain(text):
        raise InvalidRequest("the destination is empty")
    path = absolute(text, base)
    is_folder = text.endswith(("/", "/.", "/..")) or text in {".", ".."}
    return f"{path.rstrip('/')}/" if is_folder or path == "/" else path


async def _apart(stop: threading.Event, function: Callable[..., T], *arguments: Any) -> T:
    """Work in a thread. When it is cancelled, the thread is told to end and waited for: what it uses is closed next."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError:
                continue
        if not work.cancelled():
            work.exception()
        raise
