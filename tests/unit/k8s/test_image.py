"""The images' recipes keep their rules, each of which catches its violations. No image is built here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from k8s.check.image import IMAGE_RULES, ROOT, check_image, dockerfiles, read

CPU = ROOT / "k8s" / "image" / "cpu.Dockerfile"
BASE = "FROM python:3.11.14-slim-bookworm\n"
USER = "USER 1000:1000\n"
VIOLATIONS: tuple[tuple[str, str, str], ...] = (
    ("bases-have-a-tag", "FROM python:3.11.14-slim-bookworm AS build", "FROM python:latest AS build"),
    ("bases-have-a-tag", "FROM python:3.11.14-slim-bookworm AS build", "FROM python AS build"),
    ("bases-have-a-tag", "FROM python:3.11.14-slim-bookworm AS build", "ARG V=3\nFROM python:$V AS build"),
    ("stages-exist", "COPY --from=build", "COPY --from=builder"),
    ("image-ends-as-a-user", USER, ""),
    ("image-ends-as-a-user", USER, f"{USER}USER root\n"),
    ("image-ends-as-a-user", USER, "USER tuneyard\n"),
    ("image-ends-as-a-user", USER, "USER 0:0\n"),
    ("system-packages-are-pinned", "g++=4:12.2.*", "g++"),
    ("system-packages-are-pinned", "--no-install-recommends ", ""),
    ("system-packages-are-pinned", " \\\n    && rm -rf /var/lib/apt/lists/*", ""),
    ("python-packages-are-pinned", "pip install -c constraints.txt --no-build-isolation '", "pip install '"),
    ("python-packages-are-pinned", "PIP_NO_CACHE_DIR=1 ", ""),
    ("nothing-is-added-or-piped-to-a-shell", "COPY launch ./launch", "ADD launch ./launch"),
    ("nothing-is-added-or-piped-to-a-shell", USER, f"RUN curl -fsSL https://example.com/x | sh\n{USER}"),
    ("nothing-is-added-or-piped-to-a-shell", USER, f"RUN wget https://example.com/x.tar\n{USER}"),
    ("sources-exist", "COPY launch ./launch", "COPY lunch ./launch"),
    ("sources-exist", "COPY launch ./launch", "COPY tests ./tests"),
    ("compilers-stay-behind", USER, f"RUN apt-get install -y --no-install-recommends gcc=1\n{USER}"),
    ("entry-point-is-a-list", 'ENTRYPOINT ["tuneyard"]', "ENTRYPOINT tuneyard"),
    ("entry-point-is-a-list", 'ENTRYPOINT ["tuneyard"]\n', ""),
    ("image-holds-no-secret", USER, f"ARG HUB_TOKEN\n{USER}"),
    ("image-holds-no-secret", USER, f"ENV AWS_SECRET_ACCESS_KEY=x\n{USER}"),
)  # fmt: skip


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [path.name for path in dockerfiles()] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.stem)
def test_it_keeps_the_rules(path: Path) -> None:
    assert list(map(str, check_image(path))) == []


@pytest.mark.parametrize(
    ("name", "before", "after"), VIOLATIONS, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(VIOLATIONS)]
)
def test_rule_catches_its_violation(tmp_path: Path, name: str, before: str, after: str) -> None:
    for source in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / source).touch()
    for folder in ("launch", "orchestrator", "tests"):
        (tmp_path / folder).mkdir()
    text = CPU.read_text()
    assert text.count(before) == 1
    path = tmp_path / CPU.name
    path.write_text(text.replace(before, after))
    shutil.copy(CPU.with_name(f"{CPU.name}.dockerignore"), tmp_path)
    assert name in {finding.rule for finding in check_image(path, tmp_path)}


def test_every_rule_has_a_violation() -> None:
    assert {name for name, _, _ in VIOLATIONS} == {rule.name for rule in IMAGE_RULES}


def test_one_stage_is_not_enough(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(f'{BASE}{USER}ENTRYPOINT ["tuneyard"]\n')
    assert {finding.rule for finding in check_image(path, tmp_path)} == {"compilers-stay-behind"}


def test_continuation_lines_are_one_instruction(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(f"# syntax=docker/dockerfile:1\n{BASE}RUN one \\\n    # why\n    && two\n\nUSER 1\n")
    found = [(one.line, one.word, one.rest) for one in read(path, tmp_path).instructions]
    assert found == [(2, "FROM", BASE.split()[1]), (3, "RUN", "one && two"), (7, "USER", "1")]
