"""The OpenAI server, in a process of its own: what one client does harms no other."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from tests_vllm.engines import LENGTH, export, questions, reference

from tprl.build import load_component
from tprl.lvlm.frozen import FrozenLVLM
from tprl.types import Sample

PATIENCE = 1200  # seconds; 50 to 80 on two idle cores
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--skip-mm-profiling", "--max-num-seqs", "8")
SAMPLES = questions(40, 200)
FRESH = questions(1, 240)[0]  # about an image that is in no cache


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def url_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def body(model: str, question: str, *urls: str, **options: Any) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*images, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return {"model": model, "messages": turns, "temperature": 0, "max_tokens": LENGTH, **options}


class Server:
    """A running server."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port

    def post(self, request: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer."""
        call = Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urlopen(call, timeout=PATIENCE) as reply:
                return reply.status, json.load(reply)
        except HTTPError as error:
            return error.code, json.load(error)

    def answer(self, sample: Sample) -> str:
        status, reply = self.post(
            body(str(self.folder), sample.question, *map(url_of, sample.images))
        )
        assert status == 200, reply
        return reply["choices"][0]["message"]["content"].strip()

    def hang_up(self, sample: Sample) -> None:
        """Ask for a stream, and leave before its first word."""
        request = body(str(self.folder), sample.question, *map(url_of, sample.images), stream=True)
        text = json.dumps(request).encode()
        lines = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
        head = "\r\n".join([*lines, f"Content-Length: {len(text)}", "", ""])
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as line:
            line.sendall(head.encode() + text)

    def alive(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=30) as reply:
                return reply.status == 200
        except (URLError, ConnectionError, TimeoutError):
            return False


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@pytest.fixture(scope="module")
def texts(lvlm: FrozenLVLM) -> list[str]:
    answers = reference(lvlm, SAMPLES, "tprl", 1 / 9)
    return [
        lvlm.tokenizer.decode(answer.ids, skip_special_tokens=True).strip() for answer in answers
    ]


@pytest.fixture(scope="module")
def server(lvlm: FrozenLVLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    export(folder, lvlm, "tprl", 1 / 9)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = folder / "server.log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            [*command, "--port", str(port), *OPTIONS],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as process,
    ):
        running = Server(folder, port)
        deadline = time.monotonic() + PATIENCE
        while not running.alive():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield running
        process.terminate()


def answers(server: Server, samples: Sequence[Sample]) -> list[str]:
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(server.answer, samples))


def test_40_requests_on_8_threads(server: Server, texts: list[str]) -> None:
    assert answers(server, SAMPLES) == texts


def test_others_do_no_harm(server: Server, texts: list[str]) -> None:
    """While good requests run: a client that leaves, no image, too many words, a placeholder too
    many."""
    good, fresh = url_of(SAMPLES[0].images[0]), url_of(FRESH.images[0])
    bad = {
        "wrong image": body(
            str(server.folder), "is there a circle?", "data:image/png;base64,bm8gaW1hZ2U="
        ),
        "over-long": body(str(server.folder), "is there a circle? " * 200, good),
        "placeholder": body(str(server.folder), f"<image> {FRESH.question}", fresh),
        "two images": body(str(server.folder), "is there a circle?", good, good),
    }
    with ThreadPoolExecutor(12) as threads:
        running = [threads.submit(server.answer, sample) for sample in SAMPLES[:20]]
        for sample in SAMPLES[20:24]:
            server.hang_up(sample)
        refused = {name: threads.submit(server.post, request) for name, request in bad.items()}
        assert [future.result() for future in running] == texts[:20]
    statuses = {name: future.result()[0] for name, future in refused.items()}
    assert statuses == dict.fromkeys(bad, 400), {
        name: future.result() for name, future in refused.items()
    }
    assert "the prompt has 2 image placeholders for 1 image" in str(
        refused["placeholder"].result()[1]
    )
    # The same image and question, this time as they should be: the refused one left nothing behind.
    status, reply = server.post(body(str(server.folder), FRESH.question, fresh))
    assert status == 200, reply
    assert answers(server, SAMPLES[20:28]) == texts[20:28]
