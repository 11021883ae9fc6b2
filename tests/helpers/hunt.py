"""An automatic hunt: thousands of damaged checkpoints, records and texts, each read by the command line as it is used.

    python tests/helpers/hunt.py --cases 20000 --seed 1
    python tests/helpers/hunt.py --only configs:17

Every case ends well or in one sentence, within 5 seconds of processor time and 500 MB, and touches nothing but DST.
Cases are drawn from a seed, and run in children of this process, fifty in each. What damage there is and who reads it:
``hunt_cases.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS, MEGABYTES = 5.0, 500.0
#: cases of a child; and what it may take in all (address space, not memory: what is only reserved counts)
BATCH, SPACE = 50, 4 << 30
#: words of an allocation that failed, and was told as something else
EXHAUSTED = ("allocate memory", "MemoryError", "bad_alloc", "Cannot allocate")


class TooLong(BaseException):
    """Not an Exception, so that nobody turns it into a sentence."""


def listing(folder: Path) -> dict[str, str]:
    """What is in a folder, links not followed: name -> kind and contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link {os.readlink(path)}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def peak_megabytes() -> float:
    """The most memory that this process had since :func:`forget_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


@contextmanager
def processor_seconds(limit: float) -> Iterator[None]:
    """Raise :class:`TooLong` after so many seconds of this process's own work."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, limit, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def complaints(case: Any, folder: Path) -> list[str]:
    """What is wrong with how one case ended; empty if nothing is."""
    from hunt_cases import DST, SECRET

    found: list[str] = []
    before = listing(folder)
    forget_peak()
    memory, begun = peak_megabytes(), time.process_time()
    try:
        with processor_seconds(2 * SECONDS):
            for command in case:
                found += command()
    except TooLong:
        found.append("took too long: " + "".join(traceback.format_exc(limit=-6)))
    seconds, grown = time.process_time() - begun, peak_megabytes() - memory
    if seconds > SECONDS:
        found.append(f"took {seconds:.1f} s")
    if grown > MEGABYTES:
        found.append(f"took {grown:.0f} MB")
    found += [f"ran out of memory: {one[-300:]}" for one in case.said if any(word in one for word in EXHAUSTED)]
    after = listing(folder)
    changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    if foreign := sorted(n for n in changed if n.split("/")[0] not in case.may_change | {DST}):
        found.append(f"touched {foreign}")
    if any(SECRET in p.read_bytes() for p in (folder / DST).rglob("*") if p.is_file()):
        found.append("copied what lies outside of the source")
    return found


def one(name: str, number: int, seed: int, seeds: Path) -> list[str]:
    """Run a case in a folder of its own."""
    from hunt_cases import KINDS, Case

    folder = Path(tempfile.mkdtemp(prefix="case-", dir=seeds.parent))
    try:
        case = Case(random.Random(f"{seed}/{name}/{number}"), seeds, folder)
        KINDS[name].prepare(case)
        return complaints(case, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def batch(name: str, numbers: range, seed: int, seeds: Path) -> dict[str, list[str]]:
    """Cases in a child that may not take much memory; what it was at when it died is found too."""
    report = seeds.parent / "report.jsonl"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            with open("/proc/self/statm") as file:
                here = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (here + SPACE, here + SPACE))
            with report.open("w") as file:
                for number in numbers:
                    print(json.dumps({"begun": number}), file=file, flush=True)
                    print(json.dumps({"case": number, "found": one(name, number, seed, seeds)}), file=file, flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 60 * SECONDS + 30 * len(numbers)
    status = None
    while status is None:
        pid, code = os.waitpid(child, os.WNOHANG)
        status = code if pid else None
        if status is None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    found = {f"{name}:{line['case']}": line["found"] for line in lines if line.get("found")}
    if status:
        found[f"{name}:{lines[-1].get('begun', '?') if lines else '?'}"] = [f"the process ended with status {status}"]
    return found


def hunt(cases: int, seed: int, only: str | None = None, told: bool = False) -> dict[str, list[str]]:
    """All complaints, by ``kind:number``; ``cases`` are shared out among the kinds by their weights."""
    from hunt_cases import KINDS, make_seeds

    root = Path(tempfile.mkdtemp(prefix="hunt-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        seeds = make_seeds(root / "seeds")
        if only:
            name, _, number = only.partition(":")
            return {only: one(name, int(number), seed, seeds)}
        found: dict[str, list[str]] = {}
        total = sum(kind.weight for kind in KINDS.values())
        for name, kind in KINDS.items():
            one(name, -1, seed, seeds)  # imports what the kind needs, once for all children
            begun, count = time.monotonic(), -(-cases * kind.weight // total)
            for first in range(0, count, BATCH):
                found |= batch(name, range(first, min(count, first + BATCH)), seed, seeds)
            if told:
                bad = sum(key.startswith(name) for key in found)
                print(f"{name}: {count} cases, {bad} bad, {time.monotonic() - begun:.0f} s", file=sys.stderr)
        return found
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND:NUMBER")
    given = parser.parse_args()
    found = hunt(given.cases, given.seed, given.only, told=True)
    for name, what in found.items():
        print(f"--- {name}", *what, sep="\n")
    sys.exit(bool(any(found.values())))


if __name__ == "__main__":
    main()
