// The pretend driver's streams, events and graphs; see driver.cpp.

#include "driver.h"

using namespace kvemu;

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events.

API int cuStreamCreate(void **stream, u32 flags) {
    READY(d);
    auto *fresh = new Stream;
    fresh->blocking = !(flags & 1);
    fresh->context = current_context;
    d->streams.push_back(fresh);
    *stream = fresh;
    return SUCCESS;
}
API int cuStreamCreateWithPriority(void **stream, u32 flags, int) { return cuStreamCreate(stream, flags); }
API int cuStreamDestroy_v2(void *handle) {
    Locked d;
    for (size_t i = 0; i < d->streams.size(); i++)
        if (d->streams[i] == handle) {
            Stream *stream = d->streams[i];
            d->run(stream, nullptr);
            d->streams.erase(d->streams.begin() + (ptrdiff_t)i);
            delete stream;
            return d->fault;
        }
    return INVALID_HANDLE;
}
API int cuStreamSynchronize(void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->invalid = true;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    if (stream == &d->null_stream)
        for (Stream *s : d->streams)
            if (s->blocking && s->context == current_context) d->run(s, nullptr);
    d->run(stream, nullptr);
    return d->fault;
}
// The first who asks is told to come again, so that such a path is walked too.
API int cuStreamQuery(void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture->invalid = true;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    if (stream->ops.empty()) return SUCCESS;
    d->run(stream, nullptr);
    return d->fault != 0 ? d->fault : NOT_READY;
}
API int cuStreamWaitEvent(void *handle, void *event, u32) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr || event == nullptr) return INVALID_HANDLE;
    std::shared_ptr<Mark> mark = ((Event *)event)->mark;
    if (!mark) return SUCCESS;
    if (mark->captured) {
        // The waiting stream joins the capture.
        std::shared_ptr<Graph> graph = mark->graph.lock();
        if (!graph || graph->ended || (stream->capture && stream->capture != graph)) return STREAM_CAPTURE_UNSUPPORTED;
        if (graph->invalid) return STREAM_CAPTURE_INVALIDATED;
        if (!stream->capture) {
            stream->capture = graph;
            stream->lane = graph->lanes.size();
            graph->lanes.emplace_back();
        }
        if (stream->lane == mark->lane) return SUCCESS;
        graph->lanes[stream->lane].ops.push_back({{}, mark->lane, mark->place});
        graph->lanes[mark->lane].joined = std::max(graph->lanes[mark->lane].joined, mark->place);
        return SUCCESS;
    }
    if (stream->capture) return mark->done ? SUCCESS : STREAM_CAPTURE_UNSUPPORTED;
    return d->add_work(stream, {[mark] {
        Driver &all = driver();
        if (!mark->done) {
            Stream *other = all.stream(mark->stream);
            if (other != nullptr) all.run(other, mark.get());
        }
        return 0;
    }});
}
API int cuEventCreate(void **event, u32 flags) {
    READY(d);
    auto *fresh = new Event;
    fresh->timing = !(flags & 2);
    *event = fresh;
    return SUCCESS;
}
API int cuEventDestroy_v2(void *event) {
    Locked d;
    delete (Event *)event;
    return SUCCESS;
}
API int cuEventRecord(void *event, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr || event == nullptr) return INVALID_HANDLE;
    auto mark = std::make_shared<Mark>();
    mark->stream = stream;
    auto *e = (Event *)event;
    e->mark = mark;
    e->asked = false;
    if (stream->capture) {
        mark->captured = true;
        mark->graph = stream->capture;
        mark->lane = stream->lane;
        mark->place = stream->capture->lanes[stream->lane].ops.size();
        return SUCCESS;
    }
    return d->add_work(stream, {[mark] {
        mark->done = true;
        mark->at = std::chrono::steady_clock::now();
        return 0;
    }});
}
API int cuEventSynchronize(void *event) {
    READY(d);
    if (event == nullptr) return INVALID_HANDLE;
    std::shared_ptr<Mark> mark = ((Event *)event)->mark;
    if (!mark || mark->done) return SUCCESS;
    if (mark->captured) return STREAM_CAPTURE_UNSUPPORTED;
    Stream *stream = d->stream(mark->stream);
    if (stream != nullptr) d->run(stream, mark.get());
    return d->fault;
}
API int cuEventQuery(void *event) {
    READY(d);
    if (event == nullptr) return INVALID_HANDLE;
    auto *e = (Event *)event;
    if (!e->mark || e->mark->done) return SUCCESS;
    if (e->mark->captured) return STREAM_CAPTURE_UNSUPPORTED;
    int result = cuEventSynchronize(event);
    return result != SUCCESS ? result : NOT_READY;
}
API int cuEventElapsedTime_v2(float *ms, void *start, void *end) {
    READY(d);
    auto *from = (Event *)start, *to = (Event *)end;
    if (from == nullptr || to == nullptr || !from->mark || !to->mark || !from->timing || !to->timing) return INVALID_HANDLE;
    if (!from->mark->done || !to->mark->done) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(to->mark->at - from->mark->at).count();
    return SUCCESS;
}
API int cuEventElapsedTime(float *ms, void *start, void *end) { return cuEventElapsedTime_v2(ms, start, end); }
API int cuLaunchHostFunc(void *handle, void (*call)(void *), void *data) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr || call == nullptr) return INVALID_HANDLE;
    return d->add_work(stream, {[=] { call(data); return 0; }});
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs: what was captured, lane by lane. Arguments were copied when they were captured; what they point at is read when a
// graph runs.

