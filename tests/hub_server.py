"""The part of the Hub's HTTP protocol that downloads and pushes speak, on loopback, for the Hub of tests.hub."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import Blob, Hub, Refusal, Repository, is_large

WRITER, READER = "hf_writer", "hf_reader"  # the tokens it knows


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves a Hub on a free port of 127.0.0.1, at `hub.url`, as long as the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = {
    "create": ("POST", r"/api/repos/create"),
    "yaml": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"/api/models/{NAME}/preupload/main"),
    "batch": ("POST", rf"/{NAME}\.git/info/lfs/objects/batch"),
    "object": ("PUT", rf"/lfs/{NAME}/(?P<oid>\w+)"),
    "part": ("PUT", r"/part/(?P<oid>\w+)/(?P<number>\d+)"),
    "complete": ("POST", rf"/complete/{NAME}/(?P<oid>\w+)"),
    "verify": ("POST", rf"/verify/{NAME}"),
    "xet_token": ("GET", rf"/api/models/{NAME}/xet-(?:read|write)-token/(?P<revision>.+)"),
    "duplicate": ("POST", rf"/api/models/{NAME}/lfs-files/duplicate"),
    "commit": ("POST", rf"/api/models/{NAME}/commit/main"),
    "paths": ("POST", rf"/api/models/{NAME}/paths-info/(?P<revision>.+)"),
    "tree": ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)"),
    "info": ("GET", rf"/api/models/{NAME}(?:/revision/(?P<revision>.+))?"),
    "file": ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}
"""Method and path of what it answers; each has a method of its name in Handler."""

WRITING = ("create", "preupload", "batch", "commit")
SIGNED = ("object", "part", "complete")  # their URLs are made for one upload, and need no token


class Reply(NamedTuple):
    content: Any
    headers: dict[str, str] = {}  # noqa: RUF012 (nobody changes it)
    status: int = 200


class Handler(BaseHTTPRequestHandler):
    """Finds the route of a request, lets it fail where a fault says so, and calls the method of its name."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would hold every body back until its headers are acknowledged
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        self.query = urlsplit(self.path).query
        route, found = self.routed(unquote(urlsplit(self.path).path))
        fault = self.hub.fault(route)
        try:
            self.body = self.read(limit=fault.cut if fault and fault.status is None and not fault.late else None)
            self.hub.received.append((route, len(self.body)))
            if fault and not fault.late:
                fault.strike()
            self.authorize(route, found.get("name"))
            reply = getattr(self, route)(**found)
            if fault and fault.late:
                fault.strike()
            self.send(reply)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            content = {"error": refusal.message}
            self.send(Reply(content, {key: value for key, value in headers.items() if value}, refusal.status))
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 (names that http.server looks for)

    def routed(self, path: str) -> tuple[str, dict[str, Any]]:
        for route, (method, pattern) in ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found and method == self.command.replace("HEAD", "GET"):
                return route, found.groupdict()
        return "unknown", {}

    def unknown(self) -> Reply:
        raise Refusal(404)

    def read(self, limit: int | None) -> bytes:
        """The body, or the first `limit` bytes of it."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            size = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(size if limit is None else min(size, limit))
        body = bytearray()
        while limit is None or len(body) < limit:
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return bytes(body)

    def send(self, reply: Reply) -> None:
        data = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- who may do what

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def authorize(self, route: str, name: str | None) -> None:
        if route in SIGNED:
            return
        if self.token not in ("", WRITER, READER):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(name or "")
        if name and (repository is None or (repository.private and not self.token)):
            raise Refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if route in WRITING and self.token != WRITER:
            raise Refusal(403, message="You don't have the rights to write here")

    def json(self) -> Any:
        return json.loads(self.body)

    def snapshot(self, name: str, revision: str | None) -> tuple[str, dict[str, Blob]]:
        found = self.hub.repositories[name].at(revision or "main")
        if found is None:
            raise Refusal(404, "RevisionNotFound")
        return found

    # ---- routes: writing

    def create(self) -> Reply:
        asked = self.json()
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            raise Refusal(409, message="You already created this model repo")
        # Without a wish the Hub's own default is public.
        self.hub.publish(name, {}, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return Reply({"url": f"{self.hub.url}/{name}"})

    def yaml(self) -> Reply:
        if "base_model: not/a/model" in self.json()["content"]:
            return Reply({"errors": [{"message": '"base_model" is not valid'}], "warnings": []}, status=400)
        return Reply({"errors": [], "warnings": []})

    def preupload(self, name: str) -> Reply:
        there = self.hub.repositories[name].files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": (blob.sha256 or blob.git) if (blob := there.get(file["path"])) else None,
            }
            for file in self.json()["files"]
        ]
        return Reply({"files": files})

    def batch(self, name: str) -> Reply:
        asked = self.json()["objects"]
        objects = [one | self.actions(name, one["oid"], one["size"]) for one in asked]
        return Reply({"transfer": "multipart" if self.hub.multipart else "basic", "objects": objects})

    def actions(self, name: str, oid: str, size: int) -> dict[str, Any]:
        if oid in self.hub.repositories[name].objects:
            return {}  # git-lfs's way to say that it is there
        url, step = self.hub.url, self.hub.multipart
        upload: dict[str, Any] = {"href": f"{url}/lfs/{name}/{oid}"}
        if step:
            parts = {f"{number + 1:05}": f"{url}/part/{oid}/{number + 1}" for number in range(-(-size // step))}
            upload = {"href": f"{url}/complete/{name}/{oid}", "header": {"chunk_size": str(step), **parts}}
        return {"actions": {"upload": upload, "verify": {"href": f"{url}/verify/{name}"}}}

    def object(self, name: str, oid: str) -> Reply:
        self.keep(name, oid, self.body)
        return Reply(b"")

    def part(self, oid: str, number: str) -> Reply:
        self.hub.parts[oid, int(number)] = self.body
        return Reply(b"", {"ETag": f'"{hashlib.sha1(self.body).hexdigest()}"'})

    def complete(self, name: str, oid: str) -> Reply:
        numbers = [part["partNumber"] for part in self.json()["parts"]]
        self.keep(name, oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))
        return Reply({})

    def keep(self, name: str, oid: str, data: bytes) -> None:
        if oid == self.hub.lose:
            raise ConnectionError
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, message="the content does not have the SHA-256 it was announced with")
        self.hub.objects[oid] = data
        self.hub.repositories[name].objects.add(oid)

    def verify(self, name: str) -> Reply:
        if self.json()["oid"] not in self.hub.repositories[name].objects:
            raise Refusal(404)
        return Reply({})

    def xet_token(self, **_: str) -> Reply:
        if self.hub.xet is None:
            raise Refusal(404)
        url, expires = f"local://{self.hub.xet}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return Reply({"casUrl": url, "accessToken": "xet", "exp": expires}, headers)

    def duplicate(self, name: str) -> Reply:
        asked, source = self.json(), self.hub.repositories[name]
        target = self.hub.repositories[asked["target"]["name"]]
        known = {self.hub.xet_hash(Blob(0, sha256=oid)): oid for oid in source.objects}
        failed = [file for file in asked["files"] if known.get(file["xetHash"]) != file["sha256"]]
        target.objects |= {file["sha256"] for file in asked["files"] if file not in failed}
        return Reply({"failed": [{"sha256": file["sha256"], "error": "not there"} for file in failed]})

    def commit(self, name: str) -> Reply:
        repository = self.hub.repositories[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, repository.head):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repository.files)
        for line in lines[1:]:
            self.apply(repository, files, line["key"], line["value"])
        oid = repository.commit(files)
        return Reply({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def apply(self, repository: Repository, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            data = base64.b64decode(value["content"])
            files[value["path"]] = Blob(len(data), data)
        elif key == "deletedFile":
            del files[value["path"]]
        elif value["oid"] not in repository.objects and value["oid"] not in self.hub.xet_hashes:
            raise Refusal(400, message=f"{value['path']}: its content was not uploaded")
        else:
            size = self.hub.sizes.setdefault(value["oid"], value.get("size"))  # a copy does not say it
            files[value["path"]] = Blob(size, sha256=value["oid"])
            repository.objects.add(value["oid"])

    # ---- routes: reading

    def info(self, name: str, revision: str | None) -> Reply:
        commit, files = self.snapshot(name, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.repositories[name].private
        return Reply({"_id": "1", "id": name, "sha": commit, "private": private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> Reply:
        return Reply([self.entry(path, blob) for path, blob in self.snapshot(name, revision)[1].items()])

    def paths(self, name: str, revision: str) -> Reply:
        files = self.snapshot(name, revision)[1]
        asked = parse_qs(self.body.decode())["paths"]
        return Reply([self.entry(path, files[path]) for path in asked if path in files])

    def entry(self, path: str, blob: Blob) -> dict[str, Any]:
        plain = {"type": "file", "path": path, "oid": blob.git, "size": blob.size}
        if blob.sha256 is None:
            return plain
        lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        return {**plain, "lfs": lfs, "xetHash": self.hub.xet_hash(blob)}

    def file(self, name: str, revision: str, path: str) -> Reply:
        commit, files = self.snapshot(name, revision)
        blob = files.get(path)
        if blob is None:
            raise Refusal(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.git}"'}
        if blob.sha256 is None:
            return Reply(blob.data, headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        if blob.sha256 not in self.hub.objects:  # the Xet store has it
            token = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": self.hub.xet_hash(blob), "Link": f'<{token}>; rel="xet-auth"'}
        return Reply(self.hub.objects.get(blob.sha256, b""), headers)
