"""What each part of MTAIR brings: variants of one size trained alike, evaluated, in one table.

    python benchmarks/ablation.py --train DATA/train --val DATA/val --out runs/ablation \
        [--config configs/train/ablation.yaml] [--steps N] [--limit N] [--only NAME ...]

Same data, same steps, same seed, same batches; the variants differ in one dimension each. A run
that was stopped is resumed, a finished one is only evaluated. Parameters are not evened out: the
table shows them.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import yaml
from machine import machine

from mtair import evaluate
from mtair.checkpoint import describe, load_model
from mtair.schedule import TrainConfig
from mtair.train import train

VARIANTS = {
    "all parts": {},
    "without prompts": {"prompt_len": 0},
    "without the Mamba branch": {"mamba_stages": []},
    "sum instead of concatenation": {"fuse": "sum"},
}


def trained(name: str, config: TrainConfig, data: Path, folder: Path) -> Path:
    """The weights of one variant."""
    folder = folder / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    dims = yaml.safe_load(Path(config.model).read_text()) | VARIANTS[name]
    shape = folder / "model.yaml"
    shape.write_text(yaml.safe_dump(dims))
    return train(replace(config, model=str(shape)), data, folder)


def row(name: str, weights: Path, scores: list[evaluate.Score]) -> str:
    tasks = dict.fromkeys(score.task for score in scores)
    means = [
        sum(score.psnr for score in its) / len(its)
        for its in ([s for s in scores if s.task == task] for task in tasks)
    ]
    millions = sum(p.numel() for p in load_model(str(weights)).parameters()) / 1e6
    info = describe(str(weights))
    cells = " | ".join(f"{mean:.2f}" for mean in means)
    hours = info.record["hours"]
    return f"| {name} | {millions:.3f} | {hours} | {cells} | `{info.sha256[:12]}` |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/train/ablation.yaml"))
    parser.add_argument("--steps", type=int, help="replace the config's number of steps")
    parser.add_argument("--limit", type=int, help="first images of each task only")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = TrainConfig.load(args.config)
    if args.steps:
        config = replace(config, steps=args.steps)
    images = f"first {args.limit} images of each task" if args.limit else "whole val sets"
    print(f"{config.model}, {config.steps} steps, seed {config.seed}; {images}; {machine()}\n")
    for number, name in enumerate(args.only):
        weights = trained(name, config, args.train, args.out)
        model = load_model(str(weights))
        scores = list(evaluate.evaluate(model, args.val, limit=args.limit))
        if not number:
            tasks = " | ".join(dict.fromkeys(score.task for score in scores))
            print(f"| variant | M parameters | hours | {tasks} | weights |")
            print("| --- | ---: | ---: |" + " ---: |" * (tasks.count("|") + 1) + " --- |")
        print(row(name, weights, scores), flush=True)


if __name__ == "__main__":
    main()
