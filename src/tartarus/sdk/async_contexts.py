"""The async twin of `contexts`."""

from __future__ import annotations

from types import TracebackType

from tartarus.sdk import calls
from tartarus.sdk.async_transport import AsyncTransport
from tartarus.sdk.contexts import MAX_OUTPUT_BYTES, OnOutput
from tartarus.sdk.decoding import CellCollector, LineDecoder
from tartarus.sdk.results import CodeFailed, CodeResult


class AsyncCodeContext:
    """An interpreter of its own in a sandbox, made by `AsyncSandbox.open_context`."""

    def __init__(self, transport: AsyncTransport, sandbox_id: str, context_id: str) -> None:
        self._transport = transport
        self._sandbox_id = sandbox_id
        self.id = context_id

    async def run(
        self,
        code: str,
        *,
        timeout_s: float | None = None,
        check: bool = False,
        on_stdout: OnOutput | None = None,
        on_stderr: OnOutput | None = None,
    ) -> CodeResult:
        """Run one cell; see `AsyncSandbox.run_code`."""
        return await run_cell(
            self._transport, self._sandbox_id, self.id, code, timeout_s=timeout_s, check=check,
            on_stdout=on_stdout, on_stderr=on_stderr,
        )  # fmt: skip

    async def interrupt(self) -> None:
        """Stop the running cell, as Ctrl-C would; the variables stay."""
        await self._transport.call(calls.interrupt(self._sandbox_id, self.id))

    async def close(self) -> None:
        """End the interpreter and forget its variables."""
        await self._transport.call(calls.close_context(self._sandbox_id, self.id))

    async def __aenter__(self) -> AsyncCodeContext:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def run_cell(
    transport: AsyncTransport,
    sandbox_id: str,
    context_id: str | None,
    code: str,
    *,
    timeout_s: float | None,
    check: bool,
    on_stdout: OnOutput | None,
    on_stderr: OnOutput | None,
) -> CodeResult:
    """Run one cell and gather its events; the callbacks get output as it comes."""
    told = {"stdout": on_stdout, "stderr": on_stderr}
    lines, cell = LineDecoder(), CellCollector(MAX_OUTPUT_BYTES)
    async with transport.stream(calls.run_code(sandbox_id, code, context_id, timeout_s)) as answer:
        async for part in answer:
            for event in lines.receive(part):
                tell = told.get(str(event.get("type")))
                if tell is not None:
                    tell(str(event.get("text", "")))
                cell.add(event)
    result = cell.result()
    if check and not result.ok:
        raise CodeFailed.of(result)
    return result
