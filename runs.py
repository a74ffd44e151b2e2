"""List training runs, oldest first: date, best accuracy, epochs, folder, data, options typed.

python runs.py [FOLDER]
"""

import csv
import json
from pathlib import Path

import cli


def main(args: cli.Words = None) -> list[dict]:
    """Print a line per run below a folder; returns what the lines say."""
    parser = cli.Parser(description="List training runs, oldest first.")
    parser.add_argument("folder", nargs="?", default="runs", help="folder of the runs")
    folder = parser.parse_args(args).folder
    if not Path(folder).is_dir():
        raise cli.UsageError(f"run train.py first, or name a folder: there is no {folder}/ here")
    runs = []
    for file in Path(folder).glob("*/metrics.csv"):
        options = json.loads(file.with_name("args.json").read_text(encoding="utf-8"))
        with open(file, encoding="utf-8", newline="") as table:
            rows = list(csv.DictReader(table))
        best = max((round(float(row["val_accuracy"]), 4) for row in rows), default=None)
        run = {"date": options.get("date", "?"), "best_accuracy": best}
        run |= {"epochs": rows[-1]["epoch"] if rows else 0, "run": str(file.parent)}
        runs.append(run | {"data": options["data_path"], "options": options.get("typed", "?")})
    runs.sort(key=lambda run: (run["date"], run["run"]))
    for run in runs:
        cli.say(cli.printable("  ".join(map(str, run.values()))))
    return runs


if __name__ == "__main__":
    cli.run(main)
