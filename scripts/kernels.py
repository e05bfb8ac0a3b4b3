"""Compiles the CUDA kernels by NVRTC; see scripts/kernels."""

import concurrent.futures
import ctypes
import glob
import gzip
import hashlib
import os
import re
import sys

KERNELS = "crates/model/kernels"
# Nothing fused that does not say so: the emulated device rounds the same way.
FLAGS = ["--std=c++20", "--fmad=false"]
TARGETS = {"sm_80.cubin": "sm_80", "sm_90.cubin": "sm_90", "compute_80.ptx": "compute_80"}


def library():
    for folder in sys.path:
        for path in glob.glob(os.path.join(folder, "nvidia/cuda_nvrtc/lib/libnvrtc.so.12")):
            return ctypes.CDLL(path)
    sys.exit("kernels: libnvrtc.so.12 is not in the virtual environment")


def read(name):
    with open(os.path.join(KERNELS, name), "rb") as file:
        return file.read()


def compile(units, files, arch, verbose):
    """The compiled image of a program that includes the units of these files, and the compiler's log."""
    nvrtc = library()
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def must(code, log=""):
        if code != 0:
            sys.exit(f"kernels: {nvrtc.nvrtcGetErrorString(code).decode()} ({arch})\n{log}")

    program = ctypes.c_void_p()
    source = "".join(f'#include "{name}"\n' for name in units).encode()
    names = (ctypes.c_char_p * len(files))(*[name.encode() for name in files])
    texts = (ctypes.c_char_p * len(files))(*files.values())
    must(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kvasir.cu", len(files), texts, names))
    flags = FLAGS + [f"--gpu-architecture={arch}"]
    if verbose:
        flags.append("--ptxas-options=-v")
    code = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags]))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    must(code, log.value.decode())
    kind = "PTX" if arch.startswith("compute") else "CUBIN"
    must(getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    image = ctypes.create_string_buffer(size.value)
    must(getattr(nvrtc, f"nvrtcGet{kind}")(program, image))
    return image.raw, log.value.decode()


def usage(log):
    """Registers, shared memory and spills of each kernel, from the log of ptxas."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        log,
        re.S,
    )
    lines = []
    for name, stack, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = f"  SPILLS {stores} + {loads} bytes" if stores != "0" or loads != "0" else ""
        stack = f"  stack {stack}" if stack != "0" else ""
        lines.append(f"{name:48} {registers:>3} registers  {shared.group(1) if shared else 0:>6} shared{stack}{spills}")
    return "\n".join(sorted(lines))


def main():
    version, arguments = sys.argv[1], sys.argv[2:]
    verbose = "--verbose" in arguments
    units = sorted(os.path.basename(path) for path in glob.glob(f"{KERNELS}/*.cu"))
    headers = sorted(os.path.basename(path) for kind in ("cuh", "h") for path in glob.glob(f"{KERNELS}/*.{kind}"))
    if "--try" in arguments:
        units = [os.path.basename(path) for path in arguments[arguments.index("--try") + 1 :]]
        image, log = compile(units, {name: read(name) for name in headers + units}, "sm_90", True)
        print(usage(log) or log)
        warnings = [line for line in log.splitlines() if "warning" in line or "error" in line]
        print("\n".join(warnings), f"{len(image)} bytes", sep="\n")
        return
    files = {name: read(name) for name in sorted(units + headers)}
    # NVRTC compiles a program at a time in a process, so a process each.
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        jobs = {name: pool.submit(compile, units, files, arch, verbose and name.endswith("cubin")) for name, arch in TARGETS.items()}
        images = {name: job.result() for name, job in jobs.items()}
    os.makedirs(f"{KERNELS}/built", exist_ok=True)
    for name, (image, log) in images.items():
        packed = gzip.compress(image, 9, mtime=0)
        with open(f"{KERNELS}/built/{name}.gz", "wb") as file:
            file.write(packed)
        print(f"{name}: {len(image)} bytes, packed {len(packed)}")
        if log.strip("\0\n "):
            print(usage(log) if verbose else log)
    with open(f"{KERNELS}/built/SOURCES", "w") as file:
        file.write(f"# NVRTC {version} {' '.join(FLAGS)}\n")
        files |= {f"built/{name}.gz": read(f"built/{name}.gz") for name in TARGETS}
        for name, text in files.items():
            file.write(f"{hashlib.sha256(text).hexdigest()}  {name}\n")


main()
