"""Rules for Dockerfiles: what is built is the same tomorrow, holds no more than it needs, and does not run as root."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from k8s.check.model import Finding

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = re.compile(r"\b(g\+\+|gcc|build-essential|python3-dev|nvcc)\b|-devel-")
SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|_KEY\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continuation lines joined; `stage` counts from 0."""

    line: int
    word: str
    rest: str
    stage: int

    @property
    def plain(self) -> list[str]:
        """What it says but for its flags."""
        return [word for word in self.rest.split() if not word.startswith("--")]

    @property
    def commands(self) -> list[str]:
        """Of a RUN: the commands of its line."""
        return [part.strip() for part in re.split(r"&&|\|\||;|\n", self.rest)]


@dataclass(frozen=True)
class Dockerfile:
    path: Path
    context: Path
    """What COPY takes its files from."""
    instructions: tuple[Instruction, ...]

    def of(self, *words: str) -> list[Instruction]:
        return [one for one in self.instructions if one.word in words]

    @property
    def stages(self) -> list[str]:
        """Their names, "" for one without, in order."""
        return [one.plain[2] if len(one.plain) > 2 else "" for one in self.of("FROM")]

    @property
    def last(self) -> list[Instruction]:
        """Of the stage that becomes the image."""
        return [one for one in self.instructions if one.stage == len(self.stages) - 1]


def read(path: Path, context: Path = ROOT) -> Dockerfile:
    """A Dockerfile's instructions. Comments inside of one are dropped, as Docker drops them."""
    found: list[Instruction] = []
    begun, text, stage = 0, "", -1
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("#") or not (line.strip() or text):
            continue
        begun = begun if text else number
        text = f"{text} {line.strip()}".strip()
        if text.endswith("\\"):
            text = text[:-1].strip()
            continue
        word, _, rest = text.partition(" ")
        stage += word.upper() == "FROM"
        found.append(Instruction(begun, word.upper(), rest.strip(), stage))
        text = ""
    return Dockerfile(path, context, tuple(found))


Lines = Iterator[tuple[int, str]]


@dataclass(frozen=True)
class ImageRule:
    name: str
    remedy: str
    find: Callable[[Dockerfile], Lines]


IMAGE_RULES: list[ImageRule] = []


def image_rule(remedy: str) -> Callable[[Callable[[Dockerfile], Lines]], Callable[[Dockerfile], Lines]]:
    def register(find: Callable[[Dockerfile], Lines]) -> Callable[[Dockerfile], Lines]:
        IMAGE_RULES.append(ImageRule(find.__name__.replace("_", "-"), remedy, find))
        return find

    return register


@image_rule("name a version: FROM python:3.11.14-slim-bookworm")
def bases_have_a_tag(file: Dockerfile) -> Lines:
    for at, one in enumerate(file.of("FROM")):
        image = one.plain[0]
        if image in filter(None, file.stages[:at]):
            continue
        if not re.search(r":(?!latest$)[\w.-]+$", image) or "$" in image:
            yield one.line, f"{image} has no fixed tag"


@image_rule("name a stage that comes before, or the whole image with its tag")
def stages_exist(file: Dockerfile) -> Lines:
    for one in file.of("COPY"):
        for name in re.findall(r"--from=(\S+)", one.rest):
            if name not in filter(None, file.stages[: one.stage]):
                yield one.line, f"there is no stage {name} before"


@image_rule("end with USER and a number above 0, which a pod's runAsNonRoot can be held against")
def image_ends_as_a_user(file: Dockerfile) -> Lines:
    users = [one for one in file.last if one.word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1].rest):
        yield file.instructions[-1].line, f"it runs as {users[-1].rest if users else 'root'}"


@image_rule("apt-get install -y --no-install-recommends NAME=VERSION, and rm -rf /var/lib/apt/lists/* in the same RUN")
def system_packages_are_pinned(file: Dockerfile) -> Lines:
    for one in file.of("RUN"):
        installs = [command for command in one.commands if re.search(r"\bapt(-get)? install\b", command)]
        for command in installs:
            words = command.split("install", 1)[1].split()
            for name in (word for word in words if not word.startswith("-")):
                if not re.fullmatch(r"[\w.+-]+=\S+", name):
                    yield one.line, f"{name} has no version"
            if "--no-install-recommends" not in words or "-y" not in words:
                yield one.line, "it installs what is only recommended, or asks"
        if installs and not any(command == "rm -rf /var/lib/apt/lists/*" for command in one.commands):
            yield one.line, "the lists of packages stay in the image"


