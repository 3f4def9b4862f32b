"""The examples run as they say."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import optc
from optc import LLM, AsyncEngine
from optc.errors import DeadlineError

from .engine_cases import check_empty

EXAMPLES = Path(optc.__file__).parent / "examples"


def test_batch_offline(artifact: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown\n\nOù est la\nThe quick brown\n", encoding="utf-8")
    command = [sys.executable, EXAMPLES / "batch_offline.py", artifact, prompts, "-o", tmp_path / "out.jsonl"]
    done = subprocess.run([*map(str, command), "--max-tokens", "9"], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == ["The quick brown", "Où est la", "The quick brown"]
    assert all(record["logprob"] < 0 and record["error"] is None for record in records)
    assert done.stdout.startswith("3 completions")


@pytest.fixture(scope="module")
def client(artifact: Path) -> Iterator[Any]:
    testclient = pytest.importorskip("fastapi.testclient")
    spec = importlib.util.spec_from_file_location("embed_in_fastapi", EXAMPLES / "embed_in_fastapi.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["embed_in_fastapi"] = module  # where FastAPI looks for the types of a handler
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTC_ARTIFACT", str(artifact))
        spec.loader.exec_module(module)
        with testclient.TestClient(module.app) as client:
            yield client
    del sys.modules["embed_in_fastapi"]


def test_embedded_in_fastapi(client: Any, artifact: Path) -> None:
    with LLM(artifact) as llm:
        wanted = llm.generate("The quick", max_tokens=12)[0]
    body = {"prompt": "The quick", "max_tokens": 12}
    assert client.post("/complete", json=body).json() == {
        "text": wanted.text,
        "finish_reason": wanted.finish_reason,
    }
    assert client.post("/complete", json=body | {"stream": True}).text == wanted.text
    assert client.get("/health").json()["finished"] == {wanted.finish_reason: 2}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"prompt": ""}, 422),
        ({"prompt": "x", "max_tokens": 0}, 422),
        ({"prompt": "x", "no_such": 1}, 422),
        ({"prompt": "x", "stop": [""]}, 400),
        ({"prompt": "x " * 400}, 400),
    ],
    ids=str,
)
def test_bad_bodies(body: dict[str, Any], status: int, client: Any) -> None:
    assert client.post("/complete", json=body).status_code == status
    assert client.post("/complete", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    for _ in range(100):
        if not client.app.state.engine.engine.has_work():
            break
        time.sleep(0.01)
    check_empty(client.app.state.engine.engine)


class Leaving:
    """A client that is gone."""

    async def is_disconnected(self) -> bool:
        return True


@pytest.mark.parametrize("when", ["before the first token", "while tokens come"])
def test_a_client_that_goes(when: str, client: Any, artifact: Path) -> None:
    module = sys.modules["embed_in_fastapi"]

    async def main() -> None:
        async with AsyncEngine(artifact, max_num_seqs=1) as engine:
            real = engine.engine.executor.run

            def slow(inputs: Any) -> Any:
                time.sleep(0.02)
                return real(inputs)

            engine.engine.executor.run = slow  # type: ignore[method-assign]
            if when == "while tokens come":
                watched = module.while_connected(engine.generate([5], max_tokens=200, ignore_eos=True), Leaving())
                tokens = sum([len(output.token_ids) async for output in watched])
                assert 2 < tokens < 100 and engine.engine.stats().finished == {"abort": 1}
                return
            async with aclosing(engine.generate([5], max_tokens=200, ignore_eos=True)) as holder:
                await anext(holder)
                watched = module.while_connected(engine.generate([6], max_tokens=20), Leaving())
                assert [output async for output in watched] == []
                assert engine.engine.stats().finished == {"abort": 1}

    asyncio.run(main())


def test_what_went_wrong_is_no_answer(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = client.app.state.engine.engine

    def fail(inputs: Any) -> Any:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "run", fail)
        for stream in (False, True):
            response = client.post("/complete", json={"prompt": "x", "stream": stream})
            assert response.status_code == 500 and "out of order" in response.json()["detail"]
    late = DeadlineError("the request did not end within 60 s")
    with monkeypatch.context() as patch:
        patch.setattr(
            engine,
            "_end_late",
            lambda ended: ended.extend(
                each for r in list(engine._timed) for each in engine._finish(r, "timeout", late)
            ),
        )
        response = client.post("/complete", json={"prompt": "x"})
    assert response.status_code == 504 and "60 s" in response.json()["detail"]
    assert client.post("/complete", json={"prompt": "x", "max_tokens": 2}).status_code == 200
