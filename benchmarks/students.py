"""Small students of a large network on solar cells (ELPV) and clothes (Fashion-MNIST): what they keep of its accuracy, and whether the teacher is worth anything.

One teacher, EfficientNet-Lite0, of which everything is fine-tuned. Each student learns for nearly the same number of steps, once with the labels alone, once with the teacher's answers besides; three seeds of each, compared pairwise on the same test images. In "elpv, few labels" only a fifth of the training images has a label, for the teacher, too: the student alone sees these, five times as often; the taught one sees all images, the others with the teacher's answers (all validation images keep their labels). The aims: at least 10 times fewer parameters or
multiply-adds than EfficientNet-Lite0, at least 97 % of the teacher's accuracy, and better than the same student alone, which is called shown when the paired 95 % interval over test images lies above zero. What the teacher's part of the loss is like (temperature, weight) is chosen for each student first: on the validation images,
with a seed that isn't among the three. Of a student cut from its teacher the upper two stages and the head learn, of any other everything. Images are stored at the teacher's size, and copies across splits are kept in one split.

    python benchmarks/students.py [--data elpv "elpv, few labels" fashion_mnist] [--students "cut 5" mobile_small] [--root folder with Fashion-MNIST] [--place folder in which an interrupted measurement goes on]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.checks import apart, check_data
from adaptkit.data.datasets import Data, Samples, make_batch
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.data.splits import split_rows
from adaptkit.distillation.distil import learning, student_of
from adaptkit.distillation.distillation import Distillation
from adaptkit.distillation.lineage import lineage
from adaptkit.distillation.measures import Trial
from adaptkit.evaluation.evaluate import majority, predict
from adaptkit.evaluation.metrics import accuracy
from adaptkit.heads.heads import Model, build_model
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import Method
from adaptkit.training.runs import Run, surroundings
from adaptkit.training.session import Plan

RESULTS = Path(__file__).parent / "results" / "students.json"
FLIPS = {"hflip": True, "vflip": True}
CELLS = {"data": "elpv", "size": 96, "train": 10_000, "test": 10_000, "epochs": {"cut 5": 8, "mobile_small": 20}, "batch": 32, "views": 4, "change": FLIPS}
SETTINGS = {
    "elpv": {**CELLS, "labelled": 1.0, "teacher": {"epochs": 10, "views": 4}},
    "elpv, few labels": {**CELLS, "labelled": 0.2, "teacher": {"epochs": 30, "views": 4}},
    "fashion_mnist": {"data": "fashion_mnist", "size": 56, "train": 6_000, "test": 2_000, "labelled": 1.0, "teacher": {"epochs": 4, "views": 2}, "epochs": {"cut 5": 6, "mobile_small": 10}, "batch": 32, "views": 2, "change": {"hflip": True}},
}
TRIED = [{"temperature": 1.0, "weight": 0.5}, {"temperature": 4.0, "weight": 0.9}]
SEEDS, OTHER = (0, 1, 2), 7  # of the students; of the one with which settings are chosen


def some_rows(samples: Samples, n: float) -> np.ndarray:
    "The rows of about n of them, every class with its share."
    share = min(1.0, n / len(samples))
    return np.arange(len(samples)) if share == 1 else split_rows(samples.labels, shares=(share, 1 - share, 0), seed=0)[0]


def some(samples: Samples, n: float) -> Samples:
    "About n of them."
    return samples.take(some_rows(samples, n))


def small(samples: Samples, model: Model) -> Samples:
    "The same images, stored at the size that a model sees."
    parts = [make_batch(samples, rows, spec=model.reader).x for rows in np.array_split(np.arange(len(samples)), max(1, len(samples) // 64))]
    pixels = (255 * torch.cat(parts)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return Samples(np.ascontiguousarray(pixels), samples.labels, [samples.name(i) for i in range(len(samples))])


def prepared(name: str, root: str | None) -> tuple[Data, Model]:
    "Data without copies across splits, at the teacher's size; the teacher before training."
    s = SETTINGS[name]
    data = load_data(s["data"], **({"root": root} if root and s["data"] == "fashion_mnist" else {}))
    data = dataclasses.replace(data, train=some(data.train, s["train"]), valid=some(data.valid, 600), test=some(data.test, s["test"]))
    data = apart(data, check_data(data, labels=False)) if s["data"] == "elpv" else data
    large = build_model("efficientnet_lite0", data, size=s["size"], seed=0)
    return dataclasses.replace(data, **{split: small(samples, large) for split, samples in data.splits.items()}), large


def answered(train: Samples, labelled: np.ndarray, teacher: Model) -> Samples:
    "All images; those without a label have the teacher's first choice."
    labels = predict(teacher, train).predicted.astype(train.labels.dtype)
    labels[labelled] = train.labels[labelled]
    return dataclasses.replace(train, labels=labels)


class School:
    "Everything that learns on one data set, in one folder."

    def __init__(self, name: str, data: Data, large: Model, place: Path) -> None:
        self.s, self.place, self.seconds = SETTINGS[name], place, {}
        labelled = some_rows(data.train, self.s["labelled"] * len(data.train))
        self.data = dataclasses.replace(data, train=data.train.take(labelled))
        everything = FineTune(depth=len(large.backbone.stage_names))
        self.teacher = self.learn("teacher", large, everything, self.data, seed=0, **self.s["teacher"])
        self.all = dataclasses.replace(data, train=answered(data.train, labelled, self.teacher.model))

    def learn(self, title: str, model: Model, method: Method, data: Data, *, seed: int, epochs: int, views: int) -> Run:
        "One training."
        plan = Plan(epochs=epochs, batch_size=self.s["batch"], views=views, augment=Augment(**self.s["change"]), seed=seed, accelerator="cpu")
        began, known = time.process_time(), (self.place / title / "model.json").exists()
        run = fit(model, data, method, plan=plan, out=self.place / title, cache=self.place / "cache", observers=[], exists="resume")
        spent = round(time.process_time() - began, 1)
        self.seconds |= {} if known else {title: spent}
        print(title, f"{run.history[-1]['valid_accuracy']:.3f} of the validation images, {'found' if known else f'{spent} s'}", flush=True)
        return run

    def pupil(self, student: str, seed: int, how: dict | None) -> Run:
        "A student, with a teacher and all images, or alone with the labelled ones, as many steps."
        begin = student_of(student, self.teacher.model, seed=seed)
        usual = learning(begin, 2 if student.startswith("cut") else None)
        method = Distillation(self.teacher, base=usual, **how) if how else usual
        title = f"{student}, seed {seed}, " + (f"temperature {how['temperature']:g}, weight {how['weight']:g}" if how else "alone")
        epochs = self.s["epochs"][student] if how else round(self.s["epochs"][student] / self.s["labelled"])
        return self.learn(title, begin, method, self.all if how else self.data, seed=seed, epochs=epochs, views=self.s["views"])


def choose(school: School, student: str) -> list[dict]:
    "The settings that were tried, the best on the validation images first."
    rows = []
    for how in TRIED:
        last = school.pupil(student, OTHER, how).history[-1]
        rows.append({**how, "valid_accuracy": last["valid_accuracy"], "valid_loss": last["valid_loss"]})
    return sorted(rows, key=lambda r: (-r["valid_accuracy"], r["valid_loss"]))


def judged(school: School, student: str) -> dict:
    "Three pairs of students, and their report."
    tried = choose(school, student)
    best = {k: tried[0][k] for k in ("temperature", "weight")}
    alone = [school.pupil(student, seed, None).model for seed in SEEDS]
    taught = [school.pupil(student, seed, best).model for seed in SEEDS]
    report = lineage(school.teacher.model, alone, taught, school.data, trial=Trial(corruptions=(), attack=None))
    a, g = report.lines["accuracy"], report.gains["accuracy"]
    t, s = report.costs["teacher"], report.costs["distilled"]
    fewer = {"parameters": t.parameters / s.parameters, "multiply_adds": t.multiply_adds / s.multiply_adds}
    aims = {"ten times fewer": max(fewer.values()) >= 10, "keeps 97 %": a["distilled"].value >= 0.97 * a["teacher"].value, "beats alone": g.low > 0, "ahead of alone in each seed": min(g.seeds) > 0}
    told = {"seeds": list(SEEDS), "chosen": best, "times_fewer": fewer, "kept": a["distilled"].value / a["teacher"].value, "kept_alone": a["alone"].value / a["teacher"].value, "aims": aims, "verdict": report.verdict}
    print(student, json.dumps(told, indent=1), flush=True)
    return {**told, "tried_on_validation": tried, "lineage": report.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--students", nargs="+", default=["cut 5", "mobile_small"])
    parser.add_argument("--root", help="folder with the files of Fashion-MNIST")
    parser.add_argument("--place", type=Path, help="folder for all runs; what has been trained there already isn't trained again")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.data:
        with tempfile.TemporaryDirectory() as place:
            measure(name, asked.students, asked.root, (asked.place or Path(place)) / name)


def known() -> dict:
    "What has been measured."
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def measure(name: str, students: list[str], root: str | None, place: Path) -> None:
    "One data set; what has been measured of others, and of other students, stays."
    try:
        data, large = prepared(name, root)
    except AdaptkitError as e:
        print(f"{name}: not measured. {e}", flush=True)
        missing = {name: {"not measured": "The images were not on this machine (Debian: dataset-fashion-mnist)."}}
        RESULTS.write_text(json.dumps({**missing, **known()}, indent=1) + "\n")
        return
    before = known().get(name, {})
    mine = before if before.get("settings") == json.loads(json.dumps(SETTINGS[name])) else {}  # what other settings gave is another measurement
    one_class = float(accuracy(majority(data.train, data.test, classes=data.classes)))
    school = School(name, data, large, place)
    labelled = len(school.data.train)
    mine |= {"settings": SETTINGS[name], "rows": {k: len(v) for k, v in data.splits.items()}, "labelled": labelled, "commonest class": one_class}
    for student in students:
        mine["students"] = {**mine.get("students", {}), student: judged(school, student)}
        mine |= {"cpu_seconds": {**mine.get("cpu_seconds", {}), **school.seconds}, "where": surroundings()}
        RESULTS.write_text(json.dumps({**known(), name: mine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
