"""One NIXL agent of `scripts/bench transfer`: told what to do by JSON lines on standard input, answers by JSON lines.

Two of them, in two processes, exchange registered host memory over NIXL's UCX backend; which of UCX's ways are open is
set by UCX_TLS. What would slow NIXL down is kept out of what is timed: descriptor lists are prepared and transfer handles
made before, both are used again and again, and the loop calls NIXL's binding directly, once to post a transfer and then
to poll it (it has no way to wait). Blocks are walked as kvasir-transfer-bench walks them.
"""

import array
import base64
import json
import math
import os
import sys
import time

import numpy

import nixl_cu12._bindings as binding
from nixl_cu12._api import nixl_agent, nixl_agent_config

WORD = 8


class Agent:
    def __init__(self, name, size, progress):
        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=progress, backends=["UCX"]))
        # Touched, so that no page is the kernel's page of zeros; aligned as an allocator of blocks would do.
        self.raw = numpy.ones(size + 4096, dtype=numpy.uint8)
        start = -self.raw.ctypes.data % 4096
        self.memory = self.raw[start : start + size]
        self.address = self.memory.ctypes.data
        self.registered = self.agent.register_memory([(self.address, size, 0, "")], "DRAM")
        self.peer = self.peer_address = self.batch_bytes = None
        self.handles, self.lists = [], []

    def hello(self, _):
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": self.address}

    def connect(self, ask):
        self.peer = self.agent.add_remote_agent(base64.b64decode(ask["metadata"]))
        if isinstance(self.peer, bytes):
            self.peer = self.peer.decode()
        self.peer_address = ask["address"]
        self.agent.make_connection(self.peer)
        return {}

    def cpu(self, _):
        return {"seconds": time.process_time()}

    def fill(self, ask):
        self.memory.view(numpy.uint64)[:] = pattern(ask["seed"], len(self.memory))
        return {}

    def check(self, ask):
        """Whether this memory holds the pattern, as a read has gathered it here or a write has scattered it here."""
        right = pattern(ask["seed"], len(self.memory))
        found = self.memory.view(numpy.uint64)
        block = ask["block"] // WORD
        far = walk(len(right) // block)
        right, found = (words[: len(far) * block].reshape(-1, block) for words in (right, found))
        if ask["op"] == "read":
            right = right[far]
        else:
            found = found[far]
        return {"right": bool(numpy.array_equal(found, right))}

    def prepare(self, ask):
        """Makes a handle for every batch of the memory, and moves each once, or as many as can be in `seconds`."""
        self.release()
        block, batch = ask["block"], ask["batch"]
        blocks = len(self.memory) // (block * batch) * batch
        far = walk(blocks).astype(numpy.int32)
        near_list = self.descriptors("NIXL_INIT_AGENT", self.address, block, blocks)
        far_list = self.descriptors(self.peer, self.peer_address, block, blocks)
        self.lists = [near_list, far_list]
        self.batch_bytes = block * batch
        for first in range(0, blocks, batch):
            near_indices = numpy.arange(first, first + batch, dtype=numpy.int32)
            sides = (near_list, near_indices, far_list, far[first : first + batch])
            self.handles.append(self.agent.make_prepped_xfer(ask["op"].upper(), *sides))
        self.move(ask["seconds"], True)
        return {}

    def run(self, ask):
        """Moves what was prepared, round and round, for so long."""
        cpu = time.process_time()
        latencies, elapsed = self.move(ask["seconds"], False)
        cpu = time.process_time() - cpu
        latencies = numpy.sort(numpy.frombuffer(latencies, dtype=numpy.int64)) / 1e3
        at = lambda share: float(latencies[min(len(latencies) - 1, int(len(latencies) * share))])
        return {
            "bytes": len(latencies) * self.batch_bytes,
            "seconds": elapsed,
            "cpu_seconds": cpu,
            "latency_us": {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": float(latencies[-1])},
        }

    def release(self):
        for handle in self.handles:
            self.agent.release_xfer_handle(handle)
        for prepared in self.lists:
            self.agent.release_dlist_handle(prepared)
        self.handles, self.lists = [], []

    def descriptors(self, agent, address, block, blocks):
        table = numpy.zeros((blocks, 3), dtype=numpy.uint64)
        table[:, 0] = address + block * numpy.arange(blocks, dtype=numpy.uint64)
        table[:, 1] = block
        return self.agent.prep_xfer_dlist(agent, table, "DRAM")

    def move(self, seconds, once):
        """Moves batches round and round, or each of them once, but no longer than that."""
        handles = [handle._handle for handle in self.handles]
        post, state, now = self.agent.agent.postXferReq, self.agent.agent.getXferStatus, time.perf_counter_ns
        done, in_progress = binding.NIXL_SUCCESS, binding.NIXL_IN_PROG
        latencies = array.array("q")
        started = now()
        until = started + int(seconds * 1e9)
        while True:
            for handle in handles:
                begun = now()
                status = post(handle, b"")
                while status == in_progress:
                    status = state(handle)
                ended = now()
                if status != done:
                    raise RuntimeError(f"a transfer ended with {status}")
                latencies.append(ended - begun)
                if ended >= until:
                    return latencies, (ended - started) / 1e9
            if once:
                return latencies, (ended - started) / 1e9


def walk(blocks):
    """Where block i lies at the far side: the same scattered order as kvasir-transfer-bench's."""
    stride = max(1, int(blocks * 0.618))
    while math.gcd(stride, blocks) != 1:
        stride += 1
    return numpy.arange(blocks, dtype=numpy.int64) * stride % blocks


def pattern(seed, size):
    words = numpy.arange(size // WORD, dtype=numpy.uint64)
    words ^= numpy.uint64(seed)
    words *= numpy.uint64(0x9E3779B97F4A7C15)
    words ^= words >> numpy.uint64(29)
    return words


def main():
    # Answers have standard output to themselves; what NIXL and UCX say goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    agent = Agent(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "progress")
    tasks = {name: getattr(agent, name) for name in ("hello", "connect", "cpu", "fill", "check", "prepare", "run")}
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            answer = tasks[ask["do"]](ask)
        except Exception as error:  # told to the one who asked, who knows what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


main()
