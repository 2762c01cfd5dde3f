"""From measurements to what a person reads: ``results.json``, ``table.md`` and the plots of ``support/plots.py``.

``python bench/report.py FOLDER...`` writes table and plots anew from the ``results.json`` in each folder;
``python bench/report.py --readme`` writes the README's table from all committed results, ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
README = BENCH.parent / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SCHEMA = 1
_OURS = "tersor"  # what every ratio is relative to


def slim(raw: Path) -> dict[str, Any]:
    """The results proper out of pytest-benchmark's JSON: one record per measurement, ratios, targets."""
    found = json.loads(raw.read_text())
    ours = found["tersor"]
    measurements = [_record(entry, ours["groups"]) for entry in found["benchmarks"]]
    medians = {(m["group"], m["impl"]): m["median"] for m in measurements}
    for m in measurements:
        base = medians.get((m["group"], _OURS))
        m["times_tersor"] = m["median"] / base if base else None
    return {
        "schema": SCHEMA,
        "machine": ours["machine"],
        "limits": ours["limits"],
        "groups": ours["groups"],
        "measurements": measurements,
        "not_timed": ours["not_timed"],
        "targets": judge(ours["targets"], measurements, ours["groups"]),
    }


def judge(targets: list[dict[str, Any]], measurements: list[dict[str, Any]], groups: Any) -> list[dict[str, Any]]:
    """Every target in every group that it names, with the figure; None where something was not timed."""
    verdicts = []
    for target in targets:
        for group in (name for name in groups if fnmatchcase(name, target["group"])):
            rows = {m["impl"]: m for m in measurements if m["group"] == group}
            own = rows.get(target["impl"])
            if target["against"] == "copy":
                figure = own["share_of_copy"] if own else None
            else:
                measure = "extra_memory_bytes" if target["memory"] else "median"
                rivals = [m[measure] for name, m in rows.items() if fnmatchcase(name, target["against"])]
                figure = min(rivals) / own[measure] if own and rivals else None
            reached = figure is not None and figure >= target["at_least"]
            verdicts.append(target | {"group": group, "figure": figure, "reached": reached})
    return verdicts


def _record(entry: dict[str, Any], groups: dict[str, Any]) -> dict[str, Any]:
    stats, extra, group = entry["stats"], entry["extra_info"], entry["group"]
    record = {key: groups[group][key] for key in ("operator", "size", "dtype", "direction")}
    record |= {"group": group, "impl": entry["params"]["impl"], "rounds": stats["rounds"]}
    record |= {key: stats[key] for key in ("min", "q1", "median", "q3")}
    return record | {key: value for key, value in extra.items() if value not in (None, "")}


def write(results: dict[str, Any], folder: Path) -> None:
    """All files of one run; the plots are left out, with a word, where matplotlib is not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(_rounded(results), indent=1) + "\n")
    render(folder)


def render(folder: Path) -> None:
    results = load(folder)
    sys.path.insert(0, str(BENCH / "support"))
    try:
        import plots
    except ImportError as error:
        print(f"report: no plots ({error})", file=sys.stderr)
        drawn = []
    else:
        drawn = plots.draw(results, folder)
    (folder / "table.md").write_text(table(results, drawn))


def load(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{folder}/results.json has schema {results.get('schema')}, this report reads {SCHEMA}")
    return results


def table(results: dict[str, Any], drawn: list[str]) -> str:
    """The whole run as Markdown."""
    parts = [f"# Benchmarks: {machine_name(results)}", "", *_facts(results), ""]
    if results["targets"]:
        parts += ["## Targets", "", *_targets(results["targets"]), ""]
    if bad := [row for row in results["not_timed"] if row["kind"] == "wrong"]:
        parts += ["## Wrong results", "", "These disagree with the float64 reference, so they have no timing.", ""]
        parts += [f"- `{row['group']}` **{row['impl']}**: {row['reason']}" for row in bad] + [""]
    parts += [line for name in drawn for line in (f"![{name.removesuffix('.png')}]({name})", "")]
    operators = dict.fromkeys(group["operator"] for group in results["groups"].values())
    for operator in operators:
        parts += [f"## {operator}", ""]
        for name, group in results["groups"].items():
            if group["operator"] == operator:
                parts += [*_group(name, group, results), ""]
        parts += [*_notes(operator, results), ""]
    if rest := [row for row in results["not_timed"] if row["kind"] != "wrong"]:
        parts += ["## Not timed", "", *_rows(["group", "impl", "why"], [_not_timed(row) for row in rest]), ""]
    return "\n".join(parts).rstrip() + "\n"


def machine_name(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"


def seconds(value: float) -> str:
    """Three digits with the unit that fits."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 100 else f"{value:.3g}x"


