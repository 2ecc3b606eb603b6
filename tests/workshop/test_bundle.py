"""What `bundle.py prepare` collects is enough, without a network, for a green doctor and an exercise."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, errors, finish, start
from hosts import WHY, possible
from test_doctor import heard, make_digits, shell

from workshop import bundle

pytestmark = pytest.mark.long
BUNDLE = ROOT / "workshop" / "bundle.py"
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def digits(tmp_path):
    """A folder with empty files in MNIST's place."""
    yield make_digits(tmp_path)
    shutil.rmtree(tmp_path)  # or pytest would keep the copies, which take room


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["prepare"], "the following arguments are required: DIR"),
        (["install", "--platform=linux-x86_64"], "unrecognized arguments: --platform=linux-x86_64"),
        (["prepare", "a", "--json"], "unrecognized arguments: --json"),
        (["prepare", "a", "--to=b"], "unrecognized arguments: --to=b"),
        (["prepare", "a", "--python=3"], "--python takes a version such as"),
        (["prepare", "a", "--platform=amiga-68k"], "torch has no wheels for amiga-68k"),
        (["prepare", "a", "--requirements=gone.txt"], "gone.txt does not exist"),
        (["install"], "has no complete bundle"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, words, says):
    status, out, err = finish(start([sys.executable, str(BUNDLE), *words], tmp_path))
    print(err)
    assert (status, out) == (2, "")
    assert len(errors(err)) == len(err.splitlines()) == 1 and says in err
    assert list(tmp_path.iterdir()) == []


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> None:
    """Make a wheel of one module, which has its version."""
    module = name.replace("-", "_")
    about, files = f"{module}-{version}.dist-info", {f"{module}.py": f"version = '{version}'\n"}
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    files[f"{about}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-{tag}.whl", "w") as file:
        for path, content in files.items():
            file.writestr(path, content)


TINY = "tiny>=1\n# and of this, whatever there is:\ntorch\n"


