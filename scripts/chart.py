"""What of the Helm chart is made from something else; see scripts/chart.

values.yaml is the source: a key's default gives its type, the comment above it the words, and a line `# @schema {…}` what
neither tells. What the services may be set to comes from `--print-config`, so that a misspelt setting is refused by Helm already.
"""

import argparse
import difflib
import itertools
import json
import pathlib
import re
import subprocess
import sys

import yaml

ROOT = pathlib.Path(__file__).parent.parent
CHART = ROOT / "helm/kvasir"
SNAPSHOTS = ROOT / "tests/charts"
# Of the sets of values in ci/, those whose manifests are kept, so that a change of them is seen.
KEPT = ("default", "gpu-rdma", "secure")

# Settings that the chart makes itself: by the values named beside them.
OURS = {
    "id": "the pod's name",
    "listen": "ports",
    "advertise": "the pod's address",
    "port_file": "nobody reads it",
    "log": "log",
    "rpc": "tls.rpc",
    "admin.listen": "ports.admin",
    "registry.etcd.endpoints": "etcd",
    "registry.etcd.prefix": "etcd.prefix",
    "registry.etcd.tls": "etcd.tls",
    "registry.etcd.username": "etcd.auth",
    "registry.etcd.password_file": "etcd.auth",
    "operator": "operator",
    "shutdown.grace_ms": "graceSeconds",
    "limits.notice_ms": "noticeSeconds",
    "models": "models",
    "model": "models",
    "tls": "router.tls",
    "access.keys_file": "router.access",
    "external.key_file": "router.external",
    "kv.memory_bytes": "kvMemory",
    "capacity_bytes": "store.memory",
    "disk.path": "store.disk",
    "disk.capacity_bytes": "store.disk.size",
    "transfer.listen": "ports.transfer",
    "transfer.ucx.listen": "ports.ucx",
    "transfer.tls": "tls.transfer",
}

# Of `podDefaults`, what etcd's pods have, too: they are not our image.
ETCD = (
    "annotations labels nodeSelector tolerations affinity topologySpreadConstraints priorityClassName podSecurityContext securityContext "
    "env pdb"
).split()

TEXT, STRINGS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}


def closed(properties, required=(), **more):
    """An object of these keys and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required), **more}


SOURCE = closed(
    {
        "path": {"type": "string", "pattern": "^/"},
        "pvc": closed({"claimName": TEXT, "subPath": TEXT}, ["claimName"]),
        "hostPath": closed({"path": {"type": "string", "pattern": "^/"}}, ["path"]),
        "image": closed({"reference": TEXT, "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]}, "subPath": TEXT}, ["reference"]),
        "download": closed(
            {
                "image": TEXT,
                "command": STRINGS,
                "args": STRINGS,
                "env": {"type": "array", "items": {"type": "object"}},
                "envFrom": {"type": "array", "items": {"type": "object"}},
                "sizeLimit": {"$ref": "#/$defs/size"},
                "medium": {"enum": ["", "Memory"]},
                "volume": {"type": "object", "description": "a volume to keep it in, instead of an emptyDir"},
                "resources": {"type": "object"},
            },
            ["image"],
        ),
    },
    minProperties=1,
    maxProperties=1,
)

NUMBER = {"type": "number", "exclusiveMinimum": 0}
DEFS = {
    "name": closed({"name": TEXT}, ["name"]),
    "size": {"type": ["string", "integer"], "pattern": "^[1-9][0-9]*(Ki|Mi|Gi|Ti)?$"},
    "sizeOrEmpty": {"type": ["string", "integer"], "pattern": "^([1-9][0-9]*(Ki|Mi|Gi|Ti)?)?$"},
    "imageOverride": closed(
        {"repository": TEXT, "tag": TEXT, "digest": TEXT, "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]}}
    ),
    "source": SOURCE,
    "model": closed(
        {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9]([A-Za-z0-9._/-]{0,62}[A-Za-z0-9])?$"},
            "source": {"$ref": "#/$defs/source"},
            "routerSource": {"$ref": "#/$defs/source"},
            "toolParser": {"enum": ["auto", "none", "hermes", "llama3-json", "mistral"]},
            "reasoningParser": {"enum": ["auto", "none", "think"]},
            "slo": closed({"ttft_ms": NUMBER, "tpot_ms": NUMBER}),
        },
        ["name", "source"],
    ),
}

POOL = {
    "name": {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?$"},
    "role": {"enum": ["prefill", "decode"]},
    "model": TEXT,
}


class Entry:
    """A key of values.yaml: where it is, what is said of it."""

    def __init__(self, path, words, hint):
        self.path, self.words, self.hint = path, words, hint


def entries(text):
    """The keys of maps in the file's order, with their comments. Lists' contents are not looked into."""
    found, stack, comment, list_indent = {}, [], [], None
    for line in text.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped and list_indent is not None and indent >= list_indent:
            continue
        list_indent = indent if stripped.startswith("- ") else None
        if stripped.startswith("#"):
            comment.append(stripped[1:].strip())
            continue
        key = re.match(r"([A-Za-z0-9_./-]+):( |$)", stripped)
        if not stripped or not key:
            comment = []
            continue
        while stack and stack[-1][0] >= indent:
            stack.pop()
        path = (*(name for _, name in stack), key.group(1))
        stack.append((indent, key.group(1)))
        hints = [line for line in comment if line.startswith("@schema ")]
        words = " ".join(line for line in comment if not line.startswith("@schema "))
        found[path] = Entry(path, words, json.loads(hints[0].removeprefix("@schema ")) if hints else {})
        comment = []
    return found


def schema_of(value, path, known):
    entry = known.get(path, Entry(path, "", {}))
    hint, words = entry.hint, {"description": entry.words} if entry.words else {}
    if "$ref" in hint:
        return {**words, **hint}
    match value:
        case dict() if value and "properties" not in hint and not free(path):
            schema = closed({key: schema_of(below, (*path, key), known) for key, below in value.items()})
        case dict():
            schema = {"type": "object"}
        case bool():
            schema = {"type": "boolean"}
        case int():
            schema = {"type": "integer"}
        case float():
            schema = {"type": "number"}
        case list():
            schema = {"type": "array", "items": {"type": "string"}}
        case _:
            schema = {"type": "string"}
    if "enum" in hint:
        del schema["type"]
    return {**words, **schema, **hint}


def free(path):
    """Maps with a default whose keys are others' (Kubernetes's) or anybody's."""
    return path[-1:] and path[-1] in ("podSecurityContext", "securityContext", "labels", "annotations", "resources", "strategy")


