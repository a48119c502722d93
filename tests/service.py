"""Model folders and requests for the tests of the server."""

from __future__ import annotations

import asyncio
import io
import json
import zlib
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from PIL import Image

from adaptkit.data.sources import load_data
from adaptkit.deployment.app import Service
from adaptkit.deployment.export import export
from adaptkit.deployment.folder import ModelFolder
from adaptkit.deployment.gate import Gate
from adaptkit.heads.heads import Named, build_model

PLACE = Path(mkdtemp())


@cache
def image_folder() -> ModelFolder:
    "A small network with random weights that sorts images."
    return export(build_model("mobile_tiny", Named(("cat", "dog", "<b>bird</b>")), size=20, seed=0), "onnx", out=PLACE / "images/first", temperature=1.5)


@cache
def text_folder() -> ModelFolder:
    "A small network with random weights that sorts texts."
    model = build_model("bag_of_embeddings", load_data("support_topics", seed=0), size=24, seed=0)
    return export(model, "onnx", out=PLACE / "texts/first")


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    "An image file."
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(out, kind)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    "A PNG of few bytes that claims to be large."

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 1) * min(height, 1000)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def form(*parts: tuple[str, bytes], file: str = "a.png", boundary: str = "x") -> tuple[bytes, str]:
    "A form and its content type."
    mark = f"--{boundary}\r\n"
    each = [f'{mark}Content-Disposition: form-data; name="{n}"; filename="{file}"\r\n\r\n'.encode() + b + b"\r\n" for n, b in parts]
    return b"".join(each) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


class Direct:
    "Asks a service without a network."

    def __init__(self, service: Service) -> None:
        self.gate = Gate(service.routes(), service.keeping)

    def __call__(self, path: str, body: bytes | None = None, kind: str = "", **headers: str) -> tuple[int, Any]:
        return asyncio.run(self.ask(path, body, kind, **headers))

    async def ask(self, path: str, body: bytes | None = None, kind: str = "", **headers: str) -> tuple[int, Any]:
        "Status, and the JSON, or the bytes if it isn't JSON."
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body or b"", "more_body": False}

        target, _, query = path.partition("?")
        told = {"content-type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
        scope = {"type": "http", "method": "GET" if body is None else "POST", "path": target, "query_string": query.encode(), "client": ("192.0.2.7", 1)}
        await self.gate({**scope, "headers": [(k.encode(), v.encode("latin-1")) for k, v in told.items()]}, receive, send)
        self.headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return sent[0]["status"], json.loads(sent[1]["body"]) if self.headers["content-type"] == "application/json" else sent[1]["body"]
