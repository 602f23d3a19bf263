"""Draws `docs/demo.svg` from the committed results of the demo.

python docs/demo.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "demo" / "results.json"
PICTURE = ROOT / "docs" / "demo.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 660, 320, 46, 190, 40, 40
LEAST, MOST = 20, 100  # percent
ARMS = {  # names, colours (of Okabe and Ito), and how far the name is moved down
    "inverse": ("mask of the LEAST information", "#009e73", -3),
    "random": ("random mask", "#e69f00", -3),
    "slow": ("slow training", "#0072b2", 0),
    "fisher": ("Fisher mask", "#d55e00", 2),
    "none": ("no mask", "#30343b", 15),
}


def draw() -> str:
    """The picture as text: test accuracy over the epochs, mean over the seeds."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    last = max(row["epoch"] for run in runs for row in run["epochs"])

    def x(epoch: float) -> float:
        return LEFT + (epoch - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)

    def y(percent: float) -> float:
        return TOP + (MOST - percent) / (MOST - LEAST) * (HEIGHT - TOP - BOTTOM)

    seeds = len({run["seed"] for run in runs})
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#30343b">',
        "<title>Test accuracy over the epochs of the demo</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="13">Test accuracy (%), digits with 40 % wrong '
        f"training labels, keep 0.25, mean of {seeds} seeds</text>",
    ]
    out += [
        f'<path d="M{LEFT} {y(percent):.1f}H{x(last):.1f}" stroke="#d8dbe0"/>'
        f'<text x="{LEFT - 8}" y="{y(percent) + 4:.1f}" text-anchor="end">{percent}</text>'
        for percent in range(LEAST, MOST + 1, 10)
    ]
    out += [
        f'<text x="{x(epoch):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{epoch}</text>'
        for epoch in (1, 10, 20, last)
    ]
    middle = x((1 + last) / 2)
    out.append(f'<text x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">epoch</text>')
    for arm, (name, colour, down) in ARMS.items():
        rows = [run["epochs"] for run in runs if run["arm"] == arm]
        means = [100 * mean(row[k]["test_accuracy"] for row in rows) for k in range(last)]
        points = " ".join(f"{x(k + 1):.1f},{y(value):.1f}" for k, value in enumerate(means))
        out.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{x(last) + 6:.1f}" y="{y(means[-1]) + 4 + down:.1f}" fill="{colour}">'
            f"{name}</text>"
        )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
