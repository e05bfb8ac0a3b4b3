"""One client of Mooncake Store in `scripts/bench kv-store`: told what to do by JSON lines on standard input, answers by JSON
lines.

Two of them, in two processes beside the master: one lends its memory, the other has none and puts and gets. What would slow
Mooncake down is kept out of what is timed: keys and addresses are made before, buffers are registered once, and the loops
call Mooncake's binding directly.
"""

import array
import ctypes
import json
import mmap
import os
import sys
import threading
import time

from mooncake.store import MooncakeDistributedStore


class Client:
    def __init__(self, host, master, lent, buffer):
        self.store = MooncakeDistributedStore()
        # Its own way of finding peers without a metadata server.
        status = self.store.setup(host, "P2PHANDSHAKE", lent, 16 << 20, "tcp", "", master)
        if status != 0:
            raise RuntimeError(f"setup: {status}")
        self.memory, self.address = None, 0
        if buffer:
            self.memory = mmap.mmap(-1, buffer)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            status = self.store.register_buffer(self.address, buffer)
            if status != 0:
                raise RuntimeError(f"register_buffer: {status}")

    def hello(self, _):
        return {}

    def fill(self, ask):
        """Bytes that differ from value to value and from seed to seed."""
        block, values = ask["block"], ask["values"]
        for value in range(values):
            start = value * block
            word = ask["seed"].to_bytes(8, "little") + value.to_bytes(8, "little")
            self.memory[start : start + block] = word * (block // 16)
        return {}

    def check(self, ask):
        """Whether every value has its bytes again, and what was there before does not."""
        block, values = ask["block"], ask["values"]
        right = True
        for value in range(values):
            start = value * block
            word = ask["seed"].to_bytes(8, "little") + value.to_bytes(8, "little")
            right = right and self.memory[start : start + block] == word * (block // 16)
        return {"right": right}

    def put(self, ask):
        store, size = self.store, ask["block"]
        if ask["batch"] == 1:
            return self.timed(ask, lambda key, at: store.put_from(key[0], at[0], size), 0)
        sizes = [size] * ask["batch"]
        return self.timed(ask, lambda keys, at: sum(store.batch_put_from(keys, at, sizes[: len(keys)])), 0)

    def get(self, ask):
        store, size = self.store, ask["block"]
        if ask["batch"] == 1:
            return self.timed(ask, lambda key, at: store.get_into(key[0], at[0], size), size)
        sizes = [size] * ask["batch"]
        return self.timed(ask, lambda keys, at: sum(store.batch_get_into(keys, at, sizes[: len(keys)])), size)

    def timed(self, ask, call, result):
        """Calls it for every batch of the values, in order; what it returns is `result` for each value."""
        block, values, batch = ask["block"], ask["values"], ask["batch"]
        calls = []
        for first in range(0, values, batch):
            chosen = range(first, min(values, first + batch))
            keys = [f"{ask['seed']}-{value}" for value in chosen]
            calls.append((keys, [self.address + value * block for value in chosen]))
        latencies, now = array.array("q"), time.perf_counter_ns
        cpu, started = time.process_time(), now()
        for keys, addresses in calls:
            begun = now()
            found = call(keys, addresses)
            latencies.append(now() - begun)
            if found != result * len(keys):
                raise RuntimeError(f"{ask['do']} of {len(keys)} values of {block} bytes: {found}")
        seconds = (now() - started) / 1e9
        return figures(latencies, seconds, time.process_time() - cpu, values * block)

    def lookup(self, ask):
        """`batch_is_exist` of prompts of so many keys, by so many callers for so long."""
        keys, values = ask["keys"], ask["values"]
        prompts = [[f"{ask['seed']}-{v}" for v in range(at, at + keys)] for at in range(0, values - keys + 1, keys)]
        store, now, latencies = self.store, time.perf_counter_ns, [array.array("q") for _ in range(ask["callers"])]
        wrong = []

        def caller(number):
            mine, until, at = latencies[number], now() + int(ask["seconds"] * 1e9), number
            while True:
                prompt = prompts[at % len(prompts)]
                begun = now()
                found = store.batch_is_exist(prompt)
                ended = now()
                mine.append(ended - begun)
                if sum(found) != keys:
                    wrong.append(found)
                    return
                if ended >= until:
                    return
                at += ask["callers"]

        cpu, started = time.process_time(), now()
        threads = [threading.Thread(target=caller, args=(number,)) for number in range(ask["callers"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = (now() - started) / 1e9
        if wrong:
            raise RuntimeError(f"not all of {keys} keys exist: {wrong[0]}")
        total = array.array("q")
        for mine in latencies:
            total.extend(mine)
        return figures(total, seconds, time.process_time() - cpu, 0)

    def clear(self, _):
        """Takes everything out; a key that was read lately stays for the length of its lease."""
        self.store.remove_all()
        return {}


def figures(latencies, seconds, cpu, size):
    ordered = sorted(latencies)
    at = lambda share: ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1e3
    return {
        "calls": len(ordered),
        "bytes": size,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "p50_us": at(0.5),
        "p99_us": at(0.99),
    }


def main():
    # Answers have standard output to themselves; what Mooncake says goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    host, master, lent, buffer = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    client = Client(host, master, lent, buffer)
    tasks = {name: getattr(client, name) for name in ("hello", "fill", "check", "put", "get", "lookup", "clear")}
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            answer = tasks[ask["do"]](ask)
        except Exception as error:  # told to the one who asked, who knows what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


main()
