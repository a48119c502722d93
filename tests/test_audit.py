"""The audit: parts, the call, what a run folder gives, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from adaptkit.cli import app
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.heads.heads import build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.robustness.audit import Audit, audit_robustness
from adaptkit.robustness.finished import audit_page, audit_run, radius, write_audit
from adaptkit.robustness.parts import ATTACKED, EFFORTS, PARTS, mean_score, summed_up
from adaptkit.robustness.pixels import FAULTS
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.plan import Plan
from adaptkit.training.runs import RUN_FILES, Run

CHEAP: dict[str, Any] = {"parts": ["clean", "white box"], "checks": ["logits", "inside"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    "A small network for digits, divided by a seed that isn't the default."
    data = load_data("digits", seed=3)
    plan = Plan(epochs=3, batch_size=64, views=1, augment=Augment(hflip=False), accelerator="cpu")
    model = build_model(load_backbone("small_cnn", size=20), data, seed=0)
    out = tmp_path_factory.mktemp("audit") / "run"
    return fit(model, data, FineTune(depth=3, rate=1e-2, head_rate=1e-2), plan=plan, out=out, observers=[])


@pytest.fixture(scope="module")
def audit(run: Run) -> Audit:
    return audit_run(run.folder, eps=0.1, n=24)


def test_everything_is_asked_of_the_same_images(audit: Audit) -> None:
    assert list(audit.lines) == ["clean", "white box", "black box", "corrupted", "together"]
    assert {s.n for found in audit.lines.values() for s in found.values()} == {24} and len(audit.lines["corrupted"]) == 15
    clean, every = audit.lines["clean"]["untouched"].value, audit.lines["together"]["every attack"].value
    attacked = [s.value for part in ATTACKED for s in audit.lines[part].values()]
    assert every <= min(attacked) and max(attacked) <= clean and every < clean - 0.3
    assert all(s.low <= s.value <= s.high for found in audit.lines.values() for s in found.values())
    assert len(audit.checks.verdicts) == 14 and audit.checks.passed and "checks of the measurement passed" in audit.verdict


def test_the_same_call_gives_the_same_audit(run: Run) -> None:
    one, two = (audit_run(run.folder, eps=0.1, n=12, **CHEAP).to_json() for _ in "ab")
    assert one == two


def test_the_model_is_left_as_it_was(run: Run) -> None:
    model = run.model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    audit_robustness(model, load_data("digits", seed=3), n=8, **CHEAP)
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_it_survives_json_and_says_when_that_is_damaged(audit: Audit) -> None:
    value = json.loads(json.dumps(audit.to_json(), allow_nan=False))
    back = Audit.from_json(value)
    assert back.to_json() == audit.to_json() and back.verdict == audit.verdict
    del value["checks"]
    with pytest.raises(AdaptkitError, match="no stored audit"):
        Audit.from_json(value)


def test_a_broken_defence_is_not_believed(run: Run) -> None:
    data = load_data("digits", seed=3)
    rounded = FAULTS["rounded pixels"][1](run.model, torch.rand(4, 3, 20, 20))
    found = audit_robustness(rounded, data, eps=0.1, n=24, parts=["white box"], checks=["quantisation", "gradients"])
    assert found.checks.tripped == ("quantisation", "gradients") and "Don't believe it" in found.verdict


def test_probabilities_are_told_not_fatal(run: Run) -> None:
    soft = FAULTS["softmax at the end"][1](run.model, torch.rand(4, 3, 20, 20))
    found = audit_robustness(soft, load_data("digits", seed=3), n=8, **CHEAP)
    assert list(found.lines) == ["clean"] and "logits" in found.checks.tripped
    assert found.remarks and found.remarks[0].startswith("white box: not measured") and "no attack was measured" in found.verdict


def test_every_attack_is_the_worst_for_each_image() -> None:
    masks = {"white box": {"a": torch.tensor([True, True, False, False])}, "black box": {"b": torch.tensor([True, False, True, False])}}
    assert summed_up(masks, seed=0)["together"]["every attack"].value == 0.25
    assert "together" not in summed_up({"clean": masks["white box"]}, seed=0)
    same = mean_score("m", torch.ones(3, 5, dtype=torch.bool), seed=0)
    assert (same.value, same.low, same.high, same.n) == (1.0, 1.0, 1.0, 5)


def test_outsiders_add_a_part(run: Run) -> None:
    PARTS.items["mirrored"] = lambda case, effort: {"mirrored": case.right(case.x.flip(3))}
    try:
        found = audit_robustness(run.model, load_data("digits", seed=3), n=8, parts=["mirrored"], checks=["logits"])
        assert list(found.lines) == ["mirrored"]
    finally:
        del PARTS.items["mirrored"]


def test_thorough_contains_the_standard_ensemble() -> None:
    assert EFFORTS["thorough"].ensemble and EFFORTS["thorough"].queries == 5000 and not EFFORTS["quick"].ensemble


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"effort": "heroic"}, "Unknown effort"),
        ({"parts": []}, "Nothing to audit"),
        ({"parts": ["dark box"]}, "Did you mean"),
        ({"eps": 8}, "in pixel units"),
        ({"eps": -0.1}, "no radius"),
        ({"norm": "l3"}, "Unknown norm"),
        ({"n": 0}, "at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"split": "exam"}, "Unknown split"),
    ],
)
def test_bad_input_is_told(run: Run, how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdaptkitError, match=sentence):
        audit_robustness(run.model, load_data("digits", seed=3), **how)


def test_a_radius_is_read_as_people_write_it() -> None:
    assert radius("8/255") == 8 / 255 and radius("0.03") == 0.03 and radius("0") == 0
    for wrong in ("8 px", "-1/255", "1/0", "", "1/2/3", "1e-2"):
        with pytest.raises(AdaptkitError, match="no radius"):
            radius(wrong)


def test_the_files_are_whole_and_belong_to_the_run(run: Run, audit: Audit, tmp_path: Path) -> None:
    page = write_audit(audit, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audit.html", "audit.json"] and {"audit.html", "audit.json"} <= {*RUN_FILES}
    text = page.read_text()
    assert "data:image/png;base64," in text and "no bounds" in text and "frost 3" in text and '="http' not in text
    evil = Audit.from_json(audit.to_json() | {"data": "<script>alert(1)</script>"})
    assert "<script>" not in audit_page(evil)
    folder = tmp_path / "a file"
    folder.write_text("")
    with pytest.raises(AdaptkitError, match="Cannot write"):
        write_audit(audit, folder)


def test_a_run_is_audited_on_its_own_test_images(run: Run) -> None:
    record = json.loads((run.folder / "run.json").read_text())
    try:
        (run.folder / "run.json").write_text(json.dumps(record | {"data": record["data"] | {"fingerprint": "0"}}))
        with pytest.raises(AdaptkitError, match="have changed since"):
            audit_run(run.folder, n=8)
        (run.folder / "run.json").write_text(json.dumps(record | {"data": record["data"] | {"name": "mine"}}))
        with pytest.raises(AdaptkitError, match="--data"):
            audit_run(run.folder, n=8)
        assert audit_run(run.folder, data="digits", n=8, **CHEAP).n == 8
    finally:
        (run.folder / "run.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_the_command(run: Run) -> None:
    done = CliRunner().invoke(app, ["audit", str(run.folder), "--eps", "20/255", "-n", "12"])
    assert done.exit_code == 0, done.output
    assert "every attack" in done.output and done.output.strip().endswith("audit.html")
    stored = Audit.from_json(json.loads((run.folder / "audit.json").read_text()))
    assert stored.n == 12 and stored.eps == 20 / 255
    wrong = CliRunner().invoke(app, ["audit", str(run.folder / "nowhere")])
    assert isinstance(wrong.exception, AdaptkitError) and "not a run folder" in str(wrong.exception)
