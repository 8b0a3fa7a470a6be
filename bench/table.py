"""Print the tables of README from what `pytest bench --benchmark-json=bench/results/<name>.json` recorded."""

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = {"forward_backward": "forward + backward", "training_step": "training step"}


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds with three significant digits."""
    return f"{seconds * 1e3:.3g} ms"


def rows(document: dict[str, Any]) -> list[list[str]]:
    """Return one row for each measurement and baseline."""
    table = []
    for entry in document["benchmarks"]:
        info = entry["extra_info"]
        if "op" not in info:
            continue
        for key in sorted(k for k in info if k.startswith("ratio_to_")):
            baseline = key.removeprefix("ratio_to_")
            share = f"{info['share_of_floor']:.0%}" if "share_of_floor" in info else ""
            table.append(
                [
                    f"`{info['op']}`",
                    info["case"],
                    DIRECTIONS.get(info["direction"], info["direction"]),
                    milliseconds(entry["stats"]["median"]),
                    f"{info['p20_s'] * 1e3:.3g} to {info['p80_s'] * 1e3:.3g}",
                    f"{baseline} {milliseconds(info[baseline + '_s'])}",
                    f"**{info[key]:.1f}x**",
                    share,
                ]
            )
    return table


def render(document: dict[str, Any]) -> str:
    """Return a Markdown table with a line that says on what it was measured."""
    measured = [e["extra_info"] for e in document["benchmarks"] if "device" in e["extra_info"]]
    if not measured:
        return ""
    where = measured[0]
    head = ["operation", "case", "direction", "median", "20th to 80th, ms", "baseline", "ratio", "share of floor"]
    lines = [
        f"Measured on {where['device']}, {where['clock']}, {where['threads']} threads, {where['instruction_set']}, "
        f"{where['dtype']}, torch {where['torch']}, load {where['load']}, {document['datetime'][:10]}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(document)]
    notes = [entry["extra_info"]["note"] for entry in document["benchmarks"] if "note" in entry["extra_info"]]
    return "\n".join(lines + (["", " ".join(notes)] if notes else []))


def main() -> None:
    """Print the table of each result file, or write them between the markers of a Markdown file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="JSON files; default: all under bench/results")
    parser.add_argument("--into", type=Path, help="Markdown file whose `<!-- bench -->` section is replaced")
    arguments = parser.parse_args()
    files = arguments.files or sorted(RESULTS.glob("bench_*.json"))
    text = "\n\n".join(filter(None, (render(json.loads(f.read_text())) for f in files)))
    if arguments.into is None:
        print(text)
        return
    begin, end = "<!-- bench -->", "<!-- /bench -->"
    page = arguments.into.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{arguments.into} has no section between {begin} and {end}")
    before, rest = page.split(begin, 1)
    arguments.into.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


if __name__ == "__main__":
    main()
