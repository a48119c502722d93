"""Run by the Python of tests/oracles.py: the same model, the same images, our attack and somebody else's. Prints one line of JSON for each pair."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.robustness.attacks import FGSM, PGD, Attack
from adaptkit.robustness.autopgd import APGD, APGDT
from adaptkit.robustness.contract import quiet_model
from adaptkit.robustness.ensemble import AutoAttack
from adaptkit.robustness.fab import FABT
from adaptkit.robustness.minimal import CarliniWagner, DeepFool
from adaptkit.robustness.square import Square

EPS = {"linf": 0.15, "l2": 1.0}
Theirs = Callable[[nn.Module, Tensor, Tensor], Tensor]


def digits() -> tuple[Tensor, Tensor]:
    "All 1797 digits, [N, 3, 8, 8], and their labels; the last ones are to be attacked."
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(pixels[order] / 16).float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    return x.contiguous(), torch.from_numpy(labels[order])


def network(robust: bool) -> tuple[nn.Module, Tensor, Tensor]:
    "A small network, trained on images or on what PGD makes of them; and the images it hasn't seen."
    torch.manual_seed(int(robust))
    x, y = digits()
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 10))
    optimizer, attack, generator = torch.optim.Adam(net.parameters(), 2e-3), PGD(0.1, steps=3, early_stop=False), torch.Generator().manual_seed(0)
    for _ in range(8):
        for rows in torch.randperm(1297, generator=generator).split(64):
            seen = attack.perturb(net, x[rows], y[rows], generator=generator) if robust else x[rows]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(seen), y[rows]).backward()
            optimizer.step()
    return net.eval(), x[1297:], y[1297:]


def torchattack(name: str, **options: object) -> Theirs:
    import torchattacks

    return lambda net, x, y: getattr(torchattacks, name)(net, **options)(x, y)


def foolbox_attack(name: str, eps: float | None, **options: object) -> Theirs:
    import foolbox

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        return getattr(foolbox.attacks, name)(**options)(model, x, y, epsilons=eps)[1]

    return run


def art_attack(norm: str, eps: float) -> Theirs:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model = PyTorchClassifier(net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu")
        attack = ProjectedGradientDescentPyTorch(model, norm=np.inf if norm == "linf" else 2, eps=eps, eps_step=eps / 8, max_iter=20, num_random_init=1, batch_size=len(x), verbose=False)
        return torch.from_numpy(attack.generate(x.numpy(), nn.functional.one_hot(y, 10).numpy()))

    return run


def published(kind: str, norm: str, eps: float, *, steps: int, targets: int, queries: int, batch: int) -> Theirs:
    "One of the four of the published ensemble, or all (`standard`)."
    from pyautoattack import AutoAttack as Published

    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        names = {} if kind == "standard" else {"attacks": [kind], "version": "custom"}
        ensemble = Published(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0, **names)
        ensemble.verbose, ensemble.square.n_queries, ensemble.fab.n_iter, ensemble.fab.n_restarts = False, queries, steps, 1
        draw = ensemble.square.random_int  # leaves out the last place of a square, much on images of 8 pixels
        ensemble.square.random_int = lambda low=0, high=1, shape=(1,): draw(low, high + 1, list(shape))
        ensemble.apgd.n_restarts, ensemble.fab.n_target_classes, ensemble.apgd_targeted.n_target_classes = 1, targets, targets
        for one in (ensemble.apgd, ensemble.apgd_targeted):
            one.n_iter = one.n_iter_orig = steps
            one.n_iter_2, one.n_iter_min, one.size_decr = (max(int(s * steps), 1) for s in (0.22, 0.06, 0.03))
        return ensemble.run_standard_evaluation(x, y, batch_size=batch)[0]

    return run


def adv_lib_apgd(norm: str, eps: float, steps: int) -> Theirs:
    from adv_lib.attacks.auto_pgd import apgd

    order = float("inf") if norm == "linf" else 2
    return lambda net, x, y: apgd(net, x, y, eps=eps, norm=order, n_iter=steps, loss_function="ce")


def adv_lib_carlini_wagner(steps: int, searches: int, rate: float) -> Theirs:
    from adv_lib.attacks.carlini_wagner import carlini_wagner_l2

    return lambda net, x, y: carlini_wagner_l2(net, x, y, max_iterations=steps, binary_search_steps=searches, learning_rate=rate, initial_const=1.0, abort_early=False)


def shortest() -> Iterator[tuple[str, Attack, dict[str, Theirs]]]:
    "The attacks that look for the smallest change; they have no radius, and what is longer than ours counts for nothing."
    steps, searches, rate = 200, 6, 0.05
    box = foolbox_attack("L2CarliniWagnerAttack", None, steps=steps, binary_search_steps=searches, stepsize=rate, initial_const=1.0, abort_early=False)
    yield "DeepFool", DeepFool(), {"foolbox": foolbox_attack("L2DeepFoolAttack", None, steps=50, candidates=10), "torchattacks": torchattack("DeepFool", steps=50)}
    yield "C&W", CarliniWagner(steps, searches, rate=rate), {"foolbox": box, "adv-lib": adv_lib_carlini_wagner(steps, searches, rate)}


def pairs(norm: str, *, steps: int, targets: int, queries: int, batch: int) -> Iterator[tuple[str, Attack, dict[str, Theirs]]]:
    "Name, our attack, theirs by package."
    eps = EPS[norm]
    ours = {"eps": eps, "norm": norm}
    budget = {"steps": steps, "targets": targets, "queries": queries, "batch": batch}
    alpha = eps / 8
    simple = torchattack("FGSM", eps=eps) if norm == "linf" else foolbox_attack("L2FastGradientAttack", eps)
    pgd = torchattack("PGD" if norm == "linf" else "PGDL2", eps=eps, alpha=alpha, steps=20)
    box = foolbox_attack("LinfPGD" if norm == "linf" else "L2PGD", eps, abs_stepsize=alpha, steps=20)
    yield "FGSM", FGSM(**ours), {"torchattacks" if norm == "linf" else "foolbox": simple}
    yield "PGD-20", PGD(**ours, steps=20, step=alpha), {"torchattacks": pgd, "foolbox": box, "ART": art_attack(norm, eps)}
    theirs = {kind: published(kind, norm, eps, **budget) for kind in ("apgd-ce", "apgd-t", "fab-t", "square", "standard")}
    yield "APGD-CE", APGD(**ours, steps=steps), {"published": theirs["apgd-ce"], "adv-lib": adv_lib_apgd(norm, eps, steps)}
    yield "APGD-T", APGDT(**ours, steps=steps, targets=targets), {"published": theirs["apgd-t"]}
    yield "FAB-T", FABT(**ours, steps=steps, targets=targets), {"published": theirs["fab-t"]}
    yield "Square", Square(**ours, queries=queries), {"published": theirs["square"]}
    yield "ensemble", AutoAttack(**ours, steps=steps, targets=targets, queries=queries), {"published": theirs["standard"]}
    if norm == "l2":
        yield from shortest()


def measured(net: nn.Module, x: Tensor, y: Tensor, run: Callable[[], Tensor], norm: str) -> dict[str, float]:
    "Robust accuracy, the median length of what fools, and seconds; what left the ball or the box counts as nothing."
    began, used = time.perf_counter(), time.process_time()
    moved = run().detach()
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    far = torch.linalg.vector_norm((moved - x).flatten(1), float("inf") if norm == "linf" else 2, dim=1)
    inside = (far <= EPS[norm] * 1.001) & (moved.flatten(1).amin(1) >= -1e-6) & (moved.flatten(1).amax(1) <= 1 + 1e-6)
    with quiet_model(net), torch.no_grad():
        right, fooled = net(x).argmax(1) == y, net(moved).argmax(1) != y
    accuracy = float((right & ~(fooled & inside)).double().mean())
    median = float(far[right & fooled].median()) if bool((right & fooled).any()) else 0.0
    return {"accuracy": round(accuracy, 4), "median_length": round(median, 4), "seconds": round(seconds, 3), "processor_seconds": round(processor, 3)}


def single_runs(robust: bool) -> Iterator[dict[str, object]]:
    "One PGD run from the same start, in double precision: the largest difference of a pixel."
    net, x, y = network(robust)
    net, x = net.double(), x.double()[:100]
    y = y[:100]
    for norm, name, more in (("linf", "PGD", {}), ("l2", "PGDL2", {"eps_for_division": 1e-30})):
        eps = EPS[norm]
        ours = PGD(eps, norm, steps=20, step=eps / 8, random_start=False, early_stop=False).perturb(net, x, y)
        theirs = torchattack(name, eps=eps, alpha=eps / 8, steps=20, random_start=False, **more)(net, x, y)
        yield {"attack": "single run", "norm": norm, "robust": robust, "threads": 1, "apart": float((ours - theirs).abs().max()), "moved": float((ours - x).abs().max())}


def resident(key: str) -> float:
    "VmRSS (now) or VmHWM (the most so far) of this process, in MiB."
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def extra_memory(run: Callable[[], Tensor]) -> float:
    "MiB that a run needs beyond what was there, measured in a process of its own, whose peak begins at zero."
    out, into = os.pipe()
    if not (child := os.fork()):
        before = resident("VmRSS")
        run()
        os.write(into, f"{resident('VmHWM') - before:.2f}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(into)
    with os.fdopen(out) as said:
        return float(said.read())


def memories(x: Tensor, *, norm: str) -> dict[str, dict[str, float]]:
    "By package: what PGD with 20 steps needs on images of 32 pixels that all stand at first. Each has run once before, so that nothing has to be imported."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10)).eval()
    x = nn.functional.interpolate(x[:100], scale_factor=4)
    with torch.no_grad():
        y = net(x).argmax(1)
    _, ours, theirs = next(p for p in pairs(norm, steps=1, targets=1, queries=1, batch=1) if p[0] == "PGD-20")
    runs: dict[str, Theirs] = {"ours": ours.perturb, **theirs}
    for run in runs.values():
        run(net, x[:2], y[:2])
    return {k: {"mib": min(extra_memory(partial(run, net, x, y)) for _ in range(3))} for k, run in runs.items()}


class Counted(nn.Module):
    "A network that counts the images it is asked about, where a gradient is wanted and where not."

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.looks, self.gradients = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            self.gradients += len(x)
        else:
            self.looks += len(x)
        return self.net(x)


def least_seconds(run: Callable[[Tensor], object], x: Tensor) -> float:
    "Processor seconds for one image: the least of several sizes of a batch, and of several tries."
    found = []
    for size in (32, 48, 64, 96, 128, 256):
        part = x[:size].contiguous(memory_format=torch.channels_last)
        for _ in range(8):
            began = time.process_time()
            for _ in range(1024 // size):
                run(part)
            found.append((time.process_time() - began) / (1024 // size) / len(part))
    return min(found)


def alone(net: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> dict[str, float]:
    "How often our attack asks the network, and what these answers alone cost in this PyTorch: the least for whoever asks as often."
    counted = Counted(net)
    began = time.process_time()
    attack.perturb(counted, x, y)
    spent = time.process_time() - began

    def gradient(part: Tensor) -> object:
        part = part.detach().requires_grad_()
        return torch.autograd.grad(net(part).sum(), part)

    with quiet_model(net):
        with torch.no_grad():
            look = least_seconds(net, x)
        slope = least_seconds(gradient, x)
    seconds = counted.looks * look + counted.gradients * slope
    return {"looks": counted.looks, "gradients": counted.gradients, "look_us": round(1e6 * look, 2), "gradient_us": round(1e6 * slope, 2), "network_seconds": round(seconds, 2), "processor_seconds": round(spent, 2)}


def fastest(net: nn.Module, x: Tensor, y: Tensor, ours: Attack, theirs: dict[str, Theirs], *, norm: str, repeat: int) -> dict[str, dict[str, float]]:
    "By package: robust accuracy, and the shortest of some times, in turn; with one thread the processor's seconds don't depend on what else runs."
    runs: dict[str, Theirs] = {"ours": ours.perturb, **theirs}
    found = [{k: measured(net, x, y, partial(run, net, x, y), norm) for k, run in runs.items()} for _ in range(repeat)]
    return {k: {"accuracy": found[0][k]["accuracy"], "median_length": found[0][k]["median_length"], **{t: min(f[k][t] for f in found) for t in ("seconds", "processor_seconds")}} for k in runs}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("images", 500), ("steps", 100), ("targets", 9), ("queries", 5000), ("batch", 500), ("repeat", 1), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--norms", nargs="*", default=list(EPS))
    parser.add_argument("--models", nargs="*", type=int, default=[0, 1])
    args = parser.parse_args()
    if args.threads > 1 and (not args.only or {"memory", "single", "network"} & set(args.only)):
        parser.error("--threads is for attacks: say which, e.g. --only ensemble; memory, single runs and the network alone are measured with one.")
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    for robust in map(bool, args.models):
        if not args.only or "single" in args.only:
            for row in single_runs(robust):
                print(json.dumps(row), flush=True)
        net, x, y = network(robust)
        x, y = x[: args.images], y[: args.images]
        for norm in args.norms:
            if not robust and "memory" in args.only:
                print(json.dumps({"attack": "memory of PGD-20", "norm": norm, "robust": robust, "images": 100, "threads": 1, **memories(x, norm=norm)}), flush=True)
            budget = {"steps": args.steps, "targets": args.targets, "queries": args.queries, "batch": min(args.batch, args.images)}
            for name, ours, theirs in pairs(norm, **budget):
                if name == "ensemble" and "network" in args.only:
                    print(json.dumps({"attack": "the network alone", "norm": norm, "robust": robust, "images": len(x), "threads": args.threads, **alone(net, x, y, ours)}), flush=True)
                if args.only and name not in args.only:
                    continue
                best = fastest(net, x, y, ours, theirs, norm=norm, repeat=args.repeat)
                print(json.dumps({"attack": name, "norm": norm, "robust": robust, "images": len(x), "threads": args.threads, **best}), flush=True)


if __name__ == "__main__":
    main()
