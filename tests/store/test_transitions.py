"""Compare-and-set: only moves of the table ever succeed, and of many at once exactly one."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartarus.model.errors import DaemonUnavailable, InvalidState, SandboxNotFound
from tartarus.model.sandbox import Reason
from tartarus.model.states import ALIVE, TERMINAL, TRANSITIONS, State
from tartarus.store import SandboxStore

from .conftest import a_record

pytestmark = pytest.mark.anyio
ANY = frozenset(State)


async def test_a_move_of_the_table_changes_state_fields_and_version(store: SandboxStore) -> None:
    record = await store.insert(a_record(), State.SCHEDULED, State.STARTING)
    moved = await store.transition(record.id, {State.STARTING}, State.RUNNING, start_ms=4.5, warm=True)
    assert (moved.state, moved.start_ms, moved.warm, moved.version) == (State.RUNNING, 4.5, True, 3)
    assert await store.get(record.tenant, record.id) == moved


async def test_a_move_that_the_table_lacks_names_both_states(store: SandboxStore) -> None:
    record = await store.insert(a_record())
    with pytest.raises(InvalidState, match="pending can't become running"):
        await store.transition(record.id, ANY, State.RUNNING)
    assert (await store.get(record.tenant, record.id)).state is State.PENDING


async def test_an_unexpected_current_state_is_refused_and_named(store: SandboxStore) -> None:
    record = await store.insert(a_record(), State.SCHEDULED)
    with pytest.raises(InvalidState, match="is scheduled; becoming paused needs it running"):
        await store.transition(record.id, {State.RUNNING}, State.PAUSED)


async def test_several_moves_in_one_step_are_all_or_nothing(store: SandboxStore) -> None:
    record = await store.insert(a_record(), State.SCHEDULED, State.STARTING, State.RUNNING)
    with pytest.raises(InvalidState):
        await store.transition(record.id, {State.RUNNING}, State.STOPPING, State.PAUSED)
    assert (await store.get(record.tenant, record.id)).state is State.RUNNING
    ended = await store.transition(
        record.id, {State.RUNNING}, State.STOPPING, State.KILLED, reason=Reason.USER_REQUEST, message="bye"
    )
    assert (ended.state, ended.reason, ended.message, ended.version) == (
        State.KILLED, Reason.USER_REQUEST, "bye", 5,
    )  # fmt: skip
    assert ended.ended_at is not None


async def test_no_terminal_state_is_ever_left(store: SandboxStore) -> None:
    for target in sorted(TERMINAL):
        path = (State.LOST,) if target is State.LOST else (State.SCHEDULED, State.STARTING, State.STOPPING, target)
        record = await store.insert(a_record(), *path)
        for following in State:
            with pytest.raises(InvalidState):
                await store.transition(record.id, ANY, following)


async def test_unknown_sandboxes_and_fields(store: SandboxStore) -> None:
    with pytest.raises(SandboxNotFound):
        await store.transition("sbx-nothing", ANY, State.RUNNING)
    record = await store.insert(a_record())
    with pytest.raises(TypeError, match="tenant"):
        await store.transition(record.id, ANY, State.SCHEDULED, tenant="uid-2")


async def test_of_many_concurrent_moves_exactly_one_succeeds(store: SandboxStore) -> None:
    record = await store.insert(a_record(), State.SCHEDULED, State.STARTING, State.RUNNING)
    outcomes = await asyncio.gather(
        *(store.transition(record.id, {State.RUNNING}, State.STOPPING) for _ in range(64)), return_exceptions=True
    )
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1
    assert all(isinstance(outcome, InvalidState) for outcome in outcomes if isinstance(outcome, BaseException))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(State)), st.sampled_from(list(State))), max_size=30))
def test_any_storm_of_moves_leaves_a_history_of_the_table(moves: list[tuple[State, State]]) -> None:
    """Whatever is tried at the same time: the moves that succeeded form one path through the table."""

    async def storm() -> None:
        with tempfile.TemporaryDirectory() as directory:
            store = await SandboxStore.open(Path(directory) / "state.db")
            record = await store.insert(a_record())
            outcomes = await asyncio.gather(
                *(store.transition(record.id, {expected}, target) for expected, target in moves),
                return_exceptions=True,
            )
            final = await store.get(record.tenant, record.id)
            await store.close()
        assert all(isinstance(outcome, InvalidState) for outcome in outcomes if isinstance(outcome, BaseException))
        succeeded = [
            (outcome.version, expected, target)
            for (expected, target), outcome in zip(moves, outcomes, strict=True)
            if not isinstance(outcome, BaseException)
        ]
        state = State.PENDING
        for number, (version, expected, target) in enumerate(sorted(succeeded), start=1):
            assert version == number
            assert expected is state
            assert target in TRANSITIONS[state]
            state = target
        assert final.state is state
        assert (final.ended_at is None) == (final.state in ALIVE)

    asyncio.run(storm())


async def test_a_cancelled_caller_does_not_undo_or_block(store: SandboxStore) -> None:
    record = await store.insert(a_record(), State.SCHEDULED)
    task = asyncio.create_task(store.transition(record.id, {State.SCHEDULED}, State.STARTING))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The single writer works in order: when this answers, the move above has been made.
    await store.insert(a_record())
    assert (await store.get(record.tenant, record.id)).state is State.STARTING


async def test_one_bad_job_does_not_take_its_batch_along(store: SandboxStore) -> None:
    taken = await store.insert(a_record())
    twins = [store.insert(a_record(id=taken.id)) for _ in range(3)]
    good = [store.insert(a_record()) for _ in range(20)]
    outcomes = await asyncio.gather(*good[:10], *twins, *good[10:], return_exceptions=True)
    assert sum(isinstance(outcome, BaseException) for outcome in outcomes) == 3
    assert len(await store.alive()) == 21


async def test_a_closed_store_says_so(path: Path) -> None:
    store = await SandboxStore.open(path)
    await store.close()
    with pytest.raises(DaemonUnavailable):
        await store.insert(a_record())


async def test_a_record_that_is_known_is_not_read_anew(store: SandboxStore) -> None:
    record = await store.insert(a_record(), State.SCHEDULED, State.STARTING)
    running = await store.transition(record.id, {State.STARTING}, State.RUNNING, known=record)
    assert (running.state, running.version) == (State.RUNNING, record.version + 1)
    assert await store.get(running.tenant, running.id) == running


async def test_what_is_known_wrongly_changes_nothing(store: SandboxStore) -> None:
    record = await store.insert(a_record(), State.SCHEDULED, State.STARTING)
    running = await store.transition(record.id, {State.STARTING}, State.RUNNING, message="as it is")
    # Old, and so the stored one decides.
    paused = await store.transition(record.id, {State.STARTING, State.RUNNING}, State.PAUSED, known=record)
    assert (paused.message, paused.version) == ("as it is", running.version + 1)
    with pytest.raises(InvalidState, match="is paused"):
        await store.transition(record.id, {State.RUNNING}, State.PAUSED, known=running)
    with pytest.raises(InvalidState, match="is paused"):
        await store.transition(record.id, {State.STARTING}, State.HIBERNATED, known=record)
    assert await store.get(record.tenant, record.id) == paused
