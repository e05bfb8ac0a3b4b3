// A pretend `libnccl`: communicators between threads of one process, and all-gathers. For tests only.
//
// A rank's gather is work on its stream, as it is on a device, and ends when all ranks' have come: other ranks' work goes on
// meanwhile, in the threads that wait for it. Ranks that gather different amounts, or that do not come, lose the device. After an
// abort nobody waits any more, and nothing is gathered: what is then in the buffers is whatever was.
//
//   EMULATED_NCCL_VERSION  what `ncclGetVersion` says (22703)
//   EMULATED_NCCL_WAIT     milliseconds that a rank is waited for (20000)

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

#include "emulate.h"

#define API extern "C" __attribute__((visibility("default")))

extern "C" int kvemu_add_work(void *stream, std::function<int()> work, u32 kernels);
extern "C" bool kvemu_on_device(const void *at, size_t bytes);
extern "C" bool kvemu_wait(std::function<bool()> ready, int milliseconds);
extern "C" void kvemu_moved();

namespace {

enum Status : int { SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };
constexpr int LAUNCH_FAILED = 719;

struct Id {
    char bytes[128];
};

// One gather, as its ranks come to it. Guarded by the driver's lock, under which work runs.
struct Round {
    struct Part {
        const unsigned char *from = nullptr;
        unsigned char *to = nullptr;
        size_t bytes = 0;
    };
    std::vector<Part> parts;
    size_t here = 0, gone = 0;
    bool differ = false, done = false;
};
struct Clique {
    size_t size = 0;
    std::vector<bool> joined;
    size_t here = 0;
    std::map<u64, Round> rounds;
    volatile bool aborted = false;
};
struct Comm {
    std::shared_ptr<Clique> clique;
    size_t rank;
    u64 gathers = 0; // that have run
};

std::mutex lock;
std::condition_variable joined;
std::map<u64, std::shared_ptr<Clique>> cliques;
u64 last_id = 0;

int milliseconds() {
    const char *text = getenv("EMULATED_NCCL_WAIT");
    return text == nullptr ? 20000 : atoi(text);
}

int gather(Comm &comm, const void *from, void *to, size_t bytes) {
    Clique &clique = *comm.clique;
    if (clique.aborted) return 0;
    u64 number = comm.gathers++;
    Round &round = clique.rounds[number];
    round.parts.resize(clique.size);
    round.parts[comm.rank] = {(const unsigned char *)from, (unsigned char *)to, bytes};
    if (++round.here == clique.size) {
        for (const auto &part : round.parts) round.differ |= part.bytes != bytes;
        if (!round.differ)
            for (const auto &part : round.parts)
                for (size_t rank = 0; rank < clique.size; rank++) memmove(part.to + rank * bytes, round.parts[rank].from, bytes);
        round.done = true;
        kvemu_moved();
    } else if (!kvemu_wait([&] { return round.done || clique.aborted; }, milliseconds())) {
        fprintf(stderr, "emulated nccl: rank %zu waits in gather %llu for ranks that do not come\n", comm.rank, (unsigned long long)number);
        return LAUNCH_FAILED;
    }
    if (!round.done) return 0;
    bool differ = round.differ;
    if (differ) fprintf(stderr, "emulated nccl: ranks gather different amounts (%zu bytes of rank %zu)\n", bytes, comm.rank);
    if (++round.gone == clique.size) clique.rounds.erase(number);
    return differ ? LAUNCH_FAILED : 0;
}

} // namespace

API int ncclGetVersion(int *version) {
    const char *text = getenv("EMULATED_NCCL_VERSION");
    *version = text == nullptr ? 22703 : atoi(text);
    return SUCCESS;
}
API const char *ncclGetErrorString(int status) {
    switch (status) {
    case SUCCESS: return "no error";
    case UNHANDLED_CUDA_ERROR: return "unhandled cuda error";
    case INVALID_ARGUMENT: return "invalid argument";
    case INVALID_USAGE: return "invalid usage";
    default: return "remote process exited or there was a network error";
    }
}
API const char *ncclGetLastError(void *) { return ""; }
API int ncclGetUniqueId(Id *id) {
    std::lock_guard<std::mutex> held(lock);
    memset(id, 0, sizeof *id);
    u64 number = ++last_id;
    memcpy(id->bytes, &number, sizeof number);
    return SUCCESS;
}
API int ncclCommInitRank(void **comm, int size, Id id, int rank) {
    u64 number;
    memcpy(&number, id.bytes, sizeof number);
    std::unique_lock<std::mutex> held(lock);
    if (number == 0 || number > last_id || size < 1 || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    auto &entry = cliques[number];
    if (!entry) {
        entry = std::make_shared<Clique>();
        entry->size = (size_t)size;
        entry->joined.resize((size_t)size);
    }
    std::shared_ptr<Clique> clique = entry;
    if (clique->size != (size_t)size || clique->joined[(size_t)rank]) return INVALID_USAGE;
    clique->joined[(size_t)rank] = true;
    clique->here++;
    joined.notify_all();
    if (!joined.wait_for(held, std::chrono::milliseconds(milliseconds()), [&] { return clique->here == clique->size; })) return REMOTE_ERROR;
    cliques.erase(number);
    *comm = new Comm{clique, (size_t)rank};
    return SUCCESS;
}
API int ncclCommDestroy(void *comm) {
    delete (Comm *)comm;
    return SUCCESS;
}
// What is under way ends; the communicator itself is left for it to look at.
API int ncclCommAbort(void *comm) {
    if (comm == nullptr) return INVALID_ARGUMENT;
    ((Comm *)comm)->clique->aborted = true;
    kvemu_moved();
    return SUCCESS;
}
API int ncclCommGetAsyncError(void *comm, int *status) {
    if (comm == nullptr) return INVALID_ARGUMENT;
    *status = ((Comm *)comm)->clique->aborted ? REMOTE_ERROR : SUCCESS;
    return SUCCESS;
}
API int ncclGroupStart() { return SUCCESS; }
API int ncclGroupEnd() { return SUCCESS; }
API int ncclAllGather(const void *from, void *to, size_t count, int type, void *handle, void *stream) {
    if (handle == nullptr || type < 0 || type > 1) return INVALID_ARGUMENT; // bytes, signed or not
    Comm &comm = *(Comm *)handle;
    if (!kvemu_on_device(from, count) || !kvemu_on_device(to, count * comm.clique->size)) return INVALID_ARGUMENT;
    int result = kvemu_add_work(stream, [&comm, from, to, count] { return gather(comm, from, to, count); }, 1);
    return result == 0 ? SUCCESS : UNHANDLED_CUDA_ERROR;
}
