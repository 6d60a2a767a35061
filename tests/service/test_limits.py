"""Keys, hosts, sizes and times have limits with declared answers, and a stop finishes requests."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from puma_jax import Embedder
from puma_jax.errors import ConfigError, SearchError
from puma_jax.search.open import open_index
from puma_jax.serve import bound_socket, main, read_key
from puma_jax.service.settings import ServiceConfig
from tests.reference import save_adapter
from tests.service.serving import data_url, picture, serving, small_embedder


@pytest.fixture(scope="module")
def strict(embedder, vectors):
    """A service with a key and low limits."""
    limits = {
        "max_body_mb": 0.1, "max_bodies_mb": 0.25, "max_items": 4, "max_queue": 8,
        "max_image_pixels": 10_000, "max_text_chars": 1000, "body_seconds": 1.0,
        "request_seconds": 2.0,
    }  # fmt: skip
    with serving(embedder, open_index(vectors), "the key", **limits) as live:
        yield live


KEY = {"Authorization": "Bearer the key"}


def test_all_but_the_page_and_the_probes_ask_for_the_key(strict):
    for path in ("/", "/docs", "/assets/app.js", "/health", "/ready"):
        assert strict.get(path).status_code == 200
    for path in ("/index", "/metrics", "/openapi.json", "/v1/models", "/images/image/red"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "the key"}):
            answer = strict.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
        assert strict.get(path, headers=KEY).status_code == 200
    assert strict.post("/v2/embed", {}).json().keys() == {"message"}
    assert strict.get("/index", headers={"Authorization": "bearer the key"}).status_code == 200
    assert strict.get("/index", headers={"Authorization": b"Bearer \xff"}).status_code == 401


def test_calls_under_another_name_are_refused(live):
    answer = live.get("/index", headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert 'Host is "evil.example"' in answer.json()["error"]["message"]
    assert live.get("/index", headers={"Host": "LOCALHOST:1234"}).status_code == 200


def test_large_requests_are_refused(strict):
    text = {"input": "a"}
    for body, said in (
        ({**text, "user": "x" * 120_000}, "more than the 0.1 MB"),
        ({"input": "x" * 1001}, "1,001 characters, more than the 1,000"),
        ({"input": ["a"] * 5}, "has 5 items, expected 1 to 4"),
    ):
        answer = strict.post("/v1/embeddings", body, headers=KEY)
        assert answer.status_code in (400, 413)
        assert said in answer.json()["error"]["message"]
    body = {"input_type": "image", "images": [data_url(picture("red", (200, 51)))]}
    answer = strict.post("/v2/embed", body, headers=KEY)
    assert "image of 200 × 51 pixels has more than the 10,000" in answer.json()["message"]


def test_a_body_without_a_length_is_read_no_further_than_the_limit(strict):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 100_000_000:
            sent += 10_000
            yield b"x" * 10_000

    headers = {**KEY, "Content-Type": "application/json"}
    try:
        answer = httpx.post(f"{strict.url}/search", content=endless(), headers=headers, timeout=10)
        assert answer.status_code == 413
    except httpx.WriteError:  # the connection is closed while the client still sends
        pass
    assert sent < 20_000_000
    assert strict.service.bodies._held == 0


def slow_body(live, length: int, headers: dict[str, str]) -> socket.socket:
    """A connection that announces a body, and has sent half of it."""
    port = int(live.url.rsplit(":", 1)[1])
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    lines = [
        "POST /search HTTP/1.1", "Host: localhost", "Content-Type: application/json",
        f"Content-Length: {length}", *(f"{name}: {value}" for name, value in headers.items()),
    ]  # fmt: skip
    connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode() + b"x" * (length // 2))
    return connection


def test_slow_clients_are_let_go_and_hold_little_meanwhile(strict):
    slow = [slow_body(strict, 90_000, KEY) for _ in range(8)]
    time.sleep(0.3)
    # 8 × 45 kB exceed what all bodies may hold together: the last ones are refused at once.
    assert strict.service.bodies._held <= 250_000
    assert strict.get("/index", headers=KEY).status_code == 200
    answers = []
    for connection in slow:
        with connection:
            answers.append(connection.recv(1000).split(b"\r\n")[0])
    assert set(answers) == {
        b"HTTP/1.1 408 Request Timeout", b"HTTP/1.1 429 Too Many Requests",
    }  # fmt: skip
    assert strict.service.bodies._held == 0


def test_what_takes_too_long_ends_with_504(strict, monkeypatch):
    held = threading.Event()
    batcher = strict.service.batcher
    original = batcher._encode_batch
    monkeypatch.setattr(
        batcher, "_encode_batch", lambda *given: (held.wait(10), original(*given))[1]
    )
    answer = strict.post("/v1/embeddings", {"input": "a"}, headers=KEY)
    held.set()
    assert answer.status_code == 504
    assert answer.json()["error"] == {
        "message": "there is no answer within 2 seconds: try again later",
        "type": "server_error",
        "code": "timeout",
    }
    assert strict.post("/v1/embeddings", {"input": "a"}, headers=KEY).status_code == 200


def test_a_fault_of_the_service_is_told_without_its_insides(strict, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("the insides")

    monkeypatch.setattr(strict.service.batcher, "_encode_batch", fail)
    answer = strict.post("/v1/embeddings", {"input": "a"}, headers=KEY)
    assert answer.status_code == 500
    assert "insides" not in answer.text
    assert "RuntimeError: the insides" in capsys.readouterr().err
    monkeypatch.undo()
    assert strict.post("/v1/embeddings", {"input": "a"}, headers=KEY).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_service_whose_device_thread_ends_says_so(embedder, monkeypatch, capsys):
    with serving(embedder, None) as live:

        def fail():
            raise RuntimeError("the insides")

        monkeypatch.setattr(live.service.batcher, "_take", fail)
        live.post("/v1/embeddings", {"input": "a"})  # ends the wait that has begun
        live.service.batcher._thread.join(10)
        answer = live.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
        assert live.get("/ready").status_code == 503
        answer = live.post("/v1/embeddings", {"input": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "failed")
        assert "insides" not in answer.text


def test_probes_and_metrics_say_how_it_is(live, embedder):
    assert live.get("/health").json() == {"status": "ok"}
    assert live.get("/ready").json() == {"status": "ready"}
    live.post("/v1/embeddings", {"input": "a"})
    text = live.get("/metrics").text
    assert re.search(r'puma_requests_total\{route="/v1/embeddings",status="200"\} [1-9]', text)
    for name in ("puma_batch_items_bucket", "puma_compilations", "puma_items_waiting 0.0"):
        assert name in text


def test_requests_are_told_to_wait_while_programs_compile(live, monkeypatch):
    monkeypatch.setattr(live.service.batcher, "ready", threading.Event())
    answer = live.post("/v1/embeddings", {"input": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "compiling")
    assert answer.headers["Retry-After"]
    assert live.get("/ready").status_code == 503
    assert live.get("/health").status_code == 200


def test_paths_and_methods_that_are_not_there_are_declared(live):
    for method, path, status in (
        ("GET", "/nope", 404), ("GET", "/search", 405), ("POST", "/v1/models", 405),
        ("DELETE", "/v2/embed", 405), ("GET", "/search/", 404), ("OPTIONS", "/search", 405),
    ):  # fmt: skip
        answer = httpx.request(method, f"{live.url}{path}")
        assert answer.status_code == status, path
        assert answer.json()


def test_answers_tell_browsers_to_load_nothing_from_elsewhere(live):
    for path in ("/", "/docs", "/assets/app.js", "/index", "/nope"):
        headers = live.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_the_description_of_the_api_is_whole(live):
    described = live.get("/openapi.json").json()
    assert set(described["paths"]) >= {
        "/v1/embeddings",
        "/v2/embed",
        "/search",
        "/images/{identifier}",
    }
    schemas = described["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/(\w+)"', live.get("/openapi.json").text):
        assert name in schemas
    for path in ("/v1/embeddings", "/v2/embed", "/search"):
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for name, field in body["schema"]["properties"].items():
            assert field.get("description"), f"{path}: {name}"


def test_vectors_of_another_model_are_not_served(vectors, tiny, tmp_path):
    small_embedder(tiny.folder).keep_layers(2).save(tmp_path / "cut")
    with pytest.raises(SearchError, match="the index was made by another model"):
        main(model=str(tmp_path / "cut"), uri=str(vectors), service=ServiceConfig(port=0))


def test_a_model_with_an_adapter_is_served_as_the_merged_model(tiny, tmp_path, monkeypatch):
    adapter, served = save_adapter(tiny, tmp_path / "adapter"), []
    monkeypatch.setattr("puma_jax.service.server.serve", lambda *given: served.append(given[0]))
    settings = ServiceConfig(port=0)
    main(model=str(tiny.folder), adapter=str(adapter), dtype="float32", service=settings)
    merged = Embedder.load(tiny.folder, dtype="float32", adapter=adapter)
    assert served[0].embedder.fingerprint == merged.fingerprint
    served[0].close()


def test_without_an_index_a_model_must_be_given():
    with pytest.raises(ConfigError, match="nothing to serve: give --uri for an index, or --model"):
        main()


def test_settings_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "key").write_text("\n")
    for path in (tmp_path / "key", tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"--service\.api-key-file"):
            read_key(path)
    (tmp_path / "key").write_text("abc \nsecond line\n")
    assert read_key(tmp_path / "key") == "abc"
    with bound_socket(ServiceConfig(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--service.port {port} cannot be used"):
            bound_socket(ServiceConfig(port=port))
    with pytest.raises(ConfigError, match="max_items 9 is above max_queue 8"):
        ServiceConfig(max_items=9, max_queue=8)


def test_a_stop_finishes_requests_and_refuses_new_ones(tiny, tmp_path):
    """The process, as it is started from a shell."""
    folder = tmp_path / "model"
    small_embedder(tiny.folder).save(folder)
    command = [
        sys.executable, "-m", "puma_jax.serve", "--model", str(folder),
        "--service.port", "0", "--service.tokens-per-chunk", "256",
    ]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        url = re.search(r"http://\S+", lines[1])[0]
        assert lines[2].startswith("Ready")
        with httpx.Client(base_url=url) as early, httpx.Client(base_url=url) as late:
            assert early.get("/ready").json() == late.get("/ready").json() == {"status": "ready"}
            # The body of a request is on its way when the signal comes.
            arrived, signalled = threading.Event(), threading.Event()

            def body():
                yield b'{"input": '
                arrived.set()
                signalled.wait(10)
                time.sleep(0.5)
                yield b'"a"}'

            found: list[httpx.Response] = []
            headers = {"Content-Type": "application/json"}
            request = threading.Thread(
                target=lambda: found.append(
                    early.post("/v1/embeddings", content=body(), headers=headers)
                )
            )
            request.start()
            arrived.wait(10)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            refused = late.post("/v1/embeddings", json={"input": "b"})
            signalled.set()
            request.join(20)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
            assert found[0].status_code == 200
        assert process.wait(20) == 0
        assert process.stdout.read().splitlines()[-1] == "Stopped"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