def _facts(results: dict[str, Any]) -> list[str]:
    machine, limits = results["machine"], results["limits"]
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("tersor", "torch", "triton", "cuda", "natten", "python")
        if name in machine
    )
    lines = [f"- {machine['date']}, commit {machine['commit']}"]
    lines += [f"- {machine['processor']}, {machine['logical_cores']} logical cores, {machine['threads']} threads used"]
    lines += [f"- {machine['gpu']}, compute capability {machine['capability']}"] if "gpu" in machine else []
    lines += [f"- {versions}", *(f"- {line}" for line in machine["tersor_build"])]
    if limits:
        rates = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in limits["matmul_flops_per_second"].items())
        lines.append(
            f"- measured in this run: copy {limits['copy_bytes_per_second'] / 1e9:.3g} GB/s (read and written, "
            f"{limits['copy_bytes'] >> 20} MiB); matrix product of size {limits['matmul_size']}: {rates}"
        )
    if not machine["freed_memory_is_kept"]:
        lines.append("- **the allocator returns freed memory to the system**: large outputs pay for page faults")
    if machine["quick"]:
        lines.append("- **a quick run: these figures are not results**")
    return lines


def _targets(targets: list[dict[str, Any]]) -> list[str]:
    rows = []
    for t in targets:
        copy = t["against"] == "copy"
        show = (lambda value: f"{value:.0%}") if copy else times
        rival = t["against"].replace("*", "")
        what = f"less memory kept than {rival}" if t["memory"] else f"faster than {rival}"
        what = "share of the copy bandwidth" if copy else what
        figure = "not timed" if t["figure"] is None else show(t["figure"])
        rows.append(
            [f"`{t['group']}`", what, show(t["at_least"]), figure, "reached" if t["reached"] else "**not reached**"]
        )
    return _rows(["group", f"{_OURS}", "to reach", "measured", ""], rows)


def _group(name: str, group: dict[str, Any], results: dict[str, Any]) -> list[str]:
    lines = [f"### `{name}`", ""]
    if group["bytes"]:
        copy = group["copy_bytes_per_second"]
        lines += [
            f"{group['bytes'] / 1e6:.4g} MB must move, {group['flops'] / 1e9:.3g} GFLOP; "
            f"copying as many bytes: {seconds(group['bytes'] / copy)}, {copy / 1e9:.3g} GB/s",
            "",
        ]
    rows = []
    for m in sorted((m for m in results["measurements"] if m["group"] == name), key=lambda m: m["median"]):
        ratio = times(m["times_tersor"]) if m["times_tersor"] else ""
        spread = f"{seconds(m['p20'])} to {seconds(m['p80'])}"
        rate = f"{m['gb_per_s']:.3g} ({m['share_of_copy']:.0%})" if "gb_per_s" in m else ""
        memory = f"{m['extra_memory_bytes'] / 1e6:.4g} MB" if "extra_memory_bytes" in m else ""
        error = f"{m['error']:.1e}" if "error" in m else "not compared"
        impl = m["impl"] + (f" ({m['runs']})" if "runs" in m else "")
        rows.append([impl, seconds(m["median"]), spread, str(m["rounds"]), ratio, rate, memory, error])
    header = ["impl", "median", "20 % to 80 %", "rounds", f"of {_OURS}", "GB/s (of copy)", "extra memory", "error"]
    return lines + _rows(header, rows)


def _notes(operator: str, results: dict[str, Any]) -> list[str]:
    """What each implementation is, once per operator."""
    mine = [m for m in results["measurements"] if m["operator"] == operator]
    notes = dict.fromkeys((m["impl"], m["note"]) for m in mine if "note" in m)
    kinds = dict.fromkeys(m["extra_memory"] for m in mine if "extra_memory" in m)
    lines = [f"- {impl}: {note}" for impl, note in notes]
    return lines + [f"- extra memory: {kind}" for kind in kinds]


