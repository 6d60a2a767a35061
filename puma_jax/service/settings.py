"""Settings of the service: where it listens, how it batches, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from puma_jax.config import require
from puma_jax.data.decode import MAX_PIXELS
from puma_jax.schema import Count, NotNegative, Positive, Range, check

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine for itself."""


@dataclass(frozen=True)
class ServiceConfig:
    """Settings of the service."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine only; 0.0.0.0 from all."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: Path | None = None
    """File whose first line is the key that clients must send as "Authorization: Bearer KEY".
    Without it, everyone who reaches the port is answered."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may call the service, in the Host header. By default any, or only
    those of this machine if it listens on 127.0.0.1, so that no web page can pose as it."""
    name: str | None = None
    """Name of the model in requests and answers. The last part of the model's path by default."""
    instruction: str | None = None
    """Instruction for queries that bring none of their own. None by default."""
    wait_ms: NotNegative = 5.0
    """Milliseconds that an item waits at most for others whose images and texts are being read, to
    be encoded together with them. An item that is alone never waits."""
    tokens_per_chunk: Count | None = None
    """Tokens and image patches that are encoded in one step at most. By default 2,048 on a CPU and
    16,384 on an accelerator."""
    max_queue: Count = 512
    """Items that may wait to be encoded. Requests beyond them are refused with status 429."""
    max_requests: Count = 1024
    """Requests answered at once. Those beyond them are refused with status 429."""
    max_items: Count = 256
    """Items in one request."""
    max_body_mb: Positive = 32.0
    """Size of the body of a request, in MB."""
    max_bodies_mb: Positive = 256.0
    """Size of all bodies held at once, in MB. Requests beyond it are refused with status 429."""
    images_per_item: Count = 1
    """Images of the largest size that an item may have. Smaller ones may be more, up to the same
    number of visual tokens. More take more memory, and longer to start."""
    max_image_pixels: Annotated[int, Range(1, MAX_PIXELS)] = 2**25
    """Pixels of an image in a request."""
    max_text_chars: Count = 100_000
    """Characters of a text in a request."""
    max_k: Annotated[int, Range(1, 10_000)] = 200
    """Documents that one search returns at most."""
    body_seconds: Positive = 20.0
    """Seconds in which a client must have sent its request."""
    request_seconds: Positive = 30.0
    """Seconds in which a request is answered; later it ends with status 504."""
    grace_seconds: Positive = 30.0
    """Seconds that requests have to finish when the service stops."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self)
        require(
            self.max_body_mb <= self.max_bodies_mb,
            f"max_body_mb {self.max_body_mb:g} is above max_bodies_mb {self.max_bodies_mb:g}",
        )
        require(
            self.max_items <= self.max_queue,
            f"max_items {self.max_items} is above max_queue {self.max_queue}: such a request would "
            "always be refused",
        )

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names by which clients may call the service; empty for any."""
        return self.allowed_hosts or (LOOPBACK if self.host in LOOPBACK else ())
