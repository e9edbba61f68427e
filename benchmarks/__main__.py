"""The command line: `python -m benchmarks --help`."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUPS = ("unet", "vae", "sampler", "train", "import", "load")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="minisd against diffusers, as a table")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=" ".join(GROUPS))
    parser.add_argument("--pairs", type=int, default=5, help="undisturbed pairs that are timed, after a warm-up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of each peer")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--profile", action="store_true", help="of a goal that is missed, show where the time goes")
    parser.add_argument("--small", action="store_true", help="small networks: to see that it runs, not how fast")
    parser.add_argument("--out", type=Path, help="write everything that was measured here, as JSON")
    return parser.parse_args(argv)


@dataclass
class Result:
    """A row of the table."""

    group: str
    setting: str
    goal: str
    seconds: tuple[list[float], list[float]] = ((), ())  # a call, ours and theirs, pair by pair
    ratios: list[float] = ()  # of time, pair by pair
    ratio: float | None = None  # their median
    others: list[float] = ()  # cores that others kept busy, pair by pair
    memory: tuple[int | None, int | None] = (None, None)  # peak in bytes
    memory_ratio: float | None = None
    difference: float | None = None  # of the outputs
    verdict: str = ""  # met or missed, or why that can't be said
    profiles: tuple[str, ...] = ()


def run(case, options: argparse.Namespace) -> Result:
    """Compare outputs, then time, then memory."""
    from .measure import Unavailable, compare, difference, peak_memory, profile

    result = Result(case.group, case.setting, case.goal)
    try:
        ours, theirs = case.ours(), case.theirs()
        if case.per[0] == case.per[1] and case.group != "import":  # they compute the same thing
            result.difference = difference(ours(), theirs())
            if case.tolerance is not None and not result.difference <= case.tolerance:
                result.verdict = f"not run: the outputs differ by {result.difference:.1e}"
                return result
        timing = compare(ours, theirs, options.pairs, case.per, options.device)
    except Unavailable as reason:
        result.verdict = f"not run: {reason}"
        return result
    result.seconds, result.others = (timing.ours, timing.theirs), timing.others
    result.ratios, result.ratio = timing.ratios, timing.ratio
    del ours, theirs  # the memory is needed
    if options.memory and case.measures_memory:
        result.memory = tuple(peak_memory(build, options.threads, options.device) for build in (case.ours, case.theirs))
        if all(result.memory):
            result.memory_ratio = result.memory[0] / result.memory[1]
    result.verdict = verdict(case, result, timing.quiet)
    if options.profile and "missed" in result.verdict:
        result.profiles = tuple(profile(build(), options.device) for build in (case.ours, case.theirs))
    return result


def verdict(case, result: Result, quiet: bool) -> str:
    """What became of the goals: of time, of memory, or of both.

    Ratios are rounded to two decimals before they are held against a goal, those below 0.1 to four.
    """
    found = []
    if case.max_time is not None:
        missed = round(result.ratio, 4 if case.max_time < 0.1 else 2) > case.max_time
        found.append("time: machine busy" if not quiet else "time missed" if missed else "time met")
    if case.max_memory is not None and result.memory_ratio is not None:
        found.append("memory missed" if round(result.memory_ratio, 2) > case.max_memory else "memory met")
    return ", ".join(found) or "-"


# -- what is printed ----------------------------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What the figures were measured on, and what was measured."""
    import diffusers
    import torch

    def git(*command: str) -> str:
        ran = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return ran.stdout.strip() if ran.returncode == 0 else ""

    cpu = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    changed = " with uncommitted changes" if git("status", "--porcelain") else ""
    found = {
        "cpu": f"{cpu}, {os.cpu_count()} cores, {options.threads} threads",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
    }
    if options.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


COLUMNS = (
    "what", "setting", "minisd", "diffusers", "ratio (spread)", "peak GB", "theirs", "ratio", "outputs differ by",
    "goal", "verdict",
)  # fmt: skip


def row(result: Result) -> tuple[str, ...]:
    ours, theirs = (duration(statistics.median(part)) if part else "" for part in result.seconds)
    digits = 4 if result.ratio and result.ratio < 0.1 else 2
    spread = ""
    if result.ratio:
        low, high = min(result.ratios), max(result.ratios)
        spread = f"{result.ratio:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
    memory = tuple(f"{bytes / 1e9:.2f}" if bytes else "" for bytes in result.memory)
    memory_ratio = f"{result.memory_ratio:.2f}" if result.memory_ratio else ""
    difference = "" if result.difference is None else f"{result.difference:.0e}"
    return (
        result.group, result.setting, ours, theirs, spread, *memory, memory_ratio, difference, result.goal,
        result.verdict,
    )  # fmt: skip


def duration(seconds: float) -> str:
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.3g} {unit}"


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> list[Result]:
    options = arguments(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here reaches for the network

    import torch

    from .cases import Options, cases
    from .measure import allowance, others_now

    torch.set_num_threads(options.threads)
    about = machine(options)
    print(*(f"{name}: {value}" for name, value in about.items()), sep="  \n")
    busy = others_now()
    if busy > allowance():
        print(f"\nOthers keep {busy:.1f} cores of this machine busy: pairs that they disturb are run again.")
    print("", line(COLUMNS), line(("---",) * len(COLUMNS)), sep="\n", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Options(options.device, options.small, Path(folder)), tuple(options.only)):
            results.append(run(case, options))
            print(line(row(results[-1])), flush=True)
    for result in results:
        for who, table in zip(("minisd", "diffusers"), result.profiles, strict=False):
            print(f"\n{result.group}, {result.setting}: {who}\n{table}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": about, "results": [asdict(result) for result in results]}
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
