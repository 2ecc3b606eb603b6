"""The data set: read correctly, downloaded once, and honest about what it is when there is no network.

Promise: processes that start together download MNIST only once.
"""

import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import socket
import struct
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import ROOT, finish, start
from torch.utils.data import DataLoader

from common import mnist
from common.loading import loader_options
from common.synthetic import synthetic_digits


@pytest.fixture(scope="session")
def files():
    """MNIST's four files, in exactly its format and sizes, but with synthetic digits in them."""
    made = {}
    for prefix, count in (("train", 60_000), ("t10k", 10_000)):
        images, labels = synthetic_digits(200, seed=count)
        images, labels = images.repeat(count // 200, 1, 1), labels.repeat(count // 200).to(torch.uint8)
        header = struct.pack(">IIII", 0x0803, count, 28, 28)
        made[f"{prefix}-images-idx3-ubyte"] = header + images.numpy().tobytes()
        made[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">II", 0x0801, count) + labels.numpy().tobytes()
    return made


@pytest.fixture
def data_dir(files, tmp_path):
    """A folder with these files in it."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return tmp_path


@pytest.fixture(scope="session")
def packed(files):
    return {f"{name}.gz": gzip.compress(content, 1) for name, content in files.items()}


@pytest.fixture
def mirror(packed):
    """An HTTP server with the packed files; `server.asked` counts the GET requests.

    It answers once `server.go` is set. With `server.down`, it refuses all requests.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            content = packed[self.path.lstrip("/")]
            self.server.go.wait(60)
            if self.server.down:
                self.send_error(503)
                return b""
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.server.asked[self.path] += 1
            with contextlib.suppress(ConnectionError):  # torchvision's redirect check hangs up early
                self.wfile.write(self.answer())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.down, server.go = Counter(), False, threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# A process that starts with an empty data folder. The local server stands in for torchvision's mirrors.
PROCESS = """
import json, socket, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import torchvision.datasets
from common import mnist

mirror, md5 = sys.argv[2], json.loads(sys.argv[3])
torchvision.datasets.MNIST.mirrors = [mirror]
torchvision.datasets.MNIST.resources = list(md5.items())
mnist.FALLBACK_SAMPLES = 600


class Lock(mnist.FileLock):
    def __enter__(self):
        print("asking", flush=True)
        return super().__enter__()


mnist.FileLock = Lock
print("begun", flush=True)
train, test = mnist.load_mnist(Path(sys.argv[1]))
left = socket.getdefaulttimeout()  # which is the whole process's
print(train.name, len(train), len(test), int(train.labels.sum()), train.fallback, left, sep="|")
"""


def at_once(count, folder, mirror, packed, until="asking"):
    """Start `count` processes together on `folder`; return the status, output and stderr of each.

    They continue together once all have printed `until`: "asking" means "about to take the lock".
    """
    url = f"http://127.0.0.1:{mirror.server_address[1]}/"
    md5 = json.dumps({name: hashlib.md5(content).hexdigest() for name, content in packed.items()})
    here = next(parent for parent in folder.parents if parent.exists())
    script = here / "process.py"
    script.write_text(PROCESS)
    words = [sys.executable, str(script), str(folder), url, md5, str(ROOT)]
    processes = [start(words, here) for _ in range(count)]
    for process in processes:
        process.wait_for(f"{until}\n")
    mirror.go.set()  # until now, the first one to ask had to wait, so that the others wait for it
    results = [finish(process) for process in processes]
    for status, out, err in results:
        print(status, out, err[-300:])
    return [
        (status, out.removeprefix("begun\n").removeprefix("asking\n"), err) for status, out, err in results
    ]


def test_three_processes_download_once(tmp_path, mirror, packed):
    data_dir = tmp_path / "not" / "there" / "yet"
    results = at_once(3, data_dir, mirror, packed)
    print(dict(mirror.asked))
    assert [status for status, _, _ in results] == [0, 0, 0]
    assert len({out for _, out, _ in results}) == 1
    assert results[0][1].startswith("mnist|60000|10000|") and results[0][1].endswith("||None\n")
    # Two requests a download: torchvision asks for redirects first.
    assert mirror.asked == {f"/{name}": 2 for name in packed}
    assert {path.name for path in (data_dir / "MNIST" / "raw").iterdir()} == {*mnist.FILES}
    assert {path.name for path in data_dir.iterdir()} == {"MNIST", ".mnist-download-lock"}


def test_a_failed_download_reaches_every_process_alike(tmp_path, mirror, packed):
    mirror.down = True
    results = at_once(3, tmp_path / "data", mirror, packed)
    assert len({(status, out) for status, out, _ in results}) == 1
    assert "synthetic-600|600|100|" in results[0][1]
    print(dict(mirror.asked))
    assert sum(mirror.asked.values()) == 1  # one of them asked, and the others used its answer
    for _, out, err in results:
        assert out.endswith("|None\n")
        warning = err.splitlines()[-1]
        assert warning.startswith("warning: MNIST could not be downloaded (HTTP Error 503")
        assert "HTTP Error 503" in out  # the data set keeps it, for the last line of the run
    # When the mirror is back, the next start ignores the old failure, and what a killed process has left.
    mirror.down = False
    half = tmp_path / "data" / ".mnist-partial" / "MNIST" / "raw"
    half.mkdir(parents=True, exist_ok=True)
    for name in mnist.FILES:
        (half / name).write_bytes(b"half")
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"old")  # only one of four files: all are fetched
    [(status, out, _)] = at_once(1, tmp_path / "data", mirror, packed)
    assert status == 0 and "mnist|60000" in out


