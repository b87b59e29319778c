"""A small server that speaks the routes of the Hub that uploads and downloads need, over real HTTP.

    with LocalHub({"hf_owner": "solarchip"}) as hub:
        ...  # processes started with hub.environment() push to it and load from it

Large files travel as on the Hub: an LFS batch and a PUT upwards, a redirect to a store of blobs downwards. A private
repository answers strangers as if it did not exist. `cut` makes the store hang up in the middle of a file.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

TOKEN = "hf_owner"  # the right to write as "solarchip"
OTHER_TOKEN = "hf_somebody"  # somebody else's
KINDS = {"model": "", "dataset": "datasets/", "space": "spaces/"}
LARGE = (".safetensors", ".arrow", ".parquet", ".bin", ".fits", ".png", ".gz")


@dataclass
class Repository:
    """Commits by hash, each a mapping of path to hash of content; and branches and tags."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, str]) -> str:
        """Adds a commit on a branch; returns its hash."""
        text = json.dumps([len(self.commits), self.refs.get(branch), sorted(files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The hash of the commit that a branch, a tag or a hash stands for."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Refusal(Exception):
    """An answer that is no success: a status, and the Hub's error code."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message or code)
        self.status, self.code = status, code


class LocalHub:
    """The server; a context manager that runs it in threads of this process.

    Args:
        tokens: The owner of each token; a token may write and read in its owner's name only.

    Attributes:
        url: Where it listens.
        repositories: `(kind, "owner/name")` to `Repository`.
        blobs: Contents by SHA-256.
        requests: How often each `METHOD path` was asked for.
        cut: Name of a large file to the bytes after which each download of it is broken off; `cut_count` limits how
            many are.
        puts_left: Uploads of large files that are still taken before all are refused; None: no limit.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.large: set[str] = set()
        self.requests: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.cut_count = 0
        self.puts_left: int | None = None
        self.lock = threading.RLock()

    def __enter__(self) -> "LocalHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a process that shall take this server for the Hub."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0" if token else "1"}
        return variables | ({"HF_TOKEN": token} if token else {})

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a repository, by path."""
        repository = self.repositories[kind, name]
        tree = repository.commits[repository.refs[revision]]
        return {path: self.blobs[sha] for path, sha in tree.items()}

    # ---- what the routes do

    def repository(self, kind: str, name: str, owner: str | None) -> Repository:
        """A repository that the caller may see."""
        found = self.repositories.get((kind, name))
        if found is None or (found.private and owner != name.split("/")[0]):
            # the Hub tells strangers nothing about what is private
            raise Refusal(401 if owner is None else 404, "RepoNotFound", "Repository not found")
        return found

    def tree(self, repository: Repository, revision: str) -> tuple[str, dict[str, str]]:
        """Hash and files of a revision."""
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def create(self, body: dict, owner: str | None) -> dict:
        """Makes a repository with an empty first commit."""
        namespace = body.get("organization") or owner
        if owner is None or namespace != owner:
            raise Refusal(403 if owner else 401, "Forbidden", "You have no right to write there")
        key = (body.get("type") or "model", f"{namespace}/{body['name']}")
        url = f"{self.url}/{KINDS[key[0]]}{key[1]}"
        if key in self.repositories:
            return {"url": url, "error": "You already created this repo"}
        repository = self.repositories[key] = Repository(private=body.get("visibility") == "private")
        repository.commit("main", {})
        return {"url": url}

    def commit(self, repository: Repository, branch: str, lines: bytes) -> str:
        """Applies the operations of a commit; all of it or nothing."""
        _, files = self.tree(repository, branch)
        files = dict(files)
        for line in lines.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise Refusal(400, "BadRequest", f"{value['path']}: its content was not uploaded")
                files[value["path"]] = value["oid"]
            elif entry["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        return repository.commit(branch, files)

    def store(self, content: bytes, *, large: bool = False) -> str:
        """Keeps a content; returns its SHA-256."""
        sha = hashlib.sha256(content).hexdigest()
        self.blobs[sha] = content
        if large:
            self.large.add(sha)
        return sha


def git_oid(content: bytes) -> str:
    """The name that git gives to a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_errors(content: str) -> list[dict[str, str]]:
    """What the Hub's check of a card would refuse, in its words' place; written without the package's own check."""
    match = re.match(r"---\n(.*?)\n---(\n|$)", content, flags=re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [{"message": str(error)}]
    errors = []
    for name in ("license", "pipeline_tag", "library_name"):
        if name in data and not re.fullmatch(r"[a-z0-9_.+-]+", str(data[name])):
            errors.append({"message": f'"{name}" must be a plain identifier'})
    for name in ("tags", "datasets", "metrics", "widget", "model-index"):
        if name in data and not isinstance(data[name], list):
            errors.append({"message": f'"{name}" must be an array'})
    for model in data.get("model-index") or []:
        for result in model.get("results") or [{}]:
            for place in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result.get(place[0], {}).get(place[1]), str):
                    errors.append({"message": f'"model-index[0].results[0].{".".join(place)}" is required'})
            for metric in result.get("metrics") or [{}]:
                if "type" not in metric or "value" not in metric:
                    errors.append({"message": '"model-index[0].results[0].metrics[0]" needs a type and a value'})
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(length)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        owner = self.hub.tokens.get(token)
        with self.hub.lock:
            self.hub.requests[f"{self.command} {parts.path}"] += 1
            try:
                self._route(parts.path.strip("/"), body, owner)
            except Refusal as refusal:
                text = json.dumps({"error": str(refusal)}).encode()
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
                self._send(refusal.status, text, headers | getattr(refusal, "headers", {}))

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        content = self.rfile.read(size)
        self.rfile.readline()
        return content

    def _route(self, path: str, body: bytes, owner: str | None) -> None:
        hub = self.hub
        if path == "api/whoami-v2":
            if owner is None:
                raise Refusal(401, "Unauthorized", "Invalid username or password.")
            return self._json({"type": "user", "name": owner, "orgs": [], "auth": {"type": "access_token"}})
        if path == "api/repos/create":
            answer = hub.create(json.loads(body), owner)
            return self._json(answer, 409 if "error" in answer else 200)
        if path == "api/validate-yaml":
            errors = card_errors(json.loads(body)["content"])
            return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if match := re.fullmatch(r"blobs/([0-9a-f]{64})", path):
            return self._blob(match[1], body)
        if match := re.fullmatch(r"(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._json(self._batch(json.loads(body)))
        if match := re.fullmatch(r"api/(model|dataset|space)s/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._api(match[1], match[2], match[3] or "", body, owner)
        if match := re.fullmatch(r"(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = (match[1] or "models/").rstrip("s/")
            return self._resolve(kind, match[2], unquote(match[3]), unquote(match[4]), owner)
        raise Refusal(404, "NotFound", f"no such route: {path}")

    def _api(self, kind: str, name: str, rest: str, body: bytes, owner: str | None) -> None:
        hub, repository = self.hub, self.hub.repository(kind, name, owner)
        action, _, place = rest.partition("/")
        revision, _, below = place.partition("/")
        revision = unquote(revision) or "main"
        if self.command == "POST" and owner != name.split("/")[0]:
            raise Refusal(403, "Forbidden", "You have no right to write there")
        if action in ("", "revision"):
            sha, files = hub.tree(repository, revision)
            siblings = [{"rfilename": path} for path in sorted(files)]
            facts = {"id": name, "private": repository.private, "sha": sha, "siblings": siblings, "tags": []}
            return self._json(facts | {"gated": False, "disabled": False, "downloads": 0, "likes": 0})
        if action == "tree":
            sha, files = hub.tree(repository, revision)
            below = unquote(below)
            entries = self._entries(files, below, recursive=self.query.get("recursive", "").lower() in ("true", "1"))
            if not entries:
                raise Refusal(404, "EntryNotFound", f"{below or 'tree'} does not exist on {revision!r}")
            return self._json(entries)
        if action == "paths-info":
            _, files = hub.tree(repository, revision)
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self._json([self._entry(path, files[path]) for path in wanted if path in files])
        if action == "preupload":
            _, files = hub.tree(repository, revision)
            return self._json({"files": [self._upload_mode(entry, files) for entry in json.loads(body)["files"]]})
        if action == "commit":
            sha = hub.commit(repository, revision, body)
            return self._json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})
        if action in ("branch", "tag"):
            point = json.loads(body or b"{}")
            at = repository.resolve(point.get("startingPoint") or revision) or repository.refs["main"]
            repository.refs[point.get("tag") or revision] = at
            return self._json({})
        if action == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": at} for ref, at in repository.refs.items()
            ]
            return self._json({"branches": branches, "tags": [], "converts": []})
        raise Refusal(404, "NotFound", f"no such route: {rest}")

    def _upload_mode(self, entry: dict, files: dict[str, str]) -> dict:
        mode = "lfs" if entry["path"].endswith(LARGE) or entry["size"] > 2**20 else "regular"
        answer = {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False}
        if sha := files.get(entry["path"]):  # lets the client leave out what has not changed
            answer["oid"] = sha if sha in self.hub.large else git_oid(self.hub.blobs[sha])
        return answer

    def _batch(self, request: dict) -> dict:
        objects = []
        for entry in request["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.blobs:  # what is there is not asked for again
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{entry['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _entry(self, path: str, sha: str) -> dict:
        content = self.hub.blobs[sha]
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if sha in self.hub.large:
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
        return entry

    def _entries(self, files: dict[str, str], below: str, *, recursive: bool) -> list[dict]:
        found = {}
        for path, sha in sorted(files.items()):
            if below and not path.startswith(f"{below}/"):
                continue
            inner = path[len(below) :].lstrip("/").split("/")
            folder = "/".join(filter(None, (below, inner[0])))
            if len(inner) > 1:
                found[folder] = {"type": "directory", "path": folder, "oid": git_oid(folder.encode()), "size": 0}
            if len(inner) == 1 or recursive:
                found[path] = self._entry(path, sha)
        return list(found.values())

    def _resolve(self, kind: str, name: str, revision: str, path: str, owner: str | None) -> None:
        sha, files = self.hub.tree(self.hub.repository(kind, name, owner), revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            refusal = Refusal(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
            refusal.headers = headers
            raise refusal
        content = self.hub.blobs[files[path]]
        if files[path] not in self.hub.large:
            return self._send(200, content, headers | {"ETag": f'"{git_oid(content)}"'})
        headers |= {"X-Linked-Etag": f'"{files[path]}"', "X-Linked-Size": str(len(content))}
        # the store of blobs is another host, as on the Hub: clients do not follow there to learn what a file is
        location = f"http://localhost:{self.server.server_port}/blobs/{files[path]}?name={quote(path)}"
        return self._send(302, b"", headers | {"Location": location})

    def _blob(self, sha: str, body: bytes) -> None:
        if self.command == "PUT":
            if self.hub.puts_left is not None:
                self.hub.puts_left -= 1
                if self.hub.puts_left < 0:
                    raise Refusal(403, "Forbidden", "The upload is refused")
            if hashlib.sha256(body).hexdigest() != sha:
                raise Refusal(400, "BadRequest", "the content has another SHA-256")
            self.hub.store(body, large=True)
            return self._send(200, b"", {"ETag": f'"{sha}"'})
        content = self.hub.blobs[sha]
        headers = {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"}
        status, whole = 200, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or whole - 1), whole - 1)
            status, content = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{whole}"
        limit = self.hub.cut.get(self.query.get("name", ""))
        if limit is None or self.hub.cut_count <= 0 or self.command == "HEAD":
            return self._send(status, content, headers)
        self.hub.cut_count -= 1
        self._start(status, headers | {"Content-Length": str(len(content))})
        self.wfile.write(content[:limit])
        self.wfile.flush()
        self.close_connection = True

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self._start(status, headers | {"Content-Length": str(len(content))})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
