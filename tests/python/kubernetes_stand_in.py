"""A stand-in for a Kubernetes cluster, for the commands of helm and kubectl that the documents show. It is none.

    kubernetes_stand_in.py SETTINGS KUBECONFIG

It keeps objects and answers what clients ask of an API server: discovery, objects by name and by selectors, watches, patches; what it takes must
fit Kubernetes' own schemas (kubernetes-validate). Pods of Deployments and StatefulSets appear at once and are ready if their image is one of
`images`, but run nothing: behind their ports are the `processes` that the settings name, which a test has started. A pod made by itself, and a
command of `kubectl exec`, is run as a process of this machine with the container's environment; Services' names in its words are looked up as a
cluster's DNS would: by name, port, selector and readiness.

SETTINGS is a JSON file: `{"images": [...], "processes": {COMPONENT: {PORT NAME: "host:port"}}, "path": PATH of pods, "version": "1.33"}`.
It writes KUBECONFIG when it serves, on loopback, by HTTP, to anybody.
"""

import base64
import copy
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

import kubernetes_validate
import yaml

import spdy

KINDS = {  # of a group and version: plural, kind, whether it is in a namespace, short names
    "v1": [
        ("namespaces", "Namespace", False, ["ns"]), ("pods", "Pod", True, ["po"]), ("services", "Service", True, ["svc"]),
        ("configmaps", "ConfigMap", True, ["cm"]), ("secrets", "Secret", True, []), ("serviceaccounts", "ServiceAccount", True, ["sa"]),
        ("persistentvolumeclaims", "PersistentVolumeClaim", True, ["pvc"]), ("events", "Event", True, ["ev"]),
    ],
    "apps/v1": [
        ("deployments", "Deployment", True, ["deploy"]), ("statefulsets", "StatefulSet", True, ["sts"]),
        ("daemonsets", "DaemonSet", True, ["ds"]), ("replicasets", "ReplicaSet", True, ["rs"]),
    ],
    "policy/v1": [("poddisruptionbudgets", "PodDisruptionBudget", True, ["pdb"])],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy", True, ["netpol"]), ("ingresses", "Ingress", True, ["ing"])],
    "autoscaling/v2": [("horizontalpodautoscalers", "HorizontalPodAutoscaler", True, ["hpa"])],
}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
SUBRESOURCES = ["pods/log", "pods/exec", "pods/attach", "pods/portforward"]


class Refused(Exception):
    def __init__(self, code, reason, message):
        super().__init__(message)
        self.status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code}