@pytest.fixture
def indexes(tmp_path):
    """The address of two small indexes of packages, for `pip`'s own configuration and for CPU-only wheels."""
    own, cpu = tmp_path / "indexes" / "own", tmp_path / "indexes" / "cpu"
    linux, mac = "manylinux_2_28_x86_64", "macosx_11_0_arm64"
    wheel(own / "tiny", "tiny", "1.0", 'for-windows; platform_system == "Windows"', "for-all")
    wheel(own / "for-all", "for-all", "1.0", 'for-linux; sys_platform == "linux"')
    for name in ("for-windows", "for-linux"):
        wheel(own / name, name, "1.0")
    for tag in (linux, mac, "win_amd64"):
        wheel(own / "torch", "torch", "9.0", tag=f"py3-none-{tag}")
    wheel(cpu / "torch", "torch", "9.0+cpu", tag=f"py3-none-{linux}")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "indexes"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def teacher(tmp_path):
    """A copy of this repository, with one commit."""
    names = [".git", ".venv", "data", "checkpoints", "mine", "__pycache__", ".*_cache", ".mutants"]
    shutil.copytree(ROOT, tmp_path / "teacher", ignore=shutil.ignore_patterns(*names, "docs", "results"))
    git = ["git", "-C", tmp_path / "teacher", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=All"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path / "teacher"


def prepare(teacher: Path, folder: Path, index: str, *flags: str) -> tuple[int, str, str]:
    """Let the teacher collect in `folder`, from the small indexes."""
    (teacher.parent / "tiny.txt").write_text(TINY)
    (teacher.parent / "all.txt").write_text("-r tiny.txt  # and no more\n")
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{index}/own", "PIP_NO_CACHE_DIR": "1"}
    pip |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": ""}
    words = [sys.executable, "workshop/bundle.py", "prepare", str(folder), *flags]
    process = start([*words, f"--requirements={teacher.parent / 'all.txt'}"], teacher, real=True, **pip)
    status, out, err = finish(process)
    print(f"status {status}\n{out}{err}")
    return status, out, err


def test_what_a_platform_needs_is_collected_and_no_more(tmp_path, teacher, digits, indexes):
    """A requirement for Windows only is for a laptop with Windows, wherever it is collected."""
    here, others = tmp_path / "here", tmp_path / "others"
    linux = "torch-9.0-py3-none-manylinux_2_28_x86_64.whl"
    elsewhere = ["torch-9.0-py3-none-macosx_11_0_arm64.whl", "torch-9.0-py3-none-win_amd64.whl"]
    for folder, platforms, extra, wheels in (
        (here, ["linux-x86_64"], "for_linux", [linux]),
        (others, ["windows-amd64", "macos-arm64"], "for_windows", elsewhere),
    ):
        flags = [f"--data-dir={digits}", *(f"--platform={name}" for name in platforms)]
        status, out, _ = prepare(teacher, folder, indexes, *flags)
        assert status == 0
        found = sorted(path.name for path in (folder / "bundle" / "wheels").iterdir())
        assert {name.split("-")[0] for name in found} == {"tiny", "for_all", "torch", extra}
        assert [name for name in found if name.startswith("torch")] == wheels
        assert out.count("torch 9.0 (") == len(wheels)
        assert out.endswith("python3 bundle/bundle.py install\n")
    assert bundle.damage(others / "data" / "MNIST" / "raw") == {}
    assert (others / "bundle" / "requirements.txt").read_text() == "tiny>=1\ntorch\n"
    assert json.loads((others / "bundle" / "bundle.json").read_text())["platforms"] == platforms
    with tarfile.open(others / "bundle" / "repository.tar") as tar:
        packed = tar.getnames()
    assert {"README.md", "workshop/bundle.py", "05_fsdp/train.py"} <= {*packed} and ".git" not in packed


@pytest.mark.parametrize(("path", "build"), [("cpu", "9.0+cpu"), ("gone", "9.0")])
def test_cpu_only_wheels_where_they_exist(tmp_path, teacher, digits, indexes, path, build):
    """And where their index does not answer, the other wheels, with a message."""
    flags = [f"--data-dir={digits}", f"--index-url={indexes}/{path}", "--platform=linux-x86_64"]
    status, out, _ = prepare(teacher, tmp_path / "stick", indexes, *flags)
    assert status == 0
    assert f"torch {build} (" in out
    assert ("does not answer (File not found), so pip uses only its own configuration" in out) == (
        path == "gone"
    )


def test_what_was_not_committed_is_counted(tmp_path, teacher, monkeypatch):
    """It is not packed: a solution that lies around would be."""
    monkeypatch.setattr(bundle, "ROOT", teacher)
    (teacher / "new.txt").write_text("new")
    said = bundle.pack_repository(tmp_path / "packed.tar", tmp_path)
    assert said == "its newest commit; changes not in it, because they are not committed: 1"
    with tarfile.open(tmp_path / "packed.tar") as tar:
        assert "new.txt" not in tar.getnames() and "README.md" in tar.getnames()


def test_without_git_the_folder_is_packed(teacher, monkeypatch):
    """Into itself, if need be; and without what is no part of it."""
    monkeypatch.setattr(bundle, "ROOT", teacher)
    shutil.rmtree(teacher / ".git")
    for name in ("checkpoints", ".venv", "common/__pycache__", "stick/bundle"):
        (teacher / name).mkdir(parents=True)
        (teacher / name / "file").touch()
    file = teacher / "stick" / "bundle" / "repository.tar"
    assert bundle.pack_repository(file, teacher / "stick") == "this folder, because there is no git"
    with tarfile.open(file) as tar:
        packed = {*tar.getnames()}
    assert "workshop/doctor.py" in packed and ".gitignore" in packed
    assert not [name for name in packed if re.search(r"stick|checkpoints|\.venv|__pycache__", name)]


def test_without_git_a_bundle_in_the_repository_itself_is_not_packed(teacher, monkeypatch):
    monkeypatch.setattr(bundle, "ROOT", teacher)
    shutil.rmtree(teacher / ".git")
    (teacher / "bundle" / "wheels").mkdir(parents=True)
    file = teacher / "bundle" / "repository.tar"
    bundle.pack_repository(file, teacher)
    with tarfile.open(file) as tar:
        names = tar.getnames()
    assert "workshop/doctor.py" in names and "bundle" not in names


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    words = [sys.executable, str(BUNDLE), "prepare", str(tmp_path / "file")]
    status, _, err = finish(start(words, tmp_path))
    assert status == 1 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "Not a directory" in err and "choose another folder" in err


def test_wheels_of_an_earlier_bundle_are_gone(tmp_path, teacher, digits, indexes):
    folder = tmp_path / "stick"
    old = folder / "bundle" / "wheels" / "torch-99.0-py3-none-any.whl"
    old.parent.mkdir(parents=True)
    old.touch()
    assert prepare(teacher, folder, indexes, f"--data-dir={digits}")[0] == 0
    assert not old.exists() and list(old.parent.glob("torch-9.0*"))


def test_what_cannot_be_collected_leaves_no_bundle(tmp_path, teacher, digits, indexes):
    folder = tmp_path / "stick"
    assert prepare(teacher, folder, indexes, f"--data-dir={digits}")[0] == 0
    status, _, err = prepare(teacher, folder, indexes, f"--data-dir={digits}", "--platform=linux-aarch64")
    assert status == 1
    assert errors(err)[0].startswith("error: pip did not find all wheels for linux-aarch64 and Python ")
    words = [sys.executable, str(folder / "bundle" / "bundle.py"), "install"]
    status, _, err = finish(start(words, tmp_path))
    assert status == 2 and "has no complete bundle" in err


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("python", "3.99", f"the wheels are for Python 3.99, but this is Python {OWN}: use python3.99"),
        ("platforms", ["amiga-68k"], "the wheels are for amiga-68k, but this is "),
    ],
)
def test_a_bundle_for_another_machine_is_refused(tmp_path, key, value, says):
    about = {
        "python": OWN,
        "platforms": [bundle.this_platform()],
        "requirements": "requirements.txt",
        key: value,
    }
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(about))
    for name in ("bundle.py", "doctor.py"):
        shutil.copy(ROOT / "workshop" / name, tmp_path / "bundle")
    words = [sys.executable, str(tmp_path / "bundle" / "bundle.py"), "install"]
    status, _, err = finish(start(words, tmp_path))
    print(err)
    assert status == 2 and err.startswith(f"error: {says}")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_laptop_is_set_up_from_a_copy(tmp_path, teacher, digits, indexes):
    """Twice: the second time, what the learner has changed stays."""
    stick, laptop = tmp_path / "stick", tmp_path / "a laptop"
    assert prepare(teacher, stick, indexes, f"--data-dir={digits}")[0] == 0
    words = [sys.executable, str(stick / "bundle" / "bundle.py"), "install", f"--to={laptop}"]
    status, out, err = finish(start(words, tmp_path, real=True, PIP_INDEX_URL="http://127.0.0.1:1"))
    print(out, err)
    assert status == 0
    assert out.endswith(f"    cd '{laptop}' && .venv/bin/python workshop/doctor.py\n")
    said = "import tiny, for_all, torch; print(tiny.version, torch.version)"
    python = [str(laptop / ".venv" / "bin" / "python"), "-c", said]
    assert subprocess.run(python, capture_output=True, text=True, check=True).stdout == "1.0 9.0\n"
    assert bundle.damage(laptop / "data" / "MNIST" / "raw") == {}
    for name in ("README.md", ".gitignore", "05_fsdp/train.py", "launch_multinode.sh"):
        assert (laptop / name).read_bytes() == (teacher / name).read_bytes()
    assert os.access(laptop / "launch_multinode.sh", os.X_OK)
    # With another file than requirements.txt, make still has something to install.
    assert not (laptop / ".venv" / "installed").exists()
    (laptop / "README.md").write_text("mine")
    (laptop / "LICENSE").unlink()
    status, out, err = finish(start(words, tmp_path, real=True))
    print(out, err)
    assert status == 0 and "which already had: .ci, " in out
    assert (laptop / "README.md").read_text() == "mine" and (laptop / "LICENSE").exists()
    assert not [path.name for path in laptop.iterdir() if path.name.startswith(".unpacking")]