def _not_timed(row: dict[str, Any]) -> list[str]:
    reason = row["reason"].replace("|", "\\|")
    return [f"`{row['group']}`", row["impl"], f"fails: {reason}" if row["kind"] == "fails" else reason]


def _rows(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def _rounded(value: Any) -> Any:
    """Six digits: more are noise, and would make every file differ in every line."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def readme_table(folders: list[Path]) -> str:
    """The README's results: per machine one row per operator and direction, over all sizes of all its folders."""
    machines: dict[str, list[Path]] = {}
    for folder in folders:
        machines.setdefault(machine_name(load(folder)), []).append(folder)
    parts = [line for name, found in machines.items() for line in _machine_table(name, found)]
    return "\n".join(parts).rstrip() or "No results have been committed yet."


def _machine_table(name: str, folders: list[Path]) -> list[str]:
    sizes: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    links = []
    for folder in folders:
        results = load(folder)
        day, commit = results["machine"]["date"].split()[0], results["machine"]["commit"]
        link = f"[{folder.name}](bench/results/{folder.name}/table.md)"
        links.append(f"- {link}, torch {results['machine']['torch']}, {day}, commit {commit}")
        for group_name, group in results["groups"].items():
            timed = {m["impl"]: m for m in results["measurements"] if m["group"] == group_name}
            if _OURS in timed and group["operator"] != "dispatch":
                row = tuple(group[key] for key in ("operator", "direction", "dtype"))
                sizes.setdefault(row, []).append(timed)
    if not sizes:
        return []
    header = ["operator", "direction", "dtype", "sizes", "of copy bandwidth", "eager", "torch.compile", "best other"]
    rows = [[f"`{row[0]}`", *row[1:], *_readme_cells(timed)] for row, timed in sizes.items()]
    return [f"**{name}**", "", *_rows(header, rows), "", "All figures and targets:", "", *links, ""]


def _readme_cells(sizes: list[dict[str, Any]]) -> list[str]:
    """The number of sizes, and what the fastest of each kind of rival took there, as multiples of our time."""
    shares = [timed[_OURS]["share_of_copy"] for timed in sizes if "share_of_copy" in timed[_OURS]]
    eager, compiled, other, names = [], [], [], {}
    for timed in sizes:
        rivals = {n: m["median"] / timed[_OURS]["median"] for n, m in timed.items() if not m["ours"]}
        eager += [rivals.pop("eager")] if "eager" in rivals else []
        of_compile = [rivals.pop(n) for n in list(rivals) if n.startswith("compiled")]
        compiled += [min(of_compile)] if of_compile else []
        if rivals:
            best = min(rivals, key=rivals.__getitem__)
            other.append(rivals[best])
            names[best] = None
    best_other = f"{', '.join(names)}: {_range(other, times)}" if other else ""
    return [str(len(sizes)), _range(shares, "{:.0%}".format), _range(eager, times), _range(compiled, times), best_other]


def _range(values: list[float], show: Callable[[float], str]) -> str:
    ends = list(dict.fromkeys(show(each) for each in (min(values), max(values)))) if values else []
    return " to ".join(ends)


def readme(path: Path, results: Path, check: bool) -> int:
    """Writes the table between the markers, or with ``check`` says whether it is up to date (0) or not (1)."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        print(f"report: {path.name} must hold {BEGIN} and then {END}, once each", file=sys.stderr)
        return 1
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    folders = sorted(file.parent for file in results.glob("*/results.json"))
    wanted = f"{before}{BEGIN}\n{readme_table(folders)}\n{END}{after}"
    if not check:
        path.write_text(wanted)
    elif wanted != text:
        print(f"report: the results in {path.name} are stale: run python bench/report.py --readme", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/report.py", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="write table and plots anew from their results.json")
    parser.add_argument("--readme", nargs="?", type=Path, const=README, help="write the table in README.md (or a path)")
    parser.add_argument(
        "--check", action="store_true", help="with --readme: write nothing, fail if it is not up to date"
    )
    parser.add_argument("--results", type=Path, default=BENCH / "results", help="where --readme finds results")
    options = parser.parse_args(arguments)
    if not options.folders and not options.readme:
        parser.error("nothing to do: name a results folder or --readme")
    if options.check and not options.readme:
        parser.error("--check goes with --readme")
    for folder in options.folders:
        render(folder)
    return readme(options.readme, options.results, options.check) if options.readme else 0


if __name__ == "__main__":
    sys.exit(main())
