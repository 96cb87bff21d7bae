"""What the app says to whoever does not come from its own page: addresses, floods, names that are not there."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

from diffusion_lens import ui
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio import status as status_module
from diffusion_lens.studio.studio import Studio
from diffusion_lens.ui import front, sessions
from diffusion_lens.ui.front import Front, Uploads


@pytest.fixture(scope="module")
def served(tiny_lens: DiffusionLens) -> Iterator[tuple[str, Any]]:
    """The app's launch with a page of one button; its address, and the app."""
    with gr.Blocks() as demo:
        gr.Button().click(lambda: None, None, None, queue=True)
    demo.queue(max_size=1)
    options = {**ui.launch_options(), **front.options([Studio(tiny_lens)])}
    _, url, _ = demo.launch(**options, prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    yield url.rstrip("/"), demo
    demo.close()


def join(url: str, fn_index: int, data: list[Any] | None = None) -> httpx.Response:
    body = {"fn_index": fn_index, "data": data or [], "session_hash": "someone", "event_data": None}
    return httpx.post(f"{url}/gradio_api/queue/join", json=body)


@pytest.mark.parametrize("host", ["evil.example/<script>", "a b", "x" * 300, "[::1", "h:999999", "h@i"])
def test_an_address_that_cannot_be_is_refused_in_a_sentence(served: tuple[str, Any], host: str) -> None:
    for name in ("Host", "X-Forwarded-Host"):
        answer = httpx.get(served[0], headers={name: host})
        assert (answer.status_code, answer.json()["detail"]) == (400, front.ADDRESS)


@pytest.mark.parametrize("host", ["localhost:7860", "[::1]:80", "name.hf.space", "127.0.0.1"])
def test_addresses_that_can_be_get_the_page(served: tuple[str, Any], host: str) -> None:
    answer = httpx.get(served[0], headers={"Host": host})
    assert answer.status_code == 200 and "window.gradio_config" in answer.text


def test_unknown_functions_and_a_full_queue_are_told_in_our_own_words(served: tuple[str, Any]) -> None:
    url, demo = served
    answer = join(url, 4711)
    assert (answer.status_code, answer.json()["detail"]) == (404, front.UNKNOWN)
    unknown = httpx.post(f"{url}/gradio_api/run/nothing", json={"data": []})
    assert unknown.status_code == 404 and unknown.json()["detail"] == front.UNKNOWN
    demo._queue.max_size = 0
    try:
        full = join(url, 0)
    finally:
        demo._queue.max_size = 1
    assert (full.status_code, full.json()["detail"]) == (503, front.BUSY)
    assert join(url, 0).status_code == 200


def test_bytes_are_bounded(served: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    url, _ = served
    monkeypatch.setattr(front, "MAX_BODY", 1000)
    assert join(url, 0, ["x" * 2000]).json()["detail"] == front.TOO_LARGE
    monkeypatch.setattr(front, "MAX_FILE", 1000)
    sent = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", b"x" * 2000)})
    assert (sent.status_code, sent.json()["detail"]) == (413, front.TOO_LARGE)


def test_uploads_of_an_hour_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "MAX_UPLOADS", 10)
    now = [0.0]
    uploads = Uploads(lambda: now[0])
    assert uploads.take(6) and uploads.take(4) and not uploads.take(1)
    now[0] = front.HOUR + 1
    assert uploads.take(10) and not uploads.take(1)


def test_health_and_status(served: tuple[str, Any]) -> None:
    url, _ = served
    assert httpx.get(f"{url}/health").json() == {"ok": True}
    told = httpx.get(f"{url}/status").json()
    assert told["waiting"] == 0 and told["drawing"] is False
    assert told["lenses"]["tiny"]["runs"] == 0


@pytest.mark.anyio
async def test_a_surprise_is_a_sentence_and_an_answer_under_way_is_not_answered_twice() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError("secret")

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    door = Front(broken, lambda: None)  # type: ignore[arg-type,return-value]
    await door({"type": "http", "path": "/x", "headers": []}, receive, send)
    assert sent[0]["status"] == 500 and json.loads(sent[1]["body"])["detail"] == front.FAILED
    sent.clear()
    with pytest.raises(ZeroDivisionError):
        await door({"type": "http", "path": "/late", "headers": []}, receive, send)
    assert len(sent) == 1


def test_sessions_of_who_left_are_let_go_after_a_while_and_no_others() -> None:
    with gr.Blocks() as demo:
        gr.State(1)
    demo.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    try:
        holder, start = demo.state_holder, datetime.now()
        for name in ("left", "back", "here"):
            holder[name].is_closed = name != "here"
        holder.time_last_used["back"] = start + timedelta(seconds=100)
        late = lambda: start + timedelta(seconds=130)  # noqa: E731
        assert sessions.free_left(demo, 60.0, late) == 1
        assert set(holder.session_data) == {"back", "here"} == set(holder.time_last_used)
    finally:
        demo.close()


def test_status_says_what_is_kept(tiny_lens: DiffusionLens) -> None:
    studio = Studio(tiny_lens)
    from diffusion_lens.studio import state

    studio.draw(state.default_view(tiny_lens), "me")
    told = status_module.status([studio])
    kept = told.lenses["tiny"]
    assert kept.runs == kept.rows == 1 and kept.runs_mb > 0 and kept.model_loaded
    assert any("1 unedited runs" in line for line in told.lines) and told.memory_mb >= 0
    status_module.give_back()


def test_app_py_ends_in_a_sentence_where_it_cannot_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["app.py", "--lens", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).parents[2] / "app.py"), run_name="__main__")
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip()
    assert "There is no folder" in told and "Traceback" not in told and len(told.splitlines()) == 1