def test_make_has_nothing_left_to_install(tmp_path, monkeypatch):
    """Its own installation needs a network. Both stand in front of what `make` compares."""
    monkeypatch.setattr(bundle, "install_wheels", lambda bundle, to: (to / ".venv").mkdir())
    (tmp_path / "bundle").mkdir()
    shutil.copytree(ROOT / "common", tmp_path / "packed" / "common")
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path / "packed")
    with tarfile.open(tmp_path / "bundle" / "repository.tar", "w") as tar:
        tar.add(tmp_path / "packed", ".")
    for name, targets in (("requirements.txt", ["train"]), ("requirements-dev.txt", ["train", "test"])):
        about = {"python": OWN, "platforms": [bundle.this_platform()], "requirements": name}
        (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(about))
        monkeypatch.setattr(bundle, "damage", lambda raw: {})
        bundle.install(tmp_path, tmp_path / name[:-4])
        for target in targets:
            words = ["make", "--dry-run", "--no-print-directory", target]
            said = subprocess.run(words, cwd=tmp_path / name[:-4], capture_output=True, text=True, check=True)
            print(said.stdout)
            assert "pip" not in said.stdout and said.stdout.count("\n") == 1


# In this network, nothing outside of this machine can be reached.
NO_WAY_OUT = """
ip link set lo up
test -z "$(ip route show)"
! timeout 5 bash -c 'true >/dev/tcp/192.0.2.1/80' 2>refused
grep -q unreachable refused
"""
EXERCISE = "workshop/check.py 01 workshop/exercises/01_all_reduce/solution.py"


@pytest.mark.root
@pytest.mark.skipif(not possible(), reason=WHY)
def test_a_room_without_a_network_is_enough(tmp_path, teacher, digits, indexes, request):
    """The doctor is green there, and an exercise passes.

    The wheels are tiny here, and torch is the tests' own. `BUNDLE=<a folder of prepare>` takes that one.
    """
    own, stick = {}, Path(os.environ.get("BUNDLE", tmp_path / "stick")).resolve()
    if "BUNDLE" not in os.environ:
        assert prepare(teacher, stick, indexes, f"--data-dir={digits}")[0] == 0
        own["PYTHONPATH"] = sysconfig.get_path("purelib")
    script = f"{NO_WAY_OUT}\n{sys.executable} {stick}/bundle/bundle.py install --to {tmp_path}/laptop"
    status, out, err = finish(shell(script, tmp_path, "--net"), 900)
    print(out, err)
    assert status == 0
    next_command = out.splitlines()[-1].strip()
    _, found = heard(shell(f"{NO_WAY_OUT}\n{next_command} --json || exit $?", tmp_path, "--net", **own))
    assert all(each["status"] == "green" for each in found.values()), found
    if (tmp_path / "laptop" / "workshop" / "check.py").exists():
        script = f"{NO_WAY_OUT}\ncd laptop; .venv/bin/python {EXERCISE} || exit $?"
        status, out, err = finish(shell(script, tmp_path, "--net", **own))
        print(out, err)
        assert status == 0 and "passed in " in out