def test_archives_that_are_there_are_used_without_a_network(tmp_path, mirror, packed):
    """They were downloaded by hand, or by torchvision. A damaged one is fetched again."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in packed.items():
        (raw / name).write_bytes(content)
    mirror.down = True
    [(status, out, err)] = at_once(1, tmp_path / "data", mirror, packed)
    assert status == 0 and out.startswith("mnist|60000|10000|") and not mirror.asked, err
    for name in mnist.FILES:
        (raw / name).unlink()
    damaged = max(packed)
    (raw / damaged).write_bytes(packed[damaged][:-1])
    mirror.down = False
    [(status, out, err)] = at_once(1, tmp_path / "data", mirror, packed)
    assert status == 0 and out.startswith("mnist|60000|10000|") and {*mirror.asked} == {f"/{damaged}"}, err


def test_a_mirror_that_says_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "setdefaulttimeout", functools.partial(in_a_hurry, socket.setdefaulttimeout))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        # If there is no time-out, this ends the wait.
        end = threading.Timer(20, silent.shutdown, [socket.SHUT_RDWR])
        end.start()
        try:
            assert "timed out" in mnist.fetch(tmp_path, tmp_path / "raw")
        finally:
            end.cancel()
    assert socket.getdefaulttimeout() is None


def in_a_hurry(set_timeout, seconds):
    set_timeout(seconds and seconds / 20)


def test_an_unusable_folder_gives_every_process_the_same_line(tmp_path, mirror, packed):
    (tmp_path / "data").write_text("a file")
    results = at_once(3, tmp_path / "data", mirror, packed, until="begun")  # they never reach the lock
    lines = {err for _, _, err in results}
    assert [status for status, _, _ in results] == [2, 2, 2]
    assert len(lines) == 1 and lines.pop().startswith("error: cannot download MNIST to ")


def test_offline_says_so_at_the_start_and_in_the_last_line(tmp_path):
    script = tmp_path / "offline.py"
    script.write_text(f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import torchvision.datasets
from common import mnist
torchvision.datasets.MNIST.mirrors = ["http://127.0.0.1:1/"]  # nobody listens there
mnist.FALLBACK_SAMPLES = 640
sys.argv = ["train.py", "--epochs=1", "--data-dir=data", "--snapshot-dir=snapshots"]
runpy.run_path({str(ROOT / "01_single_gpu" / "train.py")!r}, run_name="__main__")
""")
    status, out, err = finish(start([sys.executable, str(script)], tmp_path))
    print(out, err)
    assert status == 0
    assert "01_single_gpu: cnn on synthetic-640" in out
    first, last = err.splitlines()[0], err.splitlines()[-1]
    assert first == last and err.count(first) == 2
    assert first.startswith("warning: MNIST could not be downloaded (") and "Connection refused" in first


