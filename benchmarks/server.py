"""What does our server cost over the bare session, how much does it answer under load beside a plain FastAPI endpoint and LitServe, and what is lost when something happens?

All answer with the same ONNX file of EfficientNet-Lite0, opened in the same way, and read images with the same function; all get the same JPEG files as forms. The plain endpoint is what a readme shows: a function with
`UploadFile`, one session, no batching; once as `def`, which FastAPI runs in its threads, and once as `async def`, which runs in the loop. LitServe runs with one worker, once without batches and once with batches of 8 (it waits 5 ms for them), over ZeroMQ.

The machine may be busy with other things. So everything is done in turn, the ratio is taken round by round, and beside the answers a second stands the processor time that a server has used for each answer, of which less is
lost to neighbours.

    python benchmarks/server.py [--parts load int8 events] [--rounds 7] [--load 256] [--alone 80] [--many 10000]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "server.json"
CLASSES = ("fine", "broken")
BOUNDARY = b"adaptkit"


def file(seed: int) -> bytes:
    "A JPEG of 224 x 224 pixels."
    coarse = np.random.default_rng(seed).integers(0, 255, (14, 14, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((224, 224), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def form(image: bytes) -> bytes:
    "As a browser sends it."
    head = b'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg'
    return b"--" + BOUNDARY + b"\r\n" + head + b"\r\n\r\n" + image + b"\r\n--" + BOUNDARY + b"--\r\n"


FORM = "multipart/form-data; boundary=" + BOUNDARY.decode()


# Servers


def probabilities(logits) -> list[float]:
    "A softmax."
    e = np.exp(logits - logits.max())
    return (e / e.sum()).tolist()


def serve_plain(folder, port: int, *, waits: bool) -> None:
    "A function, FastAPI, uvicorn; `waits`: an `async def`, in which the model runs while everybody else waits."
    import uvicorn
    from fastapi import FastAPI, UploadFile

    app, session = FastAPI(), folder.session()

    def answer(raw: bytes):
        p = probabilities(session(folder.read([raw])).logits[0])
        return {"class": folder.classes[int(np.argmax(p))], "probabilities": p}

    async def predict_waiting(image):
        return answer(await image.read())

    def predict_in_threads(image):
        return answer(image.file.read())

    predict = predict_waiting if waits else predict_in_threads
    predict.__annotations__ = {"image": UploadFile}  # a name in a string, which it would be here, FastAPI can't find
    app.post("/predict")(predict)
    uvicorn.run(app, port=port, log_level="critical")


def serve_litserve(path: str, port: int, batch: int) -> None:
    "A LitAPI with one worker."
    import litserve
    from litserve_api import Api, Batched

    api = Batched(path, max_batch_size=batch, batch_timeout=0.005) if batch > 1 else Api(path)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="critical", generate_client_file=False)


def serve_ours(path: str, port: int) -> None:
    "adaptkit serve."
    from adaptkit.deployment.serving import serve

    serve(path, port=port)


KINDS = ("ours", "plain", "plain, async def", "litserve", "litserve, batches")


def program(kind: str, path: str, port: int) -> None:
    "What a server process does."
    from adaptkit.deployment.folder import open_folder

    if kind == "ours":
        serve_ours(path, port)
    elif kind.startswith("plain"):
        serve_plain(open_folder(path), port, waits="async" in kind)
    else:
        serve_litserve(path, port, 8 if "batches" in kind else 1)


@contextmanager
def server(kind: str, path: Path):
    "A server process: the process and its port."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(os.devnull, "w") as nothing:
        command = [sys.executable, __file__, "--serve", kind, "--folder", str(path), "--port", str(port)]
        process = subprocess.Popen(command, stdout=nothing, stderr=nothing, start_new_session=True)
    try:
        end = time.monotonic() + 120
        body = form(file(0))
        while time.monotonic() < end:
            try:
                if asyncio.run(one(port, body))[0] == 200:
                    break
            except OSError:
                time.sleep(0.2)
            assert process.poll() is None, f"{kind} did not start"
        yield process, port
    finally:
        with suppress(ProcessLookupError):  # LitServe's workers outlive their parent
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Clients


async def say(r, w, body: bytes, kind: str, path: str = "/predict", more: str = "") -> tuple[int, bytes, bool]:
    "A request on an open connection: status, body, and whether the connection is over."
    w.write(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body)
    head = (await r.readuntil(b"\r\n\r\n")).lower()
    told = await r.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
    return int(head.split(b" ")[1]), told, b"connection: close" in head


async def one(port: int, body: bytes, kind: str = FORM, path: str = "/predict", more: str = "") -> tuple[int, bytes]:
    "A request on a connection of its own."
    r, w = await asyncio.open_connection("127.0.0.1", port)
    try:
        return (await say(r, w, body, kind, path, more))[:2]
    finally:
        w.close()


async def load(port: int, bodies: list[bytes], n: int, clients: int) -> list[float]:
    "Seconds of n requests by so many clients, each on one connection."
    seconds: list[float] = []
    left = iter(range(n))

    async def client() -> None:
        r, w = await asyncio.open_connection("127.0.0.1", port)
        for i in left:
            began = time.perf_counter()
            status, told, _ = await say(r, w, bodies[i % len(bodies)], FORM)
            assert status == 200, told
            seconds.append(time.perf_counter() - began)
        w.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds


def cpu(process: subprocess.Popen) -> float:
    "Seconds of processor that a server has used, with its children."
    whole = psutil.Process(process.pid)
    return sum(sum(p.cpu_times()[:2]) for p in (whole, *whole.children(recursive=True)))


# What is measured


def overhead(folder, port: int, n: int) -> dict[str, float]:
    "Milliseconds of a lonely request, and beyond the session, in pairs."
    session, images = folder.session(), [file(i) for i in range(32)]
    rows = []

    async def all_of_them() -> None:
        r, w = await asyncio.open_connection("127.0.0.1", port)
        for i in range(n + 5):
            image = images[i % 32]
            t0 = time.perf_counter()
            inputs = folder.read([image])
            t1 = time.perf_counter()
            session(inputs)
            t2 = time.perf_counter()
            await say(r, w, form(image), FORM)
            rows.append((t2 - t1, t2 - t0, time.perf_counter() - t2))
        w.close()

    asyncio.run(all_of_them())
    alone, read, served = (1000 * np.array(c) for c in zip(*rows[5:], strict=True))
    p50 = lambda x: round(float(np.median(x)), 2)  # noqa: E731
    return {"session_ms": p50(alone), "request_ms": p50(served), "over_session_ms": p50(served - alone), "over_session_and_reading_ms": p50(served - read), "request_p99_ms": round(float(np.quantile(served, 0.99)), 1)}


def throughput(servers: dict, bodies: list[bytes], *, rounds: int, n: int, clients: int) -> dict[str, dict[str, float]]:
    "Answers a second under load, and processor time for each, in turn."
    found = {kind: [] for kind in servers}
    for turn in range(rounds + 1):
        order = list(servers) if turn % 2 else list(reversed(servers))
        for kind in order:
            process, port = servers[kind]
            before, began = cpu(process), time.perf_counter()
            seconds = asyncio.run(load(port, bodies, n, clients))
            row = (n / (time.perf_counter() - began), (cpu(process) - before) / n, float(np.median(seconds)), float(np.quantile(seconds, 0.99)))
            if turn:
                found[kind].append(row)
                print(f"{turn} {kind:18} {row[0]:6.1f} a second, {1000 * row[1]:5.1f} ms of processor, p99 {row[3]:.2f} s", flush=True)
    made = {}
    for kind, rows in found.items():
        a, c, p50, p99 = (statistics.median(column) for column in zip(*rows, strict=True))
        made[kind] = {"a_second": round(a, 1), "cpu_ms": round(1000 * c, 1), "p50_ms": round(1000 * p50), "p99_ms": round(1000 * p99)}
        for other in found:
            if other != kind == "ours":
                pairs = [x[0] / y[0] for x, y in zip(rows, found[other], strict=True)]
                cheaper = [y[1] / x[1] for x, y in zip(rows, found[other], strict=True)]
                made[kind][f"times {other}"] = round(statistics.median(pairs), 2)
                made[kind][f"times {other}, low and high"] = [round(min(pairs), 2), round(max(pairs), 2)]
                made[kind][f"processor time of {other}, times ours"] = round(statistics.median(cheaper), 2)
    return made


def spoilt(dice: random.Random, image: bytes) -> tuple[bytes, str]:
    "A request with something wrong: body and content type."
    text = json.dumps({"image": "x"}).encode()
    choices = [
        (form(image)[: dice.randrange(1, 3000)], FORM), (image[: dice.randrange(1, 3000)], "image/jpeg"), (dice.randbytes(2000), "application/octet-stream"), (b"", "image/png"),
        (text, "application/json"), (b"[" * 5000, "application/json"), (b'{"image": NaN}', "application/json"), (b'{"imgae": "x"}', "application/json"), (b"hello", "text/plain"),
        (image, "application/pdf"), (form(image).replace(b'name="image"', b'name="../../etc/passwd"'), FORM), (b'{"image": "' + b"A" * 10**6 + b'"}', "application/json"),
    ]  # fmt: skip
    return dice.choice(choices)


def stormed(folder, process, port: int, *, n: int) -> dict[str, object]:
    "Requests of which a fifth are malformed: statuses, memory, and whether right answers are right."
    images = [file(i) for i in range(32)]
    session = folder.session()
    right = [folder.classes[int(session(folder.read([i])).logits[0].argmax())] for i in images]
    dice, statuses, wrong, memory = random.Random(0), {}, [0], []
    left = iter(range(n))

    async def client() -> None:
        for i in left:
            bad, k = dice.random() < 0.2, i % 32
            body, kind = spoilt(dice, images[k]) if bad else (form(images[k]), FORM)
            status, told = await one(port, body, kind)
            statuses[status] = statuses.get(status, 0) + 1
            if not bad:
                wrong[0] += status != 200 or json.loads(told)["answers"][0]["class"] != right[k]
            if i % max(1, n // 50) == 0:
                memory.append(psutil.Process(process.pid).memory_info().rss)

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(8)))

    asyncio.run(all_clients())
    warm = memory[len(memory) // 5 :]  # after a fifth of the requests
    first, last = statistics.median(warm[:8]), statistics.median(warm[-8:])
    told = {str(s): c for s, c in sorted(statuses.items())}
    return {"requests": n, "statuses": told, "errors_5xx": sum(c for s, c in statuses.items() if s >= 500), "valid_answered_wrong": wrong[0], "memory_mib": [round(first / 2**20, 1), round(last / 2**20, 1)], "memory_growth": round(last / first - 1, 4)}


async def asking(port: int, bodies: list[bytes], clients: int, heard: dict[str, int], stop: asyncio.Event) -> None:
    "Clients that ask until they are refused, half of them on connections that they keep."

    async def client(i: int) -> None:
        keep = i % 2 == 0
        r = w = None
        while not stop.is_set():
            try:
                if w is None:
                    r, w = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 10)
            except (OSError, TimeoutError):
                heard["refused"] = heard.get("refused", 0) + 1
                return
            try:
                status, _, over = await asyncio.wait_for(say(r, w, bodies[i % len(bodies)], FORM), 60)
                word = "answered" if status == 200 else str(status)
            except (OSError, EOFError, TimeoutError):
                word, over = "lost", True
            heard[word] = heard.get(word, 0) + 1
            if over or not keep:
                w.close()
                w = None

    await asyncio.gather(*(client(i) for i in range(clients)))


def ended(process, port: int, bodies: list[bytes], *, clients: int, seconds: float) -> dict[str, int]:
    "What becomes of requests when the server is told to end in the middle."
    heard: dict[str, int] = {}

    async def all_of_it() -> None:
        stop = asyncio.Event()
        task = asyncio.ensure_future(asking(port, bodies, clients, heard, stop))
        await asyncio.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        await asyncio.wait([task], timeout=60)
        stop.set()
        await task

    asyncio.run(all_of_it())
    process.wait(60)
    return heard if "refused" in heard else heard | {"went on for 60 s": 1}


def reloaded(folder: Path, bodies: list[bytes], *, clients: int, times: int) -> dict[str, object]:
    "What becomes of requests while models change, come back, and are refused."
    from shutil import copytree

    from adaptkit.deployment.serving import running

    other, broken = folder.with_name("other"), folder.with_name("broken")
    for place in (other, broken):
        copytree(folder, place, dirs_exist_ok=True)
    weights = broken / "model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    heard: dict[str, int] = {}
    token, outcomes = "only for this benchmark".replace(" ", "-"), {}

    async def all_of_it(port: int) -> None:
        stop = asyncio.Event()
        more = f"Authorization: Bearer {token}\r\n"

        async def client(i: int) -> None:
            r, w = await asyncio.open_connection("127.0.0.1", port)
            while not stop.is_set():
                try:
                    status = (await say(r, w, bodies[i % len(bodies)], FORM, more=more))[0]
                    word = "answered" if status == 200 else str(status)
                except (OSError, EOFError):
                    word = "lost"
                    r, w = await asyncio.open_connection("127.0.0.1", port)
                heard[word] = heard.get(word, 0) + 1
            w.close()

        tasks = [asyncio.ensure_future(client(i)) for i in range(clients)]
        for _ in range(times):
            for name, path, body in (("reload", "/reload", b'{"folder": "other"}'), ("broken", "/reload", b'{"folder": "broken"}'), ("rollback", "/rollback", b"")):
                began = time.perf_counter()
                status, _ = await one(port, body, "application/json", path, more)
                outcomes.setdefault(name, []).append((status, time.perf_counter() - began))
        stop.set()
        await asyncio.gather(*tasks)

    with running(folder, token=token) as up:
        asyncio.run(all_of_it(up.port))
    told = {name: {"statuses": sorted({s for s, _ in rows}), "median_ms": round(1000 * statistics.median(t for _, t in rows), 1)} for name, rows in outcomes.items()}
    return {"requests": heard, **told}


def no_json(port: int) -> int:
    "The status of a body that isn't JSON."
    return asyncio.run(one(port, b"image=cat.png", "application/json"))[0]


def network(place: Path, name: str):
    "A model folder with one export."
    from adaptkit.data.sources import load_data
    from adaptkit.deployment.export import export
    from adaptkit.heads.heads import Named, build_model

    data = load_data("elpv", seed=0) if name == "onnx-int8" else ""  # eight bits have to see images
    return export(build_model("efficientnet_lite0", data or Named(CLASSES), size=224, seed=0), name, data=data, out=place / name)


def part_load(place: Path, options) -> dict[str, object]:
    "Alone and under load, in float."
    folder, bodies = network(place, "onnx"), [form(file(i)) for i in range(64)]
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(server(kind, folder.folder)) for kind in KINDS}
        alone = {kind: overhead(folder, port, options.alone) for kind, (_, port) in servers.items()}
        found = throughput(servers, bodies, rounds=options.rounds, n=options.load, clients=options.clients)
        return {"alone": alone, "under_load": found, "status_of_no_json": {kind: no_json(port) for kind, (_, port) in servers.items()}}


def part_int8(place: Path, options) -> dict[str, object]:
    "Under load, in eight bits."
    folder, bodies = network(place, "onnx-int8"), [form(file(i)) for i in range(64)]
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(server(kind, folder.folder)) for kind in KINDS[:3]}
        found = throughput(servers, bodies, rounds=options.rounds, n=2 * options.load, clients=options.clients)
        return {"under_load": found}


def part_events(place: Path, options) -> dict[str, object]:
    "Told to end, another model, malformed requests."
    folder, bodies = network(place, "onnx"), [form(file(i)) for i in range(64)]
    heard: dict[str, object] = {}
    for kind in KINDS:
        with server(kind, folder.folder) as (process, port):
            heard[kind] = ended(process, port, bodies, clients=16, seconds=2.0)
    changed = reloaded(folder.folder, bodies, clients=16, times=5)
    with server("ours", folder.folder) as (process, port):
        malformed = stormed(folder, process, port, n=options.many)
    return {"ended_under_load": heard, "reloaded_under_load": changed, "malformed": malformed}


PARTS = {"load": part_load, "int8": part_int8, "events": part_events}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 7), ("load", 256), ("alone", 80), ("many", 10_000), ("clients", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    for name in ("serve", "folder", "port"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        program(options.serve, options.folder, int(options.port))
        return
    from adaptkit.core.files import write_json
    from adaptkit.training.runs import surroundings

    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        for part in options.parts:
            settings = {name: getattr(options, name) for name in ("rounds", "load", "alone", "many", "clients")}
            found[part] = {**PARTS[part](Path(place), options), "model": "efficientnet_lite0, 224 pixels", "settings": settings, **surroundings()}
            print(json.dumps(found[part], indent=1), flush=True)
            write_json(options.out, found)


if __name__ == "__main__":
    main()
