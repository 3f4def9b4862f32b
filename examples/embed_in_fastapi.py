"""An artifact inside a FastAPI service of your own.

    pip install fastapi uvicorn
    optc compile examples/tiny-llama -o build/tiny.optc
    OPTC_ARTIFACT=build/tiny.optc uvicorn --app-dir examples embed_in_fastapi:app
    curl -N localhost:8000/complete -d '{"prompt": "def main(", "stream": true}' -H 'content-type: application/json'

The engine lives as long as the application. A client that goes away ends its request within half a second, and the memory of
its keys and values is free again within a step.
With several worker processes each loads the model; one process uses all cores.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from optc import AsyncEngine
from optc.errors import ClosedError, OptcError, OverloadedError
from optc.runtime import RequestOutput


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncEngine(os.environ["OPTC_ARTIFACT"], max_queued_requests=256) as engine:
        app.state.engine = engine
        yield


app = FastAPI(lifespan=lifespan)


class Body(BaseModel):
    """What a client may ask for; everything else is refused."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1, max_length=100_000)
    max_tokens: int = Field(128, ge=1, le=4096)
    temperature: float = Field(0.0, ge=0, le=2)
    stop: list[str] = Field(default_factory=list, max_length=4)
    stream: bool = False


@app.post("/complete", response_model=None)
async def complete(body: Body, request: Request) -> dict[str, Any] | StreamingResponse:
    """The completion of a prompt, at once or as it comes."""
    engine: AsyncEngine = request.app.state.engine
    outputs = engine.generate(
        body.prompt, max_tokens=body.max_tokens, temperature=body.temperature, stop=body.stop, timeout=60
    )
    watched = while_connected(outputs, request)
    try:
        first = await anext(watched)  # what is wrong with a request shows here, before anything was answered
    except StopAsyncIteration as gone:
        raise HTTPException(499, "the client went away") from gone
    except OverloadedError as error:
        raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
    except ClosedError as error:
        raise HTTPException(503, str(error)) from error
    except OptcError as error:
        raise HTTPException(400, str(error)) from error
    check(first)
    if body.stream:
        return StreamingResponse(pieces(first, watched), media_type="text/plain")
    text, last = first.text, first
    async for last in watched:
        check(last)
        text += last.text
    return {"text": text, "finish_reason": last.finish_reason}


async def while_connected(
    outputs: AsyncGenerator[RequestOutput, None], request: Request
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs, as long as the client is there to get them; closing `outputs` ends the request."""
    looked = time.monotonic()
    async with aclosing(outputs):
        while True:
            coming = asyncio.ensure_future(anext(outputs, None))
            try:
                while not coming.done():
                    await asyncio.wait([coming], timeout=0.5)
                    if time.monotonic() - looked > 0.5:
                        looked = time.monotonic()
                        if await request.is_disconnected():
                            return
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait([coming])
            if (output := coming.result()) is None:
                return
            yield output


def check(output: RequestOutput) -> None:
    """Refuse to answer what went wrong on the way as if it were whole."""
    if output.error is not None:
        raise HTTPException(504 if output.finish_reason == "timeout" else 500, output.error)


async def pieces(first: RequestOutput, rest: AsyncGenerator[RequestOutput, None]) -> AsyncIterator[str]:
    """Texts as they come. Starlette closes this when the client goes, which ends the request."""
    async with aclosing(rest):
        yield first.text
        async for output in rest:
            yield output.text
            if output.error is not None:
                raise RuntimeError(output.error)  # the connection breaks off, or the answer would look complete


@app.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether the engine runs, and how it stands."""
    engine: AsyncEngine = request.app.state.engine
    if not engine.is_healthy:
        raise HTTPException(503, "the engine does not run")
    return asdict(await asyncio.to_thread(engine.stats))  # which waits for the step that runs
