"""An artifact inside a FastAPI service of your own.

    pip install fastapi uvicorn
    optc compile examples/tiny-llama -o build/tiny.optc
    OPTC_ARTIFACT=build/tiny.optc uvicorn --app-dir examples embed_in_fastapi:app
    curl -N localhost:8000/complete -d '{"prompt": "def main(", "stream": true}' -H 'content-type: application/json'

The engine lives as long as the application. A client that goes away once its answer has begun ends its request, and the memory of
its keys and values is free again within a step; one that goes before that ends with the request's timeout.
With several worker processes each loads the model; one process uses all cores.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
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
    try:
        first = await anext(outputs)  # what is wrong with a request shows here, before anything was answered
    except OverloadedError as error:
        raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
    except ClosedError as error:
        raise HTTPException(503, str(error)) from error
    except OptcError as error:
        raise HTTPException(400, str(error)) from error
    if body.stream:
        return StreamingResponse(pieces(first, outputs), media_type="text/plain")
    text, last = first.text, first
    async for last in outputs:
        text += last.text
        if await request.is_disconnected():
            await outputs.aclose()
            break
    return {"text": text, "finish_reason": last.finish_reason, "error": last.error}


async def pieces(first: RequestOutput, rest: AsyncGenerator[RequestOutput, None]) -> AsyncIterator[str]:
    """Texts as they come. Starlette closes this when the client goes, which ends the request."""
    try:
        yield first.text
        async for output in rest:
            yield output.text
            if output.error is not None:
                raise RuntimeError(output.error)  # the connection breaks off, or the answer would look complete
    finally:
        await rest.aclose()


@app.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Whether the engine runs, and how it stands."""
    engine: AsyncEngine = request.app.state.engine
    if not engine.is_healthy:
        raise HTTPException(503, "the engine does not run")
    return asdict(await asyncio.to_thread(engine.stats))  # which waits for the step that runs