def test_a_whole_batch_is_what_single_images_make(data_dir):
    train, test = mnist.load_mnist(data_dir)
    assert train.images.dtype == torch.uint8 and train.images.shape == (60_000, 28, 28)
    assert train.labels.dtype == torch.int64 and train.labels.shape == (60_000,)
    assert test.images.shape == (10_000, 28, 28) and train.name == "mnist" and not train.fallback
    indices = [59_999, 0, 7, 7]
    loader = DataLoader(train, batch_size=4, sampler=indices, collate_fn=tuple)
    images, labels = next(iter(loader))
    assert torch.equal(images, torch.stack([train.images[i] for i in indices]))
    assert torch.equal(labels, torch.stack([train.labels[i] for i in indices]))


def test_it_reads_what_torchvision_reads(data_dir):
    from torchvision.datasets import MNIST

    for ours, theirs in zip(mnist.load_mnist(data_dir), (True, False), strict=True):
        reference = MNIST(data_dir, train=theirs)
        assert torch.equal(ours.images, reference.data) and torch.equal(ours.labels, reference.targets)


def test_it_reads_the_real_mnist(mnist_dir):
    train, test = mnist.load_mnist(mnist_dir)
    counts = train.labels.bincount().tolist()
    mean, std = (train.images / 255).mean().item(), (train.images / 255).std().item()
    print(f"labels {counts}, mean {mean:.4f}, standard deviation {std:.4f}")
    # The counts that the data set's authors publish, and the constants in common/models.py.
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (round(mean, 4), round(std, 4)) == (0.1307, 0.3081)
    assert len(test) == 10_000


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def wrong_header(path):
    path.write_bytes(b"\x89PNG" + path.read_bytes()[4:])


def wrong_label(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")


DAMAGE = [(name, harm) for name in mnist.FILES for harm in (cut, wrong_header)]
DAMAGE += [(name, wrong_label) for name in mnist.FILES if "labels" in name]


@pytest.mark.parametrize(("name", "harm"), DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_file_is_named(data_dir, capsys, name, harm):
    path = data_dir / "MNIST" / "raw" / name
    harm(path)
    with pytest.raises(SystemExit) as stopped:
        mnist.load_mnist(data_dir)
    err = capsys.readouterr().err
    print(err)
    assert stopped.value.code == 2
    assert err.startswith(f"error: {path} is damaged: ") and err.count("\n") == 1
    assert "delete" in err and path.exists()


def test_synthetic_sizes():
    train, test = mnist.load_mnist(Path("unused"), num_samples=1291)
    assert (len(train), len(test), train.name) == (1291, 215, "synthetic-1291")
    assert not torch.equal(train.images[:215], test.images)
    # Checksums of name, images and labels are the same on every machine.
    assert (train.checksum(), test.checksum()) == ("synthetic-1291 e5d5c6d7", "synthetic-1291 b827e130")
    changed = mnist.Digits(train.images, train.labels.roll(1), train.name)
    assert changed.checksum() != train.checksum()
    assert len(mnist.load_mnist(Path("unused"), num_samples=1)[1]) == 1
    assert mnist.FALLBACK_SAMPLES == len(
        range(8, mnist.FILES["train-labels-idx1-ubyte"])
    )  # the number of MNIST's images


def test_workers_stay_for_the_next_epoch():
    """Even a single worker. Without workers, nothing could stay, and torch would refuse the option."""
    device = torch.device("cpu")
    options = [loader_options(number, device) for number in (0, 1, 2)]
    assert [option["persistent_workers"] for option in options] == [False, True, True]
    assert [option["pin_memory"] for option in options] == [False] * 3


def test_files_that_are_there_ask_for_no_lock(data_dir):
    """A lock could not be created on a read-only disk."""
    (data_dir / ".mnist-download-lock").mkdir()
    assert mnist.load_mnist(data_dir)[0].name == "mnist"
