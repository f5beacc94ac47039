"""Weights from the Hugging Face hub and to it, against a local server that answers as the hub does."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from leanvae import LeanVAE, LeanVAEConfig, load_vae
from litevae import LiteVAE, LiteVAEConfig
from litevae.card import read_card
from litevae.errors import InvalidInput, MissingFile, MissingPackage

PUBLISHED = Path(__file__).parent / "golden" / "official_small.ckpt"
SMALL = {"low_channels": 8, "high_channels": 16, "num_stream_layers": 1, "num_fusion_layers": 1, "ista_layers": 1}
LITE = {"extraction_channels": 4, "aggregation_channels": 4, "decoder_channels": 8, "num_res_blocks": 1}
TOKEN = "hf_token_of_the_tests"
LARGE = (".safetensors", ".ckpt")  # files that the hub keeps outside of git

# The library's own, where it uploads large files without its other protocol.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """Repositories in memory, behind the routes of the hub that its library calls.

    Attributes:
        repos: by name, files by path of each commit, oldest first.
        refs: by repository and branch or tag, the number of a commit.
        access: `private` or `gated` by repository; others are public.
        requests: method and path of all that was asked.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/large"  # as another host, which must get no token
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.refs: dict[tuple[str, str], int] = {}
        self.access: dict[str, str] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits: list[list[dict[str, Any]]] = []

    def add(self, repo: str, files: dict[str, bytes] | Path, tag: str | None = None) -> None:
        """Commits files, or those of a folder, to a repository's main branch."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        self.repos.setdefault(repo, []).append(files)
        for ref in filter(None, ("main", tag)):
            self.refs[repo, ref] = len(self.repos[repo]) - 1

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A revision's commit and files; None if there is no such revision."""
        hashes = [hashlib.sha1(f"{repo} {number}".encode()).hexdigest() for number in range(len(self.repos[repo]))]
        number = hashes.index(revision) if revision in hashes else self.refs.get((repo, revision))
        return None if number is None else (hashes[number], self.repos[repo][number])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, content: object = None, error: str = "", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers |= {"X_Error_Code": error, "X_Error_Message": error} if error else {}
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if match := re.fullmatch(r"/large/(\w+)", self.path):
            assert "Authorization" not in self.headers
            return self.answer(200, self.server.large[match[1]])
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(tree|revision)/([^?]+).*", self.path):
            if (found := self.find(match[1], match[3])) is not None:
                commit, files = found
                tree = [{"type": "file", "path": p, "oid": "0" * 40, "size": len(d)} for p, d in files.items()]
                siblings = [{"rfilename": path} for path in files]
                info = {"id": match[1], "sha": commit, "siblings": siblings}
                self.answer(200, tree if match[2] == "tree" else info)
            return None
        return self.answer(404, {})

    do_HEAD = do_GET

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A revision's commit and files, or None after an answer that says why not."""
        access = self.server.access.get(repo)
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.server.repos or (access == "private" and not is_known):
            self.answer(404 if is_known else 401, {}, "RepoNotFound")
        elif access == "gated" and not is_known:
            self.answer(403, {}, "GatedRepo")
        elif (found := self.server.files(repo, revision)) is None:
            self.answer(404, {}, "RevisionNotFound")
        else:
            return found
        return None

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        commit, files = found
        if path not in files:
            return self.answer(404, {}, "EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha256(files[path]).hexdigest()
        if path.endswith(LARGE):
            self.server.large[etag] = files[path]
            linked = {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(files[path]))}
            return self.answer(
                302, b"", X_Repo_Commit=commit, ETag='"link"', Location=f"{self.server.storage}/{etag}", **linked
            )
        return self.answer(200, files[path], X_Repo_Commit=commit, ETag=f'"{etag}"')

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_PUT(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.large[self.path.removeprefix("/large/")] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        data, url = self.body(), self.server.url
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {}, "Invalid credentials in Authorization header")
        if self.path == "/api/repos/create":
            fields = json.loads(data)
            repo = f"{fields.get('organization') or 'me'}/{fields['name']}"
            if repo in self.server.repos:
                return self.answer(409, {"url": f"{url}/{repo}"})
            self.server.add(repo, {})
            self.server.access[repo] = fields.get("visibility", "public")
            return self.answer(200, {"url": f"{url}/{repo}"})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/(\w+)", self.path):
            if self.find(*match.groups()) is None:
                return None
            files = [file["path"] for file in json.loads(data)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
            return self.answer(
                200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.server.storage}/{entry['oid']}"}}
            return self.answer(200, {"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/(\w+)", self.path)
        assert match, self.path
        return self.commit(match[1], [json.loads(line) for line in data.splitlines()])

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        self.server.commits.append(lines)
        files = dict(self.server.repos[repo][-1])
        for line in lines[1:]:
            value = line["value"]
            content = base64.b64decode(value["content"]) if line["key"] == "file" else self.server.large[value["oid"]]
            files[value["path"]] = content
        self.server.add(repo, files)
        oid = self.server.files(repo, "main")[0]
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub that the library takes for its own, with an empty cache."""
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def model(seed: int = 0) -> LeanVAE:
    torch.manual_seed(seed)
    return LeanVAE(LeanVAEConfig(**SMALL)).eval()


def folder_of(vae: LeanVAE | LiteVAE, folder: Path) -> Path:
    vae.save_pretrained(folder)
    return folder


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_repository_loads_and_nothing_but_its_two_files_is_fetched(hub: Hub, tmp_path: Path) -> None:
    vae = model()
    files = {path.name: path.read_bytes() for path in folder_of(vae, tmp_path / "model").iterdir()}
    hub.add("someone/lean", {**files, "samples.bin": b"0" * 100})
    loaded = load_vae("someone/lean")
    assert_equal(loaded, vae)
    assert loaded.config == vae.config
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"config.json", "model.safetensors"}


def test_image_models_and_those_of_diffusers_load_from_a_repository(hub: Hub, tmp_path: Path) -> None:
    lite = LiteVAE(LiteVAEConfig(latent_channels=12, **LITE)).eval()
    hub.add("someone/lite", folder_of(lite, tmp_path / "lite"))
    assert_equal(load_vae("someone/lite"), lite)

    from litevae.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=(32,) * 4, layers_per_block=1, **kinds).save_pretrained(tmp_path / "sd")
    hub.add("someone/sd-vae", tmp_path / "sd")
    assert_equal(load_vae("someone/sd-vae"), load_vae(tmp_path / "sd"))


@pytest.mark.parametrize("name", ["LeanVAE-dim4.ckpt", "LeanVAE-dim16.ckpt"])
def test_published_files_load_by_their_names(hub: Hub, name: str) -> None:
    files = {file: PUBLISHED.read_bytes() for file in ("LeanVAE-dim4.ckpt", "LeanVAE-dim16.ckpt")}
    hub.add("Yumic/LeanVAE", files)
    assert_equal(load_vae(f"Yumic/LeanVAE/{name}"), load_vae(PUBLISHED))


def test_repository_of_checkpoint_files_alone_says_which_it_has(hub: Hub) -> None:
    hub.add("Yumic/LeanVAE", {"LeanVAE-dim4.ckpt": b"", "LeanVAE-dim16.ckpt": b"", "README.md": b""}, tag="v1")
    names = "it has Yumic/LeanVAE/LeanVAE-dim16.ckpt@v1, Yumic/LeanVAE/LeanVAE-dim4.ckpt@v1"
    with pytest.raises(MissingFile, match=rf"Yumic/LeanVAE@v1 has no config.json on http.*; {names}$"):
        load_vae("Yumic/LeanVAE@v1")


def test_files_from_the_hub_are_read_weights_only(hub: Hub, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("ran",))

    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    hub.add("someone/evil", {"evil.ckpt": (tmp_path / "evil.ckpt").read_bytes()})
    with pytest.raises(InvalidInput, match=r"evil\.ckpt: cannot be read as a checkpoint of plain tensors"):
        load_vae("someone/evil/evil.ckpt")


def test_revision_may_be_a_tag_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    old, new = model(1), model(2)
    hub.add("someone/lean", folder_of(old, tmp_path / "old"), tag="v1")
    hub.add("someone/lean", folder_of(new, tmp_path / "new"))
    commit, _ = hub.files("someone/lean", "v1") or ("", {})
    assert_equal(load_vae("someone/lean"), new)
    assert_equal(load_vae("someone/lean@v1"), old)
    assert_equal(load_vae(f"someone/lean@{commit}"), old)


def test_both_files_are_of_one_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are pushed between the two downloads do not go with the old configuration."""
    old = model(1)
    hub.add("someone/lean", folder_of(old, tmp_path / "old"))
    other = LeanVAE(LeanVAEConfig(**{**SMALL, "high_channels": 8}))
    files = {path.name: path.read_bytes() for path in folder_of(other, tmp_path / "new").iterdir()}
    resolve = _Handler.resolve

    def resolve_and_push(handler: _Handler, repo: str, revision: str, path: str) -> None:
        resolve(handler, repo, revision, path)
        if len(hub.repos[repo]) == 1 and handler.command == "GET":
            hub.add(repo, files)

    monkeypatch.setattr(_Handler, "resolve", resolve_and_push)
    assert_equal(load_vae("someone/lean"), old)


def test_cached_weights_load_while_the_hub_is_gone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = model()
    hub.add("someone/lean", folder_of(vae, tmp_path / "model"))
    hub.add("Yumic/LeanVAE", {"LeanVAE-dim4.ckpt": PUBLISHED.read_bytes()})
    load_vae("someone/lean")
    load_vae("Yumic/LeanVAE/LeanVAE-dim4.ckpt")
    hub.requests.clear()
    load_vae("someone/lean")
    assert not [request for request in hub.requests if request.startswith("GET")]  # asked whether it is new, no more
    hub.shutdown()
    hub.server_close()
    assert_equal(load_vae("someone/lean"), vae)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_equal(load_vae("someone/lean"), vae)
    assert_equal(load_vae("Yumic/LeanVAE/LeanVAE-dim4.ckpt"), load_vae(PUBLISHED))


def test_offline_errors_name_what_to_fetch(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = (
        r"^no checkpoint at Yumic/LeanVAE@v1: .* LeanVAE-dim4\.ckpt of that repository is not in the cache, .*, and "
        r"HF_HUB_OFFLINE is set: fetch it on a machine that is connected, with "
        r"`hf download Yumic/LeanVAE LeanVAE-dim4\.ckpt --revision v1`, and give its path"
    )
    with pytest.raises(MissingFile, match=message):
        load_vae("Yumic/LeanVAE/LeanVAE-dim4.ckpt@v1")
    with pytest.raises(InvalidInput, match=r"me/lean: HF_HUB_OFFLINE is set, and this needs http.*: unset it"):
        model().push_to_hub("me/lean")


def test_unreachable_hub_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    hub.shutdown()
    hub.server_close()
    message = rf"someone/lean: .* config\.json of .* {hub.url} cannot be reached \(.*refused\): fetch"
    with pytest.raises(MissingFile, match=message):
        load_vae("someone/lean")
    with pytest.raises(InvalidInput, match=rf"me/lean: {hub.url} cannot be reached"):
        model().push_to_hub("me/lean", token=TOKEN)


def test_missing_repository_revision_and_file_are_named(hub: Hub) -> None:
    hub.add("someone/lean", {"config.json": b'{"model": "LeanVAE"}', "other.ckpt": b""})
    with pytest.raises(MissingFile, match=r"^no checkpoint at someone/laen: .*no such repository.*`hf auth login`"):
        load_vae("someone/laen")
    with pytest.raises(MissingFile, match=r"^someone/lean has no revision v9 on http"):
        load_vae("someone/lean@v9")
    message = r"^someone/lean has no wrong\.ckpt on http.*; it has someone/lean/other\.ckpt$"
    with pytest.raises(MissingFile, match=message):
        load_vae("someone/lean/wrong.ckpt")
    with pytest.raises(MissingFile, match=r"has no model\.safetensors"):
        load_vae("someone/lean")
    with pytest.raises(InvalidInput, match=r"^a--b/lean: not a name of a repository"):
        load_vae("a--b/lean")


def test_refused_access_says_how_to_get_in(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = model()
    for name in ("private", "gated"):
        hub.add(f"someone/{name}", folder_of(vae, tmp_path / "model"))
        hub.access[f"someone/{name}"] = name
    with pytest.raises(MissingFile, match=r"keeps it private: check the name, or log in with `hf auth login`"):
        load_vae("someone/private")
    with pytest.raises(InvalidInput, match=r"ask at http.*/someone/gated, then log in with `hf auth login`"):
        load_vae("someone/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_equal(load_vae("someone/private"), vae)
    assert_equal(load_vae("someone/gated"), vae)


def test_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match=r"huggingface_hub is not installed: pip install 'leanvae\[hub\]'"):
        load_vae("someone/lean")


@pytest.mark.parametrize("kind", ["LeanVAE", "LiteVAE"])
def test_pushed_model_loads_by_its_name(hub: Hub, kind: str) -> None:
    vae = model() if kind == "LeanVAE" else LiteVAE(LiteVAEConfig(**LITE)).eval()
    address = vae.push_to_hub("me/lean", private=True, token=TOKEN, commit_message="First weights")
    oid, files = hub.files("me/lean", "main") or ("", {})
    assert address == f"{hub.url}/me/lean/commit/{oid}"
    posts = [request.partition("?")[0] for request in hub.requests if request.startswith(("POST", "PUT"))]
    assert "POST /api/validate-yaml" in posts
    posts = [request for request in posts if "validate-yaml" not in request]
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert posts == [
        "POST /api/repos/create",
        "POST /api/models/me/lean/preupload/main",
        "POST /me/lean.git/info/lfs/objects/batch",
        f"PUT /large/{sha256}",
        "POST /api/models/me/lean/commit/main",
    ]
    ((header, *lines),) = hub.commits
    assert header["value"]["summary"] == "First weights"
    assert {line["value"]["path"]: line["key"] for line in lines} == {
        "README.md": "file",
        "config.json": "file",
        "model.safetensors": "lfsFile",
    }
    assert hub.access["me/lean"] == "private"
    hub.access.clear()
    assert_equal(load_vae("me/lean"), vae)
    assert 'load_vae("lean")' in files["README.md"].decode()


def test_pushing_again_keeps_the_card_and_brings_its_figures_up_to_date(hub: Hub, tmp_path: Path) -> None:
    model(1).push_to_hub("me/lean", token=TOKEN)
    _, files = hub.files("me/lean", "main") or ("", {})
    hub.add("me/lean", {**files, "README.md": files["README.md"].replace(b"Not stated.", b"Mine.")})
    model(2).push_to_hub("me/lean", token=TOKEN)
    _, now = hub.files("me/lean", "main") or ("", {})
    assert b"Mine." in now["README.md"]
    (tmp_path / "README.md").write_bytes(now["README.md"])
    assert read_card(tmp_path)["sha256"] == hashlib.sha256(now["model.safetensors"]).hexdigest()
    assert_equal(load_vae("me/lean"), model(2))


def test_pushed_weights_may_be_of_half_the_size(hub: Hub) -> None:
    model().push_to_hub("me/half", token=TOKEN, dtype=torch.float16)
    assert_equal(load_vae("me/half", dtype=torch.float16), model().half())
    assert {weight.dtype for weight in load_vae("me/half").parameters()} == {torch.float32}


def test_pushing_without_permission_says_how_to_get_it(hub: Hub) -> None:
    with pytest.raises(InvalidInput, match=r"^me/lean: http.* refuses: 401: log in with `hf auth login`.*token"):
        model().push_to_hub("me/lean", token="hf_another")
    hub.add("me/lean", {})
    with pytest.raises(MissingFile, match=r"^me/lean has no revision next"):
        model().push_to_hub("me/lean", token=TOKEN, revision="next")


def test_push_that_breaks_off_or_is_not_taken_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handler: _Handler) -> None:
        handler.body()
        handler.answer(403, {})

    monkeypatch.setattr(_Handler, "do_PUT", refuse)
    with pytest.raises(InvalidInput, match=r"^me/lean: Error while uploading 'model\.safetensors' .*403 Forbidden"):
        model().push_to_hub("me/lean", token=TOKEN)
    hub.add("me/wrong", {"README.md": b"---\nlicense: mine\n---\n"})

    def find_wrong(handler: _Handler) -> None:
        handler.body()
        handler.answer(400, {"errors": [{"message": '"license" must be one of those that are known'}]})

    monkeypatch.setattr(_Handler, "do_POST", find_wrong)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/wrong"))
    with pytest.raises(InvalidInput, match=r'^me/wrong: Invalid metadata in README\.md.\n- "license" must be'):
        model().push_to_hub("me/wrong", token=TOKEN)


def test_commands_take_names_of_the_hub(hub: Hub, tmp_path: Path, write_clip: Any) -> None:
    """The library reads its endpoint and cache from the environment, in a process of its own."""
    hub.add("someone/lean", folder_of(model(), tmp_path / "model"), tag="v1")
    write_clip(tmp_path / "clip.mp4", num_frames=5)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    code = "from leanvae.cli.main import run_program; run_program()"
    flags = ["clip.mp4", "--output", "out", "--checkpoint"]

    def run(checkpoint: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "reconstruct", *flags, checkpoint]
        return subprocess.run(
            command, cwd=tmp_path, env={**environment, **variables}, capture_output=True, text=True, check=False
        )

    done = run("someone/lean@v1")
    assert done.returncode == 0, done.stderr
    assert "weights: someone/lean@v1" in done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["checkpoint"] == "someone/lean@v1"
    failed = run("someone/other", HF_HUB_OFFLINE="1")
    assert failed.returncode == 2
    assert re.search(r"^error: no checkpoint at someone/other: .*HF_HUB_OFFLINE", failed.stderr, re.M)
