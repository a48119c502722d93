"""Where windows are kept: several workers, full disks, SQLite and PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy

from adaptkit.core.registry import AdaptkitError
from adaptkit.deployment.store import Kept, Store, StoreError, Window

BIN = next((p.parent for p in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)


def window(number: int, worker: str = "", model: str = "model") -> Window:
    "A window that nobody has seen."
    told = {"each": {"ks": 0.5}, "statistics": {"ks": 0.1}, "why": "", "counts": [3, 7], "confidence": [0.5, 0.6, 0.7, 0.8, 0.9]}
    when = {"begun": 100.0 + number, "ended": 101.0 + number}
    return Window(number, 10, p=0.5, level=0.01, **told, **when, accuracy=0.9, low=0.8, high=1.0, outside={"side": 0.1}, worker=worker, model=model)


def as_owner() -> list[str]:
    "How a command is run by somebody who may start a database: it refuses root."
    if os.geteuid() != 0:
        return []
    return ["runuser", "-u", "postgres", "--"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    "The address of a PostgreSQL of our own, which is gone afterwards."
    if BIN is None:
        pytest.skip("PostgreSQL isn't installed here (looked for /usr/lib/postgresql/*/bin)")
    place = Path(tempfile.mkdtemp(prefix="adaptkit-pg-", dir="/tmp"))
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(place, owner.pw_uid, owner.pw_gid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(*command: str) -> None:
        subprocess.run([*as_owner(), *command], check=True, capture_output=True, cwd="/", timeout=240)

    data = str(place / "data")
    try:
        call(f"{BIN}/initdb", "-D", data, "-U", "watcher", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8")
        options = f"-p {port} -k {place} -c listen_addresses=127.0.0.1 -c fsync=off"
        call(f"{BIN}/pg_ctl", "-D", data, "-o", options, "-l", str(place / "log"), "-w", "start")
        yield f"postgresql+psycopg://watcher@127.0.0.1:{port}/postgres"
        call(f"{BIN}/pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    "The address of an empty store."
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/deep/monitor.db"
    address = request.getfixturevalue("postgres")
    engine = sqlalchemy.create_engine(address)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("drop table if exists adaptkit_windows, adaptkit_kept"))
    engine.dispose()
    return str(address)


def test_what_is_written_is_read(url: str) -> None:
    store = Store(url)
    assert store.read() == []
    store.write([window(i, model="ab"[i % 2]) for i in range(6)])
    assert [w.number for w in store.read()] == list(range(6)) and [w.number for w in store.read("a", last=2)] == [2, 4]
    again = store.read()[1]
    store.write([again, window(9)])  # a retry, and a new one
    assert [w.number for w in store.read()] == [0, 1, 2, 3, 4, 5, 9] and store.read()[1] == again
    store.close()


def test_features_are_kept_bit_by_bit(url: str) -> None:
    store, w, rng = Store(url), window(0), np.random.default_rng(0)
    kept = Kept(w.key, rng.random((5, 7), np.float32), rng.random((5, 3), np.float32))
    store.write([w], [kept])
    again = store.features(w.key)
    assert again is not None and np.array_equal(again.features, kept.features) and np.array_equal(again.logits, kept.logits)
    assert store.features("another") is None
    store.close()


WORKER = """
import sys
from test_monitor_store import window
from adaptkit.deployment.store import Store
store = Store(sys.argv[1])
for i in range(12):
    store.write([window(i, worker=sys.argv[2])])
"""


def test_several_processes_write_into_one_store(url: str) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    processes = [subprocess.Popen([sys.executable, "-c", WORKER, url, str(k)], env={**os.environ, "PYTHONPATH": paths}) for k in range(3)]
    assert [p.wait(timeout=100) for p in processes] == [0, 0, 0]
    store = Store(url)
    found = [(w.worker, w.number) for w in store.read(last=1000)]
    assert sorted(found) == sorted((str(k), i) for k in range(3) for i in range(12))
    store.close()


def test_a_database_without_room_says_so_and_recovers(tmp_path: Path) -> None:
    store = Store(tmp_path / "monitor.db")
    store.write([window(0)])
    room = {"pages": 0}

    @sqlalchemy.event.listens_for(store.engine, "begin")
    def limited(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql(f"pragma max_page_count = {room['pages'] or 1}")

    with pytest.raises(StoreError, match="full"):
        store.write([window(i) for i in range(1, 40)])
    assert [w.number for w in store.read()] == [0]  # all or none
    room["pages"] = 10_000
    store.write([window(i) for i in range(1, 40)])
    assert len(store.read()) == 40
    store.close()


def test_a_full_disk_says_so_and_recovers(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount"):
        pytest.skip("nothing can be mounted here")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        store = Store(disk / "monitor.db")
        store.write([window(0)])
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
            while True:
                f.write(bytes(1024))
        with pytest.raises(StoreError):
            store.write([window(i) for i in range(1, 60)])
        ballast.unlink()
        store.write([window(i) for i in range(1, 60)])
        assert len(store.read()) == 60
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def test_addresses_that_are_none_are_refused_and_passwords_kept() -> None:
    with pytest.raises(AdaptkitError, match="no address of a store") as told:
        Store("nonsense://me:secret@host/x")
    assert "secret" not in str(told.value)
    with pytest.raises(StoreError) as away:
        Store("postgresql+psycopg://me:secret@127.0.0.1:1/x?connect_timeout=2").read()
    assert "secret" not in str(away.value) and "secret" not in repr(Store("postgresql+psycopg://me:secret@127.0.0.1:1/x"))


def test_a_file_that_is_no_database_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "monitor.db").write_bytes(b"GIF89a" + bytes(5000))
    with pytest.raises(StoreError, match="not a database"):
        Store(tmp_path / "monitor.db").write([window(0)])