class Cluster:
    def __init__(self, settings):
        self.settings = settings
        self.changed = threading.Condition(threading.RLock())
        self.objects, self.events, self.version = {}, [], 0
        self.logs = {}
        for name in ("default", "kube-system"):
            self.put("v1", "namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    # --- objects ---

    def find(self, group, plural, namespace, name):
        try:
            return self.objects[(group, plural, namespace, name)]
        except KeyError:
            raise Refused(404, "NotFound", f'{plural} "{name}" not found') from None

    def select(self, group, plural, namespace, labels="", fields=""):
        at = [item for (g, p, ns, _), item in sorted(self.objects.items()) if (g, p) == (group, plural) and namespace in ("", ns)]
        return [item for item in at if fits(item, labels, fields)]

    def put(self, group, plural, item, kind="ADDED"):
        with self.changed:
            self.version += 1
            meta = item["metadata"]
            meta["resourceVersion"] = str(self.version)
            meta.setdefault("uid", hashlib.sha256(f"{plural}{self.version}".encode()).hexdigest()[:32])
            meta.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            meta.setdefault("generation", 1)
            key = (group, plural, meta.get("namespace", ""), meta["name"])
            if kind == "DELETED":
                del self.objects[key]
            else:
                self.objects[key] = item
            self.events.append((self.version, kind, key, copy.deepcopy(item)))
            self.changed.notify_all()
        return item

    def create(self, group, plural, namespace, item):
        self.check(item)
        meta = item.setdefault("metadata", {})
        item.pop("status", None)
        if meta.get("creationTimestamp", "") is None:
            del meta["creationTimestamp"]
        if "name" not in meta:
            meta["name"] = meta["generateName"] + f"{self.version:05x}"
        if namespace:
            meta["namespace"] = namespace
            self.find("v1", "namespaces", "", namespace)
        if (group, plural, namespace, meta["name"]) in self.objects:
            raise Refused(409, "AlreadyExists", f'{plural} "{meta["name"]}" already exists')
        self.put(group, plural, item)
        self.controllers(plural, item)
        return item

    def replace(self, group, plural, item, old):
        item["metadata"] = {**old["metadata"], **item["metadata"], "generation": old["metadata"]["generation"] + 1}
        self.put(group, plural, item, "MODIFIED")
        self.controllers(plural, item)
        return item

    def remove(self, group, plural, namespace, name):
        item = self.find(group, plural, namespace, name)
        self.put(group, plural, item, "DELETED")
        for pod in self.select("v1", "pods", namespace):
            if any(owner["uid"] == item["metadata"]["uid"] for owner in pod["metadata"].get("ownerReferences", [])):
                self.put("v1", "pods", pod, "DELETED")
        return item

    def check(self, item):
        try:
            kubernetes_validate.validate(item, self.settings["version"], strict=True)
        except kubernetes_validate.ValidationError as error:
            raise Refused(422, "Invalid", f"{item.get('kind')}: {error.message}") from None

    # --- controllers and a kubelet, as far as they are seen ---

    def pullable(self, spec):
        return all(container["image"] in self.settings["images"] for container in spec["containers"])

    def controllers(self, plural, item):
        if plural in ("deployments", "statefulsets"):
            self.scale(plural, item)
        elif plural == "pods" and "ownerReferences" not in item["metadata"] and "status" not in item:
            item["status"] = {"phase": "Pending"}
            if self.pullable(item["spec"]):
                threading.Thread(target=self.run, args=(item,), daemon=True).start()
            else:
                item["status"] = self.pod_status(item["spec"], False)

    def pod_status(self, spec, ready):
        waiting = {"waiting": {"reason": "ErrImagePull", "message": "the image is in no registry that this cluster knows"}}
        state = {"running": {}} if ready else waiting
        names = [(c["name"], c["image"]) for c in spec["containers"]]
        return {
            "phase": "Running" if ready else "Pending", "podIP": "127.0.0.1", "hostIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [{"name": n, "image": i, "imageID": i, "restartCount": 0, "ready": ready, "state": state} for n, i in names],
        }

    def scale(self, plural, item):
        meta, spec = item["metadata"], item["spec"]
        for pod in self.select("v1", "pods", meta["namespace"]):
            if any(owner["uid"] == meta["uid"] for owner in pod["metadata"].get("ownerReferences", [])):
                self.put("v1", "pods", pod, "DELETED")
        ready, count = self.pullable(spec["template"]["spec"]), spec.get("replicas", 1)
        digest = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).hexdigest()
        for at in range(count):
            pod = copy.deepcopy(spec["template"])
            name = f"{meta['name']}-{at}" if plural == "statefulsets" else f"{meta['name']}-{digest[:9]}-{digest[9 + at : 14 + at]}"
            owner = {"apiVersion": item["apiVersion"], "kind": item["kind"], "name": meta["name"], "uid": meta["uid"], "controller": True}
            pod.setdefault("metadata", {}).update(name=name, namespace=meta["namespace"], ownerReferences=[owner])
            pod.update(apiVersion="v1", kind="Pod", status=self.pod_status(pod["spec"], ready))
            self.put("v1", "pods", pod)
        have = count if ready else 0
        conditions = [{"type": "Available", "status": str(ready)}, {"type": "Progressing", "status": "True"}]
        item["status"] = {
            "observedGeneration": meta["generation"], "replicas": count, "readyReplicas": have, "updatedReplicas": count,
            "availableReplicas": have, "conditions": conditions,
        }
        self.put("apps/v1", plural, item, "MODIFIED")

    def run(self, pod):
        container = pod["spec"]["containers"][0]
        words = container.get("command", []) + container.get("args", [])
        code, output = self.command(pod, container, words)
        with self.changed:
            self.logs[pod["metadata"]["uid"]] = output
            phase, reason = ("Succeeded", "Completed") if code == 0 else ("Failed", "Error")
            state = {"terminated": {"exitCode": code, "reason": reason}}
            status = self.pod_status(pod["spec"], False)
            status.update(phase=phase, conditions=[{"type": "Ready", "status": "False", "reason": "PodCompleted"}])
            status["containerStatuses"][0]["state"] = state
            pod["status"] = status
            key = ("v1", "pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
            if key in self.objects:
                self.put("v1", "pods", pod, "MODIFIED")

    def command(self, pod, container, words):
        meta = pod["metadata"]
        fields = {"status.podIP": "127.0.0.1", "metadata.name": meta["name"], "metadata.namespace": meta["namespace"]}
        environment = {"PATH": self.settings["path"], "HOME": "/tmp"}
        for entry in container.get("env", []):
            value = entry.get("value") or fields.get(entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath"), "")
            environment[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), value)
        words = [self.named(word, meta["namespace"]) for word in words]
        environment = {key: self.named(value, meta["namespace"]) for key, value in environment.items()}
        try:
            done = subprocess.run(words, env=environment, cwd="/tmp", stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return 127, str(error).encode()
        return done.returncode, done.stdout + done.stderr

    def named(self, word, namespace):
        """The word with addresses in place of Services' names."""
        return re.sub(r"([a-z][a-z0-9.-]*):(\d+)", lambda found: self.look_up(found[1], int(found[2]), namespace) or found[0], word)

    def look_up(self, host, port, namespace):
        parts = host.removesuffix(".cluster.local").removesuffix(".svc").split(".")
        if len(parts) == 3:
            parts = parts[1:]  # a pod of a headless Service
        service = self.objects.get(("v1", "services", parts[1] if len(parts) > 1 else namespace, parts[0]))
        if not service or len(parts) > 2:
            return None
        target = next((p.get("targetPort", port) for p in service["spec"]["ports"] if p["port"] == port), None)
        labels = ",".join(f"{key}={value}" for key, value in service["spec"]["selector"].items())
        for pod in self.select("v1", "pods", service["metadata"]["namespace"], labels):
            address = self.behind(pod, target)
            if address and pod["status"]["phase"] == "Running":
                return address
        return None

    def behind(self, pod, port):
        """Which process is behind a port of a pod, by the port's name or number."""
        ports = [p for container in pod["spec"]["containers"] for p in container.get("ports", [])]
        name = next((p["name"] for p in ports if port in (p["name"], p["containerPort"])), None)
        component = pod["metadata"]["labels"].get("app.kubernetes.io/component")
        return self.settings["processes"].get(component, {}).get(name)


def fits(item, labels, fields):
    own = item["metadata"].get("labels", {})
    for part in filter(None, re.split(r",(?![^(]*\))", labels)):
        among = re.fullmatch(r"\s*(\S+) (in|notin) \((.*)\)", part)
        if among:
            inside = own.get(among[1]) in [word.strip() for word in among[3].split(",")]
            if inside != (among[2] == "in"):
                return False
        elif "!=" in part:
            key, value = part.split("!=")
            if own.get(key) == value:
                return False
        elif "=" in part:
            key, value = part.replace("==", "=").split("=")
            if own.get(key) != value:
                return False
        elif (part.lstrip("!") in own) == part.startswith("!"):
            return False
    for part in filter(None, fields.split(",")):
        key, value = part.replace("==", "=").split("=")
        found = item
        for step in key.split("."):
            found = found.get(step, {}) if isinstance(found, dict) else {}
        if found != value:
            return False
    return True


def merge(into, patch):
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
    return into


def wire(data):
    """The fields of a protobuf message: number, and bytes or a number."""

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    at, fields = 0, {}
    while at < len(data):
        tag = number()
        value = number()
        if tag & 7 == 2:
            at, value = at + value, data[at : at + value]
        elif tag & 7:
            raise Refused(415, "UnsupportedMediaType", "protobuf that this stand-in does not read")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def secret(body):
    """A Secret in protobuf, as helm sends its releases."""
    envelope = wire(body[4:])
    kind = wire(envelope[1][0])
    if kind[2] != [b"Secret"]:
        raise Refused(415, "UnsupportedMediaType", f"of protobuf, this stand-in reads Secrets, not {kind[2]}")
    fields = wire(envelope[2][0])
    meta = wire(fields[1][0])
    pairs = lambda entries: [(wire(entry)[1][0].decode(), wire(entry)[2][0]) for entry in entries]
    return {
        "apiVersion": "v1", "kind": "Secret", "type": fields.get(3, [b"Opaque"])[0].decode(),
        "metadata": {"name": meta[1][0].decode(), "labels": {key: value.decode() for key, value in pairs(meta.get(11, []))}},
        "data": {key: base64.b64encode(value).decode() for key, value in pairs(fields.get(2, []))},
    }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster = None

    def log_message(self, form, *arguments):
        print(form % arguments, file=sys.stderr, flush=True)

    def reply(self, body, code=200):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(code)
        self.send_header("content-type", "application/json" if isinstance(body, dict) else "text/plain")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do(self):
        url = urllib.parse.urlsplit(self.path)
        query = {key: values for key, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length) if length else b""
        try:
            self.answer([part for part in url.path.split("/") if part], query, body)
        except Refused as refused:
            self.reply(refused.status, refused.status["code"])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

    def answer(self, parts, query, body):
        if parts == ["version"]:
            major, minor = self.cluster.settings["version"].split(".")
            return self.reply({"major": major, "minor": minor, "gitVersion": f"v{major}.{minor}.0"})
        if parts == ["api"]:
            return self.reply({"kind": "APIVersions", "versions": ["v1"]})
        if parts == ["apis"]:
            groups = [{"groupVersion": group, "version": group.split("/")[1]} for group in KINDS if "/" in group]
            groups = [{"name": v["groupVersion"].split("/")[0], "versions": [v], "preferredVersion": v} for v in groups]
            return self.reply({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        if parts[:2] == ["openapi", "v3"]:
            return self.reply(self.openapi(parts[2:]))
        group, rest = ("/".join(parts[1:2]), parts[2:]) if parts[:1] == ["api"] else ("/".join(parts[1:3]), parts[3:])
        if parts[0] not in ("api", "apis") or group not in KINDS:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if not rest:
            return self.reply(self.resources(group))
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, sub = (rest + [None, None])[:3]
        kind = next((kind for known, kind, _, _ in KINDS[group] if known == plural), None)
        if not kind:
            raise Refused(404, "NotFound", f"there are no {plural} in {group}")
        if sub:
            return self.subresource(namespace, name, sub, query)
        if self.command == "GET" and "watch" in query:
            return self.watch(group, plural, namespace, query)
        with self.cluster.changed:
            self.object(group, plural, kind, namespace, name, query, body)

    def openapi(self, parts):
        """No schemas: only that fields are checked here (`fieldValidation`), so that clients need not do it."""
        root = {f"apis/{group}" if "/" in group else f"api/{group}": group for group in KINDS}
        if not parts:
            return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}"} for path in root}}
        group, paths = root["/".join(parts)], {}
        for plural, kind, namespaced, _ in KINDS[group]:
            name, version = group.split("/") if "/" in group else ("", group)
            patch = {
                "x-kubernetes-group-version-kind": {"group": name, "version": version, "kind": kind}, "responses": {},
                "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
            }
            paths[f"/{'/'.join(parts)}/{'namespaces/{namespace}/' if namespaced else ''}{plural}/{{name}}"] = {"patch": patch}
        return {"openapi": "3.0.0", "info": {"title": "stand-in", "version": self.cluster.settings["version"]}, "paths": paths}

    def resources(self, group):
        rows = []
        for plural, kind, namespaced, short in KINDS[group]:
            row = {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind, "verbs": VERBS, "shortNames": short}
            rows.append({**row, "categories": ["all"]} if plural == "pods" else row)
        if group == "v1":
            rows += [{"name": sub, "singularName": "", "namespaced": True, "kind": "Pod", "verbs": ["create", "get"]} for sub in SUBRESOURCES]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": rows}

    def object(self, group, plural, kind, namespace, name, query, body):
        cluster, labels, fields = self.cluster, *(query.get(key, [""])[0] for key in ("labelSelector", "fieldSelector"))
        if self.command == "GET" and name:
            return self.reply(cluster.find(group, plural, namespace, name))
        if self.command == "GET":
            items = cluster.select(group, plural, namespace, labels, fields)
            meta = {"resourceVersion": str(cluster.version)}
            return self.reply({"kind": f"{kind}List", "apiVersion": group, "metadata": meta, "items": items})
        dry = "dryRun" in query
        if self.command == "DELETE":
            return self.reply(cluster.find(group, plural, namespace, name) if dry else cluster.remove(group, plural, namespace, name))
        if not body:
            raise Refused(400, "BadRequest", "nothing was sent")
        item = secret(body) if body.startswith(b"k8s\0") else yaml.safe_load(body)
        if self.command == "POST":
            return self.reply(item if dry else cluster.create(group, plural, namespace, item), 201)
        old = cluster.objects.get((group, plural, namespace, name))
        applied = self.headers.get("content-type", "").startswith("application/apply-patch")
        if applied:
            cluster.check(item)
            if not old:
                return self.reply(item if dry else cluster.create(group, plural, namespace, item), 201)
        old = cluster.find(group, plural, namespace, name)
        new = item if self.command == "PUT" else merge(copy.deepcopy(old), item)
        return self.reply(new if dry else cluster.replace(group, plural, new, old))

    def watch(self, group, plural, namespace, query):
        cluster, labels, fields = self.cluster, *(query.get(key, [""])[0] for key in ("labelSelector", "fieldSelector"))
        since = query.get("resourceVersion", [""])[0]
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True

        def tell(kind, item):
            self.wfile.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")
            self.wfile.flush()

        with cluster.changed:
            seen = int(since or 0) or cluster.version
            if since in ("", "0"):
                for item in cluster.select(group, plural, namespace, labels, fields):
                    tell("ADDED", item)
            if "sendInitialEvents" in query:
                kind = next(kind for known, kind, _, _ in KINDS[group] if known == plural)
                meta = {"resourceVersion": str(cluster.version), "annotations": {"k8s.io/initial-events-end": "true"}}
                tell("BOOKMARK", {"kind": kind, "apiVersion": group, "metadata": meta})
        until = time.monotonic() + float(query.get("timeoutSeconds", ["300"])[0])
        while time.monotonic() < until:
            with cluster.changed:
                if cluster.version <= seen:
                    cluster.changed.wait(1)
                fresh = [event for event in cluster.events if event[0] > seen]
                seen = cluster.version
            for _, kind, (g, p, ns, _), item in fresh:
                if (g, p) == (group, plural) and namespace in ("", ns) and fits(item, labels, fields):
                    tell(kind, item)

    # --- pods' logs, ports and commands ---

    def subresource(self, namespace, name, sub, query):
        pod = self.cluster.find("v1", "pods", namespace, name)
        if sub == "log":
            return self.reply(self.cluster.logs.get(pod["metadata"]["uid"], b""))
        if pod["status"]["phase"] != "Running":
            raise Refused(400, "BadRequest", f"pod {name} is {pod['status']['phase']}")
        if sub == "portforward" and self.headers.get("upgrade", "").upper() == "SPDY/3.1":
            return self.forward(pod)
        if sub == "exec" and self.headers.get("upgrade", "").lower() == "websocket":
            return self.exec(pod, query)
        raise Refused(400, "BadRequest", f"this stand-in does not {sub} by {self.headers.get('upgrade')}")

    def switch(self, **headers):
        self.send_response(101)
        self.send_header("connection", "Upgrade")
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.flush()
        self.close_connection = True

    def forward(self, pod):
        self.switch(upgrade="SPDY/3.1", x_stream_protocol_version="portforward.k8s.io")
        connection, streams, sockets = spdy.Connection(self.rfile, self.connection), {}, {}

        def opened(stream, headers):
            streams[stream] = headers
            if headers["streamtype"] != "data":
                return
            address = self.cluster.behind(pod, int(headers["port"]))
            if not address:
                error = next(at for at, other in streams.items() if other["streamtype"] == "error" and other["requestid"] == headers["requestid"])
                connection.send(error, f"nothing listens on port {headers['port']}".encode(), True)
                return connection.send(stream, b"", True)
            host, port = address.rsplit(":", 1)
            sockets[stream] = socket.create_connection((host, int(port)))
            threading.Thread(target=back, args=(stream, headers["requestid"]), daemon=True).start()

        def back(stream, request):
            try:
                while data := sockets[stream].recv(65536):
                    connection.send(stream, data)
                connection.send(stream, b"", True)
                for error in [at for at, other in streams.items() if other["streamtype"] == "error" and other["requestid"] == request]:
                    connection.send(error, b"", True)
            except OSError:
                pass

        def ended(stream):
            if stream in sockets:
                sockets[stream].shutdown(socket.SHUT_WR)

        connection.serve(opened, lambda stream, data: sockets[stream].sendall(data) if stream in sockets else None, ended)

    def exec(self, pod, query):
        key = self.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.switch(upgrade="websocket", sec_websocket_accept=accept, sec_websocket_protocol="v5.channel.k8s.io")
        containers = pod["spec"]["containers"]
        wanted = query.get("container", [containers[0]["name"]])[0]
        container = next(container for container in containers if container["name"] == wanted)
        code, output = self.cluster.command(pod, container, query["command"])
        status = {"metadata": {}, "status": "Success"}
        if code:
            causes = [{"reason": "ExitCode", "message": str(code)}]
            status = {"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode", "message": "it failed", "details": {"causes": causes}}
        for channel, data in ((1, output), (3, json.dumps(status).encode())):
            self.frame(2, bytes([channel]) + data)
        self.frame(8, struct.pack(">H", 1000))

    def frame(self, kind, data):
        length = bytes([len(data)]) if len(data) < 126 else b"\x7f" + struct.pack(">Q", len(data))
        self.connection.sendall(bytes([0x80 | kind]) + length + data)


def main():
    with open(sys.argv[1]) as file:
        Handler.cluster = Cluster(json.load(file))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_address[1]}"
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "stand-in",
        "clusters": [{"name": "stand-in", "cluster": {"server": url}}],
        "contexts": [{"name": "stand-in", "context": {"cluster": "stand-in", "user": "nobody"}}],
        "users": [{"name": "nobody", "user": {"token": "none"}}],
    }
    with open(sys.argv[2] + ".new", "w") as file:
        json.dump(config, file)
    os.rename(sys.argv[2] + ".new", sys.argv[2])
    server.serve_forever()


main()
