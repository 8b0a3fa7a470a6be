"""Write what was recorded as tables and a picture: of operations and backends, from what was compiled and run; of
speeds, from what `pytest bench --benchmark-json=bench/results/<name>.json` recorded.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = {"forward_backward": "forward + backward", "training_step": "training step"}

# What README shows of it all: a name, the operation and the case as they are recorded.
SUMMARY = (
    ("video branch", "VSCSwin", "15 frames, released"),
    ("video branch", "VSCSwin", "15 frames, released, against torch.compile"),
    ("video branch, bfloat16", "VSCSwin", "15 frames, released, bfloat16 autocast"),
    ("kept output of a frozen stem", "VSCSwin", "15 frames, released, output of a frozen stem"),
    ("`deepmsi.fuse`", "fuse", "swinv2_tiny_window8_256, 15 frames"),
    ("`deepmsi.fuse`, bfloat16", "fuse", "swinv2_tiny_window8_256, 15 frames, bfloat16 autocast"),
    ("`deepmsi.fuse`, one image", "fuse", "swinv2_tiny_window8_256, 1 image, constants fixed"),
    ("`deepmsi.fuse`, Swin V1", "fuse", "swin_tiny_patch4_window7_224, 15 frames"),
    ("`deepmsi.fuse`, Swin S3", "fuse", "swin_s3_tiny_224, 15 frames"),
    ("video branch, MKL as on Intel", "VSCSwin", "15 frames, released, MKL as on Intel"),
    ("video branch, MKL as on Intel", "VSCSwin", "15 frames, released, against torch.compile, MKL as on Intel"),
    ("`deepmsi.fuse`, MKL as on Intel", "fuse", "swinv2_tiny_window8_256, 15 frames, MKL as on Intel"),
    ("video branch, AVX2", "VSCSwin", "15 frames, released, AVX2"),
    ("`deepmsi.fuse`, AVX2", "fuse", "swinv2_tiny_window8_256, 15 frames, AVX2"),
    ("`deepmsi.fuse`, Swin V1, AVX2", "fuse", "swin_tiny_patch4_window7_224, 15 frames, AVX2"),
    ("whole model", "DeepMSI", "1 utterance of 15 frames, 256 px, released"),
    ("next frame of a stream", "EmotionStream.step", "1 stream, a frame of each, 256 px, released"),
    ("`vsc_compress`", "vsc_compress", "256 to 100 tokens x 384, 15 frames"),
    ("`window_attention`, stage 1, shifted", "window_attention", "stage 1, shifted: 64 x 64 x 96, 3 heads, 15 frames"),
    (
        "`window_attention`, stage 3, shifted",
        "window_attention",
        "stage 3, shifted: 16 x 16 x 384, 12 heads, 15 frames",
    ),
    ("TCN, last step, 1 utterance", "dilated_causal_conv1d", "last step, 1 utterance of 15 frames"),
    ("TCN, last step, 16 utterances", "dilated_causal_conv1d", "last step, 16 utterances of 15 frames"),
    ("loss, 16 rows", "cross_modal_contrastive", "16 rows x 256, two pairs, balanced labels"),
    ("loss, 4096 rows", "cross_modal_contrastive", "4096 rows x 256, two pairs, balanced labels"),
)

# In this order; a column is left out where no row has it.
COLUMNS = (
    "operation",
    "case",
    "direction",
    "median",
    "20th to 80th",
    "times as fast as",
    "eager",
    "peak memory",
    "share of floor",
)


def span(seconds: float) -> str:
    """Return a time with three significant digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def mebibytes(size: int) -> str:
    """Return a size with three significant digits."""
    return f"{float(f'{size / 2**20:.3g}'):g}"


