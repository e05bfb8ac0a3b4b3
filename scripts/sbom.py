"""A list of all that the programs are made of, in CycloneDX 1.5: every crate in their trees, with licence, source and checksum.

The same tree gives the same bytes: no random number, and no time but SOURCE_DATE_EPOCH's, if that is set.
"""

import datetime
import hashlib
import json
import os
import pathlib
import subprocess
import tomllib
import uuid

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = {"kvasir-router", "kvasir-prefill-worker", "kvasir-decode-worker", "kvasir-kv-store", "kvasir-standalone", "kvasir-admin-cli", "kvasir-replay"}


def metadata():
    command = ["cargo", "metadata", "--format-version=1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def reachable(meta):
    """Packages in the programs' trees, and which they use: no tests' and no build scripts' dependencies."""
    nodes = {node["id"]: node for node in meta["resolve"]["nodes"]}
    names = {package["id"]: package["name"] for package in meta["packages"]}
    todo = [package for package in nodes if names[package] in PROGRAMS]
    uses = {}
    while todo:
        package = todo.pop()
        if package in uses:
            continue
        normal = [dep["pkg"] for dep in nodes[package]["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])]
        uses[package] = sorted(normal)
        todo += normal
    return uses


def main():
    meta = metadata()
    uses = reachable(meta)
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    checksums = {(entry["name"], entry["version"]): entry.get("checksum") for entry in lock["package"]}
    packages = {package["id"]: package for package in meta["packages"] if package["id"] in uses}

    def reference(package):
        return f"pkg:cargo/{packages[package]['name']}@{packages[package]['version']}"

    components = []
    for identity, package in packages.items():
        component = {
            "type": "application" if package["name"] in PROGRAMS else "library",
            "bom-ref": reference(identity),
            "name": package["name"],
            "version": package["version"],
            "purl": reference(identity),
        }
        if package["license"]:
            component["licenses"] = [{"expression": " ".join(package["license"].replace("/", " OR ").split())}]
        if checksum := checksums.get((package["name"], package["version"])):
            component["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        if package["repository"]:
            component["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
        components.append(component)
    components.sort(key=lambda component: component["bom-ref"])
    dependencies = [{"ref": reference(package), "dependsOn": sorted({reference(used) for used in used_by})} for package, used_by in uses.items()]
    dependencies.sort(key=lambda dependency: dependency["ref"])

    version = next(package["version"] for package in packages.values() if package["name"] == "kvasir-router")
    described = {"component": {"type": "application", "bom-ref": "kvasir", "name": "kvasir", "version": version}}
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        described["timestamp"] = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    content = {"metadata": described, "components": components, "dependencies": dependencies}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    serial = f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}"
    print(json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.5", "serialNumber": serial, "version": 1, **content}, indent=1))


if __name__ == "__main__":
    main()
