"""The named endpoints, by gradio's client and by an MCP client: Python's own numbers, and mistakes as sentences."""

from __future__ import annotations

import ast
import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from lens_fixtures import PROMPTS
from PIL import Image

from diffusion_lens import ui
from diffusion_lens.lens.lens import DiffusionLens
from diffusion_lens.studio.studio import import_engine

NAMES = {"generate", "features", "feature", "sweep", "balance"}


@pytest.fixture(scope="module")
def served(tiny_lens: DiffusionLens) -> Iterator[str]:
    """The app on the tiny lens, as an MCP server too; its address."""
    pytest.importorskip("mcp")
    import_engine()
    demo = ui.build(tiny_lens)
    options = {**ui.launch_options(), "prevent_thread_lock": True, "server_name": "127.0.0.1", "quiet": True}
    _, url, _ = demo.launch(**options, mcp_server=True)
    yield str(url)
    demo.close()


@pytest.fixture(scope="module")
def client(served: str) -> Client:
    """Gradio's client."""
    return Client(served, verbose=False)


def call(client: Client, name: str, **values: Any) -> Any:
    """What an endpoint answers."""
    return client.predict(api_name=f"/{name}", **values)


def pixels(address: str) -> np.ndarray:
    """The image in a data address."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))


def test_only_these_are_offered_each_with_its_words(client: Client) -> None:
    told = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {name.strip("/") for name in told} == NAMES
    assert all(endpoint["description"] for endpoint in told.values())


def test_images_are_those_of_the_lens(client: Client, tiny_lens: DiffusionLens) -> None:
    name = tiny_lens.attributes[0].name
    target = tiny_lens.setting(name).target
    plain, steered = (
        call(client, "generate", prompt=PROMPTS[:2], seeds=[3, 4.0], attribute=name, beta=beta) for beta in (None, 2.0)
    )
    assert [entry["prompt"] for entry in plain] == list(PROMPTS[:2]) and plain[0]["edit"] is None
    drawn = tiny_lens.generate(PROMPTS[0], seeds=[3, 4])
    assert all(np.array_equal(pixels(a), b) for a, b in zip(plain[0]["images"], drawn.images, strict=True))
    turned = tiny_lens.generate(PROMPTS[0], tiny_lens.intervention(name, target, 2.0), seeds=[3, 4])
    assert all(np.array_equal(pixels(a), b) for a, b in zip(steered[0]["images"], turned.images, strict=True))
    assert steered[0]["seeds"] == [3, 4] and len(steered[0]["perceived"][name]) == 2 and steered[0]["edit"]
    one = call(client, "generate", prompt=PROMPTS[0], seeds=3, features={"5": 4.0})
    assert one[0]["edit"] and len(one[0]["images"]) == 1


def test_features_are_found_and_told(client: Client, tiny_lens: DiffusionLens) -> None:
    name = tiny_lens.attributes[0].name
    best = tiny_lens.feature_set(name, tiny_lens.setting(name).target, 3)
    assert [f["number"] for f in call(client, "features", attribute=name, n=3)] == list(best.ids)
    assert call(client, "features", query="#5")[0]["number"] == 5
    card = call(client, "feature", number=5)
    assert card["number"] == 5 and set(card["attribution"]) == set(tiny_lens.attributions)


def test_a_sweep_is_stored_or_measured_and_has_its_balance(client: Client, tiny_lens: DiffusionLens) -> None:
    name = tiny_lens.attributes[0].name
    found = call(client, "sweep", prompt=PROMPTS[0], attribute=name, n=4, strengths=3, controls=[])
    assert len(found) == 1 and found[0]["points"][0]["n"] + found[0]["points"][0]["n_uncertain"] == 4
    balance = call(client, "balance", prompt=PROMPTS[0], attribute=name, n=32)
    assert balance["attribute"] == name and balance["target_share"] == 0.5 and balance["note"]


@pytest.mark.parametrize(("name", "values", "said"), [
    ("generate", {"prompt": PROMPTS[0], "seeds": []}, "Ask for 1 to"),
    ("generate", {"prompt": PROMPTS[0], "seeds": [1.5]}, "whole number"),
    ("generate", {"prompt": PROMPTS[0], "seeds": "3"}, "Seeds are whole numbers"),
    ("generate", {"prompt": PROMPTS[0], "seeds": list(range(65))}, "up to 64 images"),
    ("generate", {"prompt": "an astronaut", "seeds": 1}, "never saw"),
    ("generate", {"prompt": [], "seeds": 1}, "Give 1 to"),
    ("generate", {"prompt": [3], "seeds": 1}, "A prompt is a text"),
    ("generate", {"prompt": PROMPTS[0], "seeds": 1, "attribute": "hats"}, "does not steer 'hats'"),
    ("generate", {"prompt": PROMPTS[0], "seeds": 1, "beta": 99}, "β must lie"),
    ("generate", {"prompt": PROMPTS[0], "seeds": 1, "beta": "x"}, "β"),
    ("generate", {"prompt": PROMPTS[0], "seeds": 1, "features": {"a": 1}}, "given by its number"),
    ("generate", {"prompt": PROMPTS[0], "seeds": 1, "features": {"999999": 1}}, "has features 0 to"),
    ("generate", {"prompt": PROMPTS[0], "seeds": 1, "keep": ["hats"]}, "cannot be kept"),
    ("generate", {"prompt": PROMPTS[0], "seeds": 1, "lens": "nothing"}, "There is no lens 'nothing'"),
    ("features", {"n": 0}, "n lies between"), ("features", {"query": 3}, "The query is a text"),
    ("feature", {"number": -1}, "has features 0 to"), ("feature", {"number": 1.5}, "whole number"),
    ("sweep", {"prompt": PROMPTS[0], "n": 1}, "2 to 512"),
    ("sweep", {"prompt": PROMPTS[0], "strengths": 99}, "2 to 33"),
    ("sweep", {"prompt": PROMPTS[0], "controls": ["noise"]}, "Controls are"),
    ("balance", {"prompt": PROMPTS[0], "share": 2}, "between 0 and 1"),
])  # fmt: skip
def test_mistakes_come_as_one_sentence(client: Client, name: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(AppError) as caught:
        call(client, name, **values)
    assert said in str(caught.value)


def test_an_mcp_client_sees_and_calls_them(served: str, tiny_lens: DiffusionLens) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk() -> tuple[dict[str, Any], Any, Any]:
        async with (
            streamablehttp_client(f"{served}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as s,
        ):
            await s.initialize()
            tools = {tool.name: tool for tool in (await s.list_tools()).tools}
            key = next(name for name in tools if name.endswith("features"))
            found = await s.call_tool(key, {"query": "5"})
            wrong = await s.call_tool(next(name for name in tools if name.endswith("balance")), {"share": 2})
            return tools, found, wrong

    tools, found, wrong = asyncio.run(talk())
    assert {name.rpartition("_")[2] for name in tools} == NAMES
    sweep = next(tool for name, tool in tools.items() if name.endswith("sweep"))
    assert "steering strength" in sweep.description and "n" in sweep.inputSchema["properties"]
    assert "Images per strength" in json.dumps(sweep.inputSchema)
    assert ast.literal_eval(found.content[0].text)[0]["number"] == 5
    assert wrong.isError and "between 0 and 1" in wrong.content[0].text
