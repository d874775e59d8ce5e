"""hf:ORG/NAME against a server on this machine that answers as the Hugging Face hub does."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ibau_jax import load
from tests.checkpoints.test_conversion import random_vgg
from tests.cli.commands import CONVERT, run

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LABELS = {str(number): f"kind {number}" for number in range(10)}


class Hub(BaseHTTPRequestHandler):
    """The listing of one repository and its files."""

    files: dict[str, bytes] = {}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/some/model/tree/"):
            sizes = {name: len(content) for name, content in self.files.items()}
            listing = [{"type": "file", "path": name, "size": size, "oid": ""} for name, size in sizes.items()]
            self.answer(json.dumps(listing).encode(), "application/json")
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in self.files]
            listing = {"id": "some/model", "sha": COMMIT, "siblings": siblings}
            self.answer(json.dumps(listing).encode(), "application/json")
        elif (name := path.rpartition("/")[2]) in self.files and path.startswith("/some/model/resolve/"):
            self.answer(self.files[name], "application/octet-stream")
        else:
            self.send_error(404)

    def answer(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file(random_vgg(10).state_dict(), tmp_path / "model.safetensors")
    Hub.files = {
        "model.safetensors": (tmp_path / "model.safetensors").read_bytes(),
        "config.json": json.dumps({"id2label": LABELS}).encode(),
        "README.md": b"read me",
        "setup.py": b"raise SystemExit('executed')",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def convert(name, hub, folder):
    import os

    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    return run(*CONVERT, name, "out", cwd=folder, env=environment)


def test_a_model_of_the_hub(hub, tmp_path):
    result = convert("hf:some/model", hub, tmp_path)
    assert result.returncode == 0, result.stderr
    checkpoint = load(tmp_path / "out")
    assert checkpoint.architecture.name == "small_vgg"
    assert checkpoint.hints.class_names == tuple(LABELS.values())
    assert not list((tmp_path / "cache").rglob("setup.py"))


def test_nothing_is_downloaded_for_an_out_that_can_not_be_written(hub, tmp_path):
    (tmp_path / "out").mkdir()
    result = convert("hf:some/model", hub, tmp_path)
    assert (result.returncode, "out is there already" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("hf:some/other", "can't download hf:some/other"), ("hf:model", "names no model of the hub; write hf:ORG/NAME")],
)
def test_what_is_not_there_is_one_line(hub, tmp_path, name, message):
    result = convert(name, hub, tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
