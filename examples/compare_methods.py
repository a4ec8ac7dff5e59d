"""Accuracy of every method on a bundled checkpoint, over many drawings of its held-out images.

    python examples/compare_methods.py digits --drawings 20

Every drawing shows the 397 held-out digits in other places; all methods see the same ones. The
standard errors are over drawings of these digits: of the accuracy, and of the change against the
dense model on the same drawing.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tokred
from tokred import reducers
from tokred.data import zoo
from tokred.reducers import Reducer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "name", nargs="?", choices=["digits", "digits_cluttered"], default=zoo.DEFAULT
    )
    parser.add_argument("--drawings", type=int, default=20)
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.5, 0.25, 0.15])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="all, if not given")
    options = parser.parse_args()
    held_out = zoo.held_out(options.name)
    generator = torch.Generator().manual_seed(1)
    drawings = [
        zoo.normalise(zoo.draw(held_out.digits, generator, options.name))
        for _ in range(options.drawings)
    ]
    model = zoo.load(options.name)
    methods: dict[str, Reducer] = {name: reducers.make(name) for name in reducers.names()}
    methods["atc complete"] = tokred.ATC(linkage="complete")
    methods = {name: methods[name] for name in options.methods or sorted(methods)}

    dense = answers(model, drawings, held_out.labels)
    print(f"{options.name}: {options.drawings} drawings of {len(held_out.labels)} held-out digits")
    print(f"{'method':14s} keep  accuracy   s.e.   change   s.e.")
    print(f"{'dense':14s}       {told(dense)}", flush=True)
    bar = tqdm(total=len(methods) * len(options.keep_rates), leave=False)
    for keep_rate in options.keep_rates:
        for name, reducer in methods.items():
            with tokred.applied(model, reducer, keep_rate):
                right = answers(model, drawings, held_out.labels)
            bar.write(f"{name:14s} {keep_rate:<5g} {told(right)}   {told(right - dense)}")
            bar.update()


@torch.no_grad()
def answers(model: nn.Module, drawings: list[Tensor], labels: Tensor) -> Tensor:
    """For every drawing, the share of digits that are read rightly."""
    right = [
        torch.cat([model(part).argmax(1) for part in images.split(40)]) == labels
        for images in drawings
    ]
    return torch.stack(right).double().mean(1)


def told(share: Tensor) -> str:
    """Mean and standard error over drawings, in percent."""
    return f"{share.mean() * 100:7.2f} {share.std() / len(share) ** 0.5 * 100:6.2f}"


if __name__ == "__main__":
    main()