def rows(document: dict[str, Any]) -> list[dict[str, str]]:
    """Return one row for each measurement: cells by column, without those that were not measured."""
    table = []
    for entry in document["benchmarks"]:
        info = entry["extra_info"]
        if "op" not in info:
            continue
        baselines = [key.removeprefix("ratio_to_") for key in info if key.startswith("ratio_to_")]
        row = {
            "operation": f"`{info['op']}`",
            "case": info["case"],
            "direction": DIRECTIONS.get(info["direction"], info["direction"]),
            "median": span(entry["stats"]["median"]),
            "20th to 80th": f"{span(info['p20_s'])} to {span(info['p80_s'])}",
            "times as fast as": ", ".join(against(info, baseline) for baseline in baselines),
        }
        sides = ["ours", *baselines]
        if "eager_s" in info:
            row["eager"] = " / ".join(span(info["eager_s"][side]) for side in sides if side in info["eager_s"])
        if "peak_bytes" in info:
            found = [mebibytes(info["peak_bytes"][side]) for side in sides if side in info["peak_bytes"]]
            row["peak memory"] = " / ".join(found) + " MiB"
            if "held_bytes" in info:
                row["peak memory"] += f" above {mebibytes(info['held_bytes'])} held"
        if "share_of_floor" in info:
            row["share of floor"] = f"{info['share_of_floor']:.0%}"
        table.append(row)
    return table


def against(info: dict[str, Any], baseline: str) -> str:
    """Return the ratio to a baseline, with its time, and its first call where it compiles."""
    words = f"{baseline.replace('_', ' ')} **{info[f'ratio_to_{baseline}']:.1f}x** ({span(info[baseline + '_s'])}"
    if "compile" in baseline:
        words += f", first call {info['first_call_s'][baseline]:.0f} s"
    return words + ")"


def conditions(*documents: dict[str, Any]) -> str:
    """Return on what documents were measured, how and when; nothing where they hold no measurement."""
    measured = [e["extra_info"] for document in documents for e in document["benchmarks"]]
    measured = [info for info in measured if "device" in info]
    if not measured:
        return ""
    where = measured[0]
    sets, types = (" and ".join(dict.fromkeys(info[key] for info in measured)) for key in ("instruction_set", "dtype"))
    on_gpu = where["instruction_set"].startswith("sm_")
    settings = ("TF32" if where["tf32"] else "no TF32") if on_gpu else f"{where['threads']} threads"
    days = sorted({document["datetime"][:10] for document in documents})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return (
        f"Measured on {where['device']}, {where['clock']}, {settings}, {sets}, {types}, torch {where['torch']}, {when}"
    )


def render(document: dict[str, Any]) -> str:
    """Return a Markdown table with a line that says on what it was measured; nothing where nothing was."""
    where = conditions(document)
    if not where:
        return ""
    infos = [entry["extra_info"] for entry in document["benchmarks"]]
    load = next(info["load"] for info in infos if "load" in info)
    lines = [f"{where}, load {load}.", ""]
    if any("eager_s" in info for info in infos):
        lines[0] += " Rows with eager times are replays of CUDA graphs on both sides; the others are eager, "
        lines[0] += "unless their case says one graph."
    if any("eager_s" in info or "peak_bytes" in info for info in infos):
        lines[0] += " Where several sides have a number, ours is the first."
    table = rows(document)
    head = [column for column in COLUMNS if any(column in row for row in table)]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row.get(column, "") for column in head) + " |" for row in table]
    notes = dict.fromkeys(info["note"] for info in infos if "note" in info)
    return "\n".join(lines + (["", " ".join(notes)] if notes else []))