@image_rule("pip install -c constraints.txt, with PIP_NO_CACHE_DIR=1 in the stage or --no-cache-dir")
def python_packages_are_pinned(file: Dockerfile) -> Lines:
    for one in file.of("RUN"):
        for command in one.commands:
            if not re.search(r"\bpip3? install\b", command):
                continue
            if not re.search(r"(-c|--constraint)[ =]\S*constraints\.txt", command):
                yield one.line, "what pip installs is of any version"
            settings = " ".join(env.rest for env in file.of("ENV") if env.stage == one.stage)
            if "PIP_NO_CACHE_DIR=1" not in settings and "--no-cache-dir" not in command:
                yield one.line, "pip's cache stays in the image"


@image_rule("COPY files; what comes from elsewhere comes by a package manager that checks it")
def nothing_is_added_or_piped_to_a_shell(file: Dockerfile) -> Lines:
    for one in file.of("ADD"):
        yield one.line, "ADD takes archives apart and follows URLs"
    for one in file.of("RUN"):
        if re.search(r"\b(curl|wget)\b.*\|\s*(sudo\s+)?(\S*/)?(ba|da|z)?sh\b", one.rest):
            yield one.line, "what a server answers is run unseen"
        elif re.search(r"\b(curl|wget)\b", one.rest):
            yield one.line, "what a server answers is kept unseen"


@image_rule("copy what is in the repository, and let the .dockerignore beside the Dockerfile through")
def sources_exist(file: Dockerfile) -> Lines:
    ignore = file.path.with_name(f"{file.path.name}.dockerignore")
    let = set(re.findall(r"^!(\S+)$", ignore.read_text(), re.MULTILINE)) if ignore.is_file() else None
    for one in file.of("COPY"):
        if "--from=" in one.rest:
            continue
        for source in one.plain[:-1]:
            if not list(file.context.glob(source)):
                yield one.line, f"{source} is not in the repository"
            elif let is not None and source not in let:
                yield one.line, f"{source} is kept out by {ignore.name}"


@image_rule("compile in a stage of its own, and copy the result")
def compilers_stay_behind(file: Dockerfile) -> Lines:
    if len(file.stages) < 2:
        yield 1, "there is one stage"
    for one in file.last:
        found = COMPILERS.search(one.rest) if one.word in ("FROM", "RUN") else None
        if found:
            yield one.line, f"{found[0]} is in the image"


@image_rule('write ENTRYPOINT and CMD as JSON lists: ["tuneyard"]; a shell in between keeps signals from the program')
def entry_point_is_a_list(file: Dockerfile) -> Lines:
    points = [one for one in file.last if one.word in ("ENTRYPOINT", "CMD")]
    if "ENTRYPOINT" not in {one.word for one in points}:
        yield file.instructions[-1].line, "there is no entry point"
    for one in points:
        try:
            listed = json.loads(one.rest)
        except ValueError:
            listed = None
        if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
            yield one.line, f"{one.word} goes through a shell"


@image_rule("give it to a RUN by --mount=type=secret; ARG and ENV stay in the image's history")
def image_holds_no_secret(file: Dockerfile) -> Lines:
    for one in file.of("ARG", "ENV"):
        for name in re.findall(r"(?:^|\s)(\w+)(?==|\s|$)", one.rest):
            if SECRET.search(name.upper()):
                yield one.line, f"{name} looks like a secret"


def dockerfiles(root: Path = ROOT) -> list[Path]:
    return sorted((root / "k8s" / "image").glob("*Dockerfile"))


def check_image(path: Path, context: Path = ROOT) -> list[Finding]:
    """What a Dockerfile breaks of the rules."""
    file = read(path, context)
    return [
        Finding(str(path.relative_to(context)), f"line {line}", one.name, message, one.remedy)
        for one in IMAGE_RULES
        for line, message in one.find(file)
    ]
