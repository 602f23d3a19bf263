"""The table of this folder's README, from what `gradmask audit` wrote of each run.

python results/audit-dynamics/table.py
"""

import json
from pathlib import Path
from statistics import mean, stdev

SCORES = (
    *("combined rank", "area_under_margin", "cumulative_loss", "mean_probability", "wrong_share"),
    *("early_margin", "late_margin", "learning_time", "forgetting_events", "last_loss"),
)


def main() -> None:
    """Print mean ± standard deviation over the seeds of each kind of noise."""
    runs: dict[str, list[dict]] = {}
    for path in sorted(Path(__file__).parent.glob("*-seed*.json")):
        kind = path.stem.rsplit("-seed", 1)[0]
        runs.setdefault(kind, []).append(json.loads(path.read_text())["detection"])
    print(f"| Score | {' | '.join(f'{k}, {len(found)} seeds' for k, found in runs.items())} |")
    print("|---" * (len(runs) + 1) + "|")
    for name in SCORES:
        cells = []
        for found in runs.values():
            for key in ("auroc", "average_precision"):
                values = [detection[name][key] for detection in found]
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.3f}{spread}")
        pairs = (" / ".join(cells[i : i + 2]) for i in range(0, len(cells), 2))
        print(f"| {name.replace('_', ' ')} | {' | '.join(pairs)} |")


if __name__ == "__main__":
    main()
