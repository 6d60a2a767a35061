"""The process of the service: from its first line to a stop that finishes what has begun."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from puma_jax.service.app import create_app
from puma_jax.service.searching import warm_up
from puma_jax.service.settings import LOOPBACK
from puma_jax.service.state import Service


def serve(service: Service, key: str | None, listener: socket.socket) -> None:
    """Serve until a signal; requests in flight are then finished, and new ones get status 503.

    Args:
        service: The model, the index and the settings.
        key: Key that clients must send; None for none.
        listener: Socket that is bound to the address of the service.
    """
    if service.index is not None:
        warm_up(service.index, service.settings.max_k)
    host, port = listener.getsockname()[:2]
    address = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
    documents = "" if service.index is None else f", {len(service.index):,} documents"
    print(f"Serving {service.name}{documents} on {address}", flush=True)
    if host not in LOOPBACK and key is None:
        print(
            "Everyone who reaches this machine is answered: --service.api-key-file asks for a key",
            flush=True,
        )
    config = server_config(create_app(service, key))
    _Server(config, service).run(sockets=[listener])
    print("Stopped", flush=True)


def server_config(app: FastAPI) -> uvicorn.Config:
    """Return how an app is served."""
    return uvicorn.Config(
        app,
        log_level="warning",
        lifespan="on",
        http="h11",  # bounds the headers of a request, which httptools does not
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )


class _Server(uvicorn.Server):
    """A server that refuses new requests on a signal, and ends once the others are answered."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service
        self._saying: asyncio.Task | None = None
        self._deadline = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say when the first request can be served."""
        await super().startup(sockets)
        self._saying = asyncio.create_task(self._say_ready())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop on the first signal, and stop at once on the second."""
        if self._service.stopping:
            super().handle_exit(sig, frame)
            return
        self._service.stopping = True
        self._deadline = time.monotonic() + self._service.settings.grace_seconds
        print("Stopping: requests in flight are finished", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; uvicorn asks ten times a second."""
        done = not self._service.in_flight or time.monotonic() > self._deadline
        return await super().on_tick(counter) or (self._service.stopping and done)

    async def _say_ready(self) -> None:
        batcher = self._service.batcher
        await asyncio.to_thread(batcher.ready.wait)
        if not batcher.failed:
            print(f"Ready: {len(batcher.shapes)} programs are compiled", flush=True)