def summary(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what README shows: a row for each case of `SUMMARY` and baseline, with its ratios by direction.

    Of cases that were recorded more than once, with torch.compile and without, each baseline counts where it was
    recorded first.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name, op, case in SUMMARY:
        for document in documents:
            for entry in document["benchmarks"]:
                info = entry["extra_info"]
                if (info.get("op"), info.get("case")) != (op, case):
                    continue
                training = info["direction"] != "forward"
                for baseline in (key.removeprefix("ratio_to_") for key in info if key.startswith("ratio_to_")):
                    row = found.setdefault((name, op, baseline), {"name": name, "baseline": baseline.replace("_", " ")})
                    key = "training" if training else "forward"
                    row.setdefault(key, (info[f"ratio_to_{baseline}"], entry["stats"]["median"], info[baseline + "_s"]))
    return list(found.values())


def render_summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of `summary` as a Markdown table; a name stands once."""
    lines = ["| what | against | forward | forward + backward |", "|---|---|---|---|"]
    before = ""
    for row in rows:
        cells = [
            f"**{row[key][0]:.1f}x** ({span(row[key][2])} → {span(row[key][1])})" if key in row else ""
            for key in ("forward", "training")
        ]
        lines.append(f"| {row['name'] if row['name'] != before else ''} | {row['baseline']} | {' | '.join(cells)} |")
        before = row["name"]
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratios of `summary` as bars, on a logarithmic axis whose line at 1 is the baseline's own speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 0.38
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(rows) + 0.9), layout="constrained")
    for key, offset, colour, label in (
        ("forward", -height / 2, "#2f6db5", "forward"),
        ("training", height / 2, "#d0663a", "forward + backward"),
    ):
        places = [n + offset for n, row in enumerate(rows) if key in row]
        ratios = [row[key][0] for row in rows if key in row]
        bars = axes.barh(places, [ratio - 1 for ratio in ratios], height, left=1, color=colour, label=label)
        axes.bar_label(bars, [f"{ratio:.1f}x" for ratio in ratios], padding=3, fontsize=7)
    names = [f"{row['name'].replace('`', '')}, against {row['baseline']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#2b2f36", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(0.75, *(0.85 * row[key][0] for row in rows for key in ("forward", "training") if key in row)))
    axes.margins(y=0.01)
    ticks = [1, 2, 3, 5, 10, 20]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times as fast as the baseline, in one run")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def operations() -> str:
    """Return which backend has which operation, where, and what of it has been compiled and run, by the records."""
    from deepmsi import backend  # the GPU script reads this file before the package is built

    compiled = {
        name: {kernel["op"] for kernel in json.loads((RESULTS / f"{name}.json").read_text())["kernels"]}
        for name in ("aot", "nvcc")
    }
    ran: set[str] = set()
    on_gpu = RESULTS / "bench_gpu.json"
    if on_gpu.exists():
        ran = {entry["extra_info"].get("op", "") for entry in json.loads(on_gpu.read_text())["benchmarks"]}

    def on_a_gpu(op: str, *, done: str, compiler: str) -> str:
        if op not in compiled[compiler]:
            return ""
        return "forward, backward" if op in ran else f"{done}, not run"

    lines = ["| operation | reference | `cpp` on CPU | `cpp` on CUDA | `triton` |", "|---|---|---|---|---|"]
    for op in backend.OPS:
        kernel = backend.KERNELS.get((op, "cpp"))
        cpu = ""
        if kernel is not None and "cpu" in kernel.devices:
            cpu = f"forward, backward; {', '.join(str(dtype).removeprefix('torch.') for dtype in kernel.dtypes)}"
        cuda = on_a_gpu(op, done="emulated, compiled", compiler="nvcc")
        triton = on_a_gpu(op, done="interpreted, compiled", compiler="aot")
        lines.append(f"| `{op}` | forward, backward | {cpu} | {cuda} | {triton} |")
    return "\n".join(lines)


def put(page: str, section: str, text: str) -> str:
    """Return a page with the text between the markers of a section."""
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"the page has no section between {begin} and {end}")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    """Print the tables of result files, or write README's sections, its picture and the page of all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="JSON files; default: all under bench/results")
    parser.add_argument(
        "--write", action="store_true", help="write README.md, docs/speed.png and bench/results/speed.md"
    )
    arguments = parser.parse_args()
    files = arguments.files or sorted(RESULTS.glob("bench_*.json"), key=lambda file: ("compiled" in file.stem, file))
    documents = [json.loads(file.read_text()) for file in files]
    text = "\n\n".join(filter(None, map(render, documents)))
    if not arguments.write:
        print(text)
        return
    root = RESULTS.parents[1]
    rows = summary(documents)
    plot(rows, root / "docs" / "speed.png")
    (RESULTS / "speed.md").write_text(
        f"# All speeds\n\n[README](../../README.md#speed) says what the words mean.\n\n{text}\n"
    )
    readme = root / "README.md"
    page = put(readme.read_text(), "ops", operations())
    readme.write_text(put(page, "bench", f"{conditions(*documents)}.\n\n{render_summary(rows)}"))


if __name__ == "__main__":
    main()