int Graph::replay() const {
    std::vector<size_t> done(lanes.size(), 0);
    std::function<int(size_t, size_t)> run = [&](size_t lane, size_t until) {
        while (done[lane] < until) {
            const Captured &next = lanes[lane].ops[done[lane]++];
            int result = next.op.run ? next.op.run() : run(next.lane, next.place);
            if (result != 0) return result;
        }
        return 0;
    };
    for (size_t lane = 0; lane < lanes.size(); lane++)
        if (int result = run(lane, lanes[lane].ops.size())) return result;
    return 0;
}

API int cuStreamBeginCapture_v2(void *handle, int mode) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    if (mode < 0 || mode > 2) return INVALID_VALUE;
    if (!d->graphs) return NOT_SUPPORTED;
    if (stream == &d->null_stream || stream->capture) return STREAM_CAPTURE_UNSUPPORTED;
    stream->capture = std::make_shared<Graph>();
    stream->capture->origin = stream;
    stream->capture->mode = mode;
    stream->capture->thread = std::this_thread::get_id();
    stream->lane = 0;
    return SUCCESS;
}
API int cuStreamIsCapturing(void *handle, int *status) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (stream == nullptr) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return SUCCESS;
}
API int cuThreadExchangeStreamCaptureMode(int *) { return SUCCESS; }
API int cuStreamEndCapture(void *handle, void **graph) {
    READY(d);
    Stream *stream = d->stream(handle);
    *graph = nullptr;
    if (stream == nullptr || !stream->capture || stream->capture->origin != stream) return INVALID_VALUE;
    std::shared_ptr<Graph> captured = stream->capture;
    if (captured->mode != 2 && captured->thread != std::this_thread::get_id()) return STREAM_CAPTURE_WRONG_THREAD;
    captured->ended = true;
    for (Stream *s : d->streams)
        if (s->capture == captured) s->capture.reset();
    if (captured->invalid) return STREAM_CAPTURE_INVALIDATED;
    for (size_t lane = 1; lane < captured->lanes.size(); lane++)
        if (captured->lanes[lane].joined < captured->lanes[lane].ops.size()) return STREAM_CAPTURE_UNJOINED;
    *graph = new Graph(*captured);
    return SUCCESS;
}
API int cuGraphGetNodes(void *graph, void **, size_t *count) {
    if (graph == nullptr || count == nullptr) return INVALID_VALUE;
    *count = 0;
    for (const Lane &lane : ((Graph *)graph)->lanes)
        for (const Captured &captured : lane.ops) *count += captured.op.run != nullptr;
    return SUCCESS;
}
API int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long) {
    READY(d);
    NOT_IN_CAPTURE(d);
    if (graph == nullptr) return INVALID_VALUE;
    *exec = new Graph(*(Graph *)graph);
    return SUCCESS;
}
API int cuGraphUpload(void *exec, void *) { return exec == nullptr ? INVALID_VALUE : SUCCESS; }
API int cuGraphLaunch(void *exec, void *handle) {
    READY(d);
    Stream *stream = d->stream(handle);
    if (exec == nullptr || stream == nullptr) return INVALID_HANDLE;
    if (stream->capture) return STREAM_CAPTURE_UNSUPPORTED;
    auto graph = std::make_shared<Graph>(*(Graph *)exec);
    u32 kernels = 0;
    for (const Lane &lane : graph->lanes)
        for (const Captured &captured : lane.ops) kernels += captured.op.kernels;
    return d->add_work(stream, {[graph] { return graph->replay(); }, kernels});
}
API int cuGraphExecDestroy(void *exec) {
    delete (Graph *)exec;
    return SUCCESS;
}
API int cuGraphDestroy(void *graph) {
    delete (Graph *)graph;
    return SUCCESS;
}
