"""Several pages at once: within the budget, one outcome each, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks.jobs import Budget, Job, Need, Room, gpus_here, run_jobs
from adaptkit.notebooks.workers import MARK

pytestmark = pytest.mark.alone

SPEC = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
RECORD = "from adaptkit.notebooks.records import record\n"
TWO = Budget(cores=2, memory_mib=4096, gpus=0)


def write_page(folder: Path, *sources: str, name: str = "page.ipynb") -> Path:
    "A page of code cells; the first takes the parameters."
    cells = [new_code_cell(s) for s in ("n = 0", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells, metadata=SPEC), folder / name)
    return folder / name


def test_a_value_that_cannot_travel_is_refused_before_anything_starts(tmp_path: Path) -> None:
    page = write_page(tmp_path, "1")
    with pytest.raises(AdaptkitError):
        run_jobs([Job(page, tmp_path / "a.ipynb"), Job(page, tmp_path / "b.ipynb", {"n": object()})])
    assert not (tmp_path / "a.ipynb").exists()


def span(out: str | Path) -> tuple[float, float]:
    "When a page ran."
    told = nbformat.read(out, as_version=4).metadata.papermill
    begin, end = (datetime.fromisoformat(told[f"{word}_time"]).timestamp() for word in ("start", "end"))
    return begin, end


def sleeping(folder: Path) -> Path:
    "A page that writes down its process and sleeps for long."
    return write_page(folder, f"import os\nopen({str(folder)!r} + f'/pid-{{n}}', 'w').write(str(os.getpid()))", "import time\ntime.sleep(300)", name="sleeping.ipynb")


def pid(folder: Path, n: int = 0) -> int:
    "The process of a sleeping page, as soon as it has begun."
    until = time.monotonic() + 120
    while time.monotonic() < until:
        path = folder / f"pid-{n}"
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("the page has not begun")


def ends(number: int, seconds: float = 20) -> bool:
    "Whether a process ends within that time."
    until = time.monotonic() + seconds
    while psutil.pid_exists(number) and time.monotonic() < until:
        time.sleep(0.05)
    return not psutil.pid_exists(number)


def marked() -> list[int]:
    "Workers of this process and what they have started."
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process.pid] if MARK in process.environ() else []
        except psutil.Error:
            continue
    return found


def test_six_jobs_within_two_cores_give_six_outcomes(tmp_path: Path) -> None:
    page = write_page(tmp_path, "import os, time\ntime.sleep(0.3)", RECORD + "record('n', n)\nrecord('threads', int(os.environ['OMP_NUM_THREADS']))")
    needs = [Need(), Need(cores=2), Need(cores=0.5), Need(minutes=1), Need(), Need(cores=1.5)]
    jobs = [Job(page, tmp_path / f"{n}.ipynb", {"n": n}, need=need) for n, need in enumerate(needs)]
    outcomes = list(run_jobs(iter(jobs), budget=TWO))
    assert sorted(o.records["n"].value for o in outcomes) == [0, 1, 2, 3, 4, 5] and {id(o.job) for o in outcomes} == {id(j) for j in jobs}
    assert {int(o.records["n"].value): o.records["threads"].value for o in outcomes} == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1}
    assert not any(o.error for o in outcomes) and all(o.seconds > 0.3 for o in outcomes)
    spans = [span(job.out) for job in jobs]
    assert all(sum(j.need.cores for j, (b, e) in zip(jobs, spans, strict=True) if b <= t < e) <= 2 for t in (t for s in spans for t in s))
    assert max(sum(b <= t < e for b, e in spans) for t in (t for s in spans for t in s)) > 1, "some ran side by side"
    assert not marked()


def test_every_page_has_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert gpus_here() == ("4", "GPU-7") and Budget().gpus == 2
    page = write_page(tmp_path, "import os, time\ntime.sleep(1)\nos.environ['CUDA_VISIBLE_DEVICES']")
    jobs = [Job(page, tmp_path / f"{n}.ipynb", need=Need(gpus=g, cores=0.5)) for n, g in enumerate((1, 1, 0, 2))]
    assert not any(o.error for o in run_jobs(jobs, budget=Budget(cores=2, memory_mib=9999)))
    seen = [eval(nbformat.read(job.out, as_version=4).cells[-1].outputs[0].data["text/plain"]) for job in jobs]
    assert sorted(seen[:2]) == ["4", "GPU-7"] and seen[2] == "" and sorted(seen[3].split(",")) == ["4", "GPU-7"]


def test_room_takes_and_gives_back() -> None:
    room = Room(Budget(cores=2, memory_mib=1000, gpus=0))
    assert room.take(Need(memory_mib=2000)) is None and room.take(Need(gpus=1)) is None
    taken = [room.take(Need(cores=0.1, memory_mib=50)) for _ in range(20)]
    assert all(taken) and room.take(Need(cores=0.1, memory_mib=0)) is None
    for one in taken:
        assert one is not None
        room.give(Need(cores=0.1, memory_mib=50), one)
    assert room.take(Need(cores=2, memory_mib=1000))


@pytest.mark.parametrize("wrong", [{"cores": 0}, {"memory_mib": -1}, {"gpus": -1}, {"gpus": 0.5}])
def test_impossible_needs_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(AdaptkitError, match="a page needs"):
        Need(**wrong)


def test_mistakes_are_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_page(tmp_path)
    with pytest.raises(AdaptkitError, match="Two jobs would write"):
        run_jobs([Job(page, tmp_path / "a.ipynb"), Job(page, str(tmp_path / "x/../a.ipynb"))])
    with pytest.raises(AdaptkitError, match="Unknown place to run pages 'her'. Did you mean 'here'"):
        run_jobs([Job(page, tmp_path / "a.ipynb")], on="her")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(AdaptkitError, match="more GPUs than the 0"):
        run_jobs([Job(page, tmp_path / "a.ipynb")], budget=Budget(gpus=1))
    assert [p.name for p in tmp_path.iterdir()] == ["page.ipynb"]


def test_a_job_that_is_too_large_comes_first_and_holds_nobody_up(tmp_path: Path) -> None:
    page = write_page(tmp_path)
    jobs = [Job(page, tmp_path / "a.ipynb"), Job(page, tmp_path / "b.ipynb", need=Need(gpus=1, memory_mib=5000))]
    outcomes = list(run_jobs(jobs, budget=TWO))
    assert [o.job for o in outcomes] == jobs[::-1] and outcomes[1].error == ""
    assert "needs 5000 MiB of 4096, 1 GPUs of 0" in outcomes[0].error and not (tmp_path / "b.ipynb").exists()
    assert list(run_jobs([])) == []


def test_a_killed_process_a_dead_kernel_a_wrong_name_and_a_page_that_breaks(tmp_path: Path) -> None:
    kill = "import os, signal\nos.kill({}, signal.SIGKILL)"
    worker = write_page(tmp_path, kill.format("os.getppid()"), "import time\ntime.sleep(60)", name="worker.ipynb")
    kernel = write_page(tmp_path, RECORD + "record('before', 1)", kill.format("os.getpid()"), name="kernel.ipynb")
    breaks = write_page(tmp_path, RECORD + "record('before', 2)", "1 / 0", name="breaks.ipynb")
    jobs = [Job(p, tmp_path / f"out/{p.name}") for p in (worker, kernel, breaks)]
    jobs += [Job(breaks, tmp_path / "out/wrong.ipynb", {"m": 1}), Job(tmp_path / "none.ipynb", tmp_path / "out/none.ipynb")]
    found = {Path(o.job.out).stem: o for o in run_jobs(jobs, budget=TWO)}
    assert len(found) == 5 and "ended by SIGKILL" in found["worker"].error
    assert "kernel" in found["kernel"].error and found["kernel"].records["before"].value == 1
    assert "ZeroDivisionError" in found["breaks"].error and found["breaks"].records["before"].value == 2
    assert "Unknown parameter 'm'" in found["wrong"].error and not found["wrong"].records
    assert "No such file" in found["none"].error
    assert not marked()


def test_closing_keeps_what_was_done_and_ends_everything(tmp_path: Path) -> None:
    page, quick = sleeping(tmp_path), write_page(tmp_path)
    running = run_jobs([Job(page, tmp_path / "out.ipynb"), Job(quick, tmp_path / "quick.ipynb")], budget=TWO)
    assert next(running).error == ""
    kernel = pid(tmp_path)
    running.close()
    assert ends(kernel, 2) and not marked()
    left = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert [c.metadata.papermill.status for c in left.cells if "papermill" in c.metadata][-1] == "failed"
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_a_program_ends_its_pages_end_with_it(how: signal.Signals, tmp_path: Path) -> None:
    page = sleeping(tmp_path)
    jobs = ", ".join(f"Job({str(page)!r}, {str(tmp_path / f'{n}.ipynb')!r}, {{'n': {n}}})" for n in range(2))
    # no `if __name__ == "__main__"`: a program that is a plain script has to work, too
    (tmp_path / "program.py").write_text(f"from adaptkit.notebooks.jobs import Budget, Job, run_jobs\nlist(run_jobs([{jobs}], budget=Budget(cores=2)))\n")
    program = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], stderr=subprocess.DEVNULL)
    kernels = [pid(tmp_path, n) for n in range(2)]
    workers = psutil.Process(program.pid).children()
    program.send_signal(how)
    assert program.wait(30) != 0
    assert all(ends(k) for k in kernels) and all(ends(w.pid) for w in workers)
    assert how != signal.SIGINT or all((tmp_path / f"{n}.ipynb").exists() for n in range(2)), "what was done is kept"


def test_many_short_pages_share_few_processes(tmp_path: Path) -> None:
    page = write_page(tmp_path, "import os", RECORD + "record('worker', os.getppid())")
    outcomes = list(run_jobs([Job(page, tmp_path / f"{n}.ipynb") for n in range(5)], budget=TWO))
    assert 1 <= len({o.records["worker"].value for o in outcomes}) <= 2


def test_the_longest_begin_first(tmp_path: Path) -> None:
    page = write_page(tmp_path)
    jobs = [Job(page, tmp_path / f"{m}.ipynb", need=Need(minutes=m)) for m in (0, 1, 3, 2)]
    assert [o.job.need.minutes for o in run_jobs(jobs, budget=Budget(cores=1, gpus=0))] == [3, 2, 1, 0]


def test_importing_brings_neither_ray_nor_torch() -> None:
    program = "import adaptkit.notebooks.jobs, adaptkit.notebooks.workers, adaptkit.notebooks.sweep, adaptkit.notebooks.cluster, sys; print({'ray', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}, check=True).stdout.strip() == "set()"