def config_schema(tree, path=()):
    """A service's settings, without those that the chart makes."""
    match tree:
        case dict() if tree:
            keys = {key: config_schema(value, (*path, key)) for key, value in tree.items() if ".".join((*path, key)) not in OURS}
            return closed(keys)
        case dict():
            return {"type": "object"}
        case bool():
            return {"type": "boolean"}
        case int():
            return {"type": "integer"}
        case float():
            return {"type": "number"}
        case list():
            return {"type": "array"}
        case _:
            return {}  # a text may stand for a list (`transports`), and what has no default may be anything


def make_schema(values, known, configs):
    root = schema_of(values, (), known)
    common = root["properties"]["podDefaults"]["properties"]
    defs = {**DEFS, **{name: config_schema(tree) for name, tree in configs.items()}}
    for part in ("router", "poolDefaults", "store", "etcd"):
        own = root["properties"][part]
        inherited = {key: schema for key, schema in common.items() if part != "etcd" or key in ETCD}
        own["properties"] = {**inherited, **own["properties"]}
    required = ["name", "role", "model"]
    defs["pool"] = closed({**POOL, **root["properties"]["poolDefaults"]["properties"]}, required)
    # What Helm itself puts there for a chart that is part of another.
    root["properties"]["global"] = {"type": "object"}
    for schema in walk([root, defs]):
        if schema.get("required") == []:
            del schema["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Values of the Kvasir chart", "$defs": defs, **root}


def walk(node):
    if isinstance(node, dict):
        yield node
    for below in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(below)


def make_table(values, known):
    rows = ["| key | default | what |", "| --- | --- | --- |"]
    for path, entry in known.items():
        value = values
        for key in path:
            value = value[key]
        inner = any(other[: len(path)] == path and other != path for other in known) and not free(path)
        if any(free(path[:depth]) for depth in range(1, len(path))):
            continue
        if inner and not entry.words:
            continue
        default = "" if inner else f"`{json.dumps(value, ensure_ascii=False)}`"
        rows.append(f"| `{'.'.join(path)}` | {default} | {entry.words.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    parser.add_argument("--helm", type=pathlib.Path, required=True)
    options = parser.parse_args()

    text = (CHART / "values.yaml").read_text()
    values, known = yaml.safe_load(text), entries(text)
    configs = {}
    for name, binary in (("routerConfig", "router"), ("workerConfig", "decode-worker"), ("storeConfig", "kv-store")):
        printed = subprocess.run([options.bin / binary, "--print-config"], check=True, capture_output=True, text=True, env={})
        configs[name] = yaml.safe_load(printed.stdout)

    readme = (CHART / "README.md").read_text()
    begin, end = "<!-- values -->\n", "\n<!-- /values -->"
    before, rest = readme.split(begin)
    after = rest.split(end)[1]
    made = {
        CHART / "values.schema.json": json.dumps(make_schema(values, known, configs), indent=2, ensure_ascii=False) + "\n",
        CHART / "README.md": before + begin + make_table(values, known) + end + after,
    }
    # The schema first: what is rendered is checked by it.
    fine = put(made, options.check)
    rendered = {SNAPSHOTS / f"{name}.yaml": render(options.helm, name) for name in KEPT}
    return 0 if put(rendered, options.check) and fine else 1


def render(helm, name):
    command = [helm, "template", "kvasir", CHART, "--namespace", "llm", "--values", CHART / f"ci/{name}-values.yaml"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def put(made, check):
    """Writes what has changed; or says so, in so many lines that one sees what."""
    fine = True
    for path, content in made.items():
        there = path.read_text() if path.exists() else ""
        if there == content:
            continue
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            continue
        fine = False
        name = str(path.relative_to(ROOT))
        difference = difflib.unified_diff(there.splitlines(), content.splitlines(), name, "what it would become", lineterm="", n=1)
        print(f"{name} is stale; run: scripts/chart", *itertools.islice(difference, 20), sep="\n", file=sys.stderr)
    return fine


if __name__ == "__main__":
    sys.exit(main())
