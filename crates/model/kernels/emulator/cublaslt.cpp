// A pretend `libcublasLt`: the matrix products that Kvasir asks for (bf16, f16 or f32 in, f32 or the same out, sums in f32),
// column-major as there. For tests only.

#include <functional>
#include <memory>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

#include "emulate.h"

#define API extern "C" __attribute__((visibility("default")))

extern "C" int kvemu_add_work(void *stream, std::function<int()> work, u32 kernels);
extern "C" bool kvemu_on_device(const void *at, size_t bytes);

namespace {

enum Status : int { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type : int { F32 = 0, F16 = 2, BF16 = 14 };

struct Layout {
    int type = 0;
    u64 rows = 0, cols = 0;
    i64 ld = 0;
    int order = 0; // column-major
    int batch = 1;
    i64 stride = 0;

    size_t element() const { return type == F32 ? 4 : 2; }
    bool known() const { return (type == F32 || type == F16 || type == BF16) && order == 0 && rows > 0 && cols > 0 && ld >= (i64)rows && batch > 0; }
    // Bytes from the first element's to the end of the last one's.
    size_t bytes() const { return element() * ((size_t)(batch - 1) * (size_t)stride + (size_t)(cols - 1) * (size_t)ld + rows); }
};
struct Desc {
    int compute = 0, scale_type = 0, a_transposed = 0, b_transposed = 0, epilogue = 1, pointer_mode = 0;
};
struct Preference {
    u64 workspace = 0;
};
struct Algo {
    u64 data[8];
};
struct Heuristic {
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

float element(const void *at, int type, size_t i) {
    if (type == F32) return ((const float *)at)[i];
    u16 bits = ((const u16 *)at)[i];
    if (type == F16) return kvemu::f16_to_f32(bits);
    u32 wide = (u32)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

// Whether a product is one that can be done, and the shapes agree.
bool fits(const Desc &desc, const Layout &a, const Layout &b, const Layout &c, const Layout &d) {
    if (!a.known() || !b.known() || !c.known() || !d.known()) return false;
    if (desc.compute < 68 || desc.compute > 77 || (desc.compute > 69 && desc.compute < 74) || desc.scale_type != F32) return false;
    if (desc.epilogue != 1 || desc.pointer_mode != 0 || a.type != b.type || c.type != d.type) return false;
    u64 m = desc.a_transposed ? a.cols : a.rows, k = desc.a_transposed ? a.rows : a.cols;
    u64 k_of_b = desc.b_transposed ? b.cols : b.rows, n = desc.b_transposed ? b.rows : b.cols;
    return k == k_of_b && d.rows == m && d.cols == n && c.rows == m && c.cols == n && a.batch == d.batch && b.batch == d.batch && c.batch == d.batch;
}

// A matrix as rows along the sum, in f32.
std::vector<float> along_k(const void *at, const Layout &layout, bool k_is_rows, size_t from) {
    std::vector<float> out(layout.rows * layout.cols);
    size_t outer = k_is_rows ? layout.cols : layout.rows, inner = k_is_rows ? layout.rows : layout.cols;
    for (size_t o = 0; o < outer; o++)
        for (size_t i = 0; i < inner; i++) out[o * inner + i] = element(at, layout.type, from + (k_is_rows ? o * (size_t)layout.ld + i : i * (size_t)layout.ld + o));
    return out;
}

void multiply(const Desc &desc, float alpha, const void *a_at, const Layout &a, const void *b_at, const Layout &b, float beta, const void *c_at, const Layout &c,
              void *d_at, const Layout &d) {
    for (int batch = 0; batch < d.batch; batch++) {
        std::vector<float> left = along_k(a_at, a, desc.a_transposed != 0, (size_t)(batch * a.stride));
        std::vector<float> right = along_k(b_at, b, desc.b_transposed == 0, (size_t)(batch * b.stride));
        size_t m = d.rows, n = d.cols, k = left.size() / m;
        for (size_t j = 0; j < n; j++)
            for (size_t i = 0; i < m; i++) {
                float lanes[16] = {};
                const float *x = &left[i * k], *y = &right[j * k];
                size_t at = 0;
                for (; at + 16 <= k; at += 16)
                    for (int l = 0; l < 16; l++) lanes[l] += x[at + l] * y[at + l];
                for (; at < k; at++) lanes[0] += x[at] * y[at];
                float sum = 0;
                for (float lane : lanes) sum += lane;
                sum *= alpha;
                if (beta != 0) sum += beta * element(c_at, c.type, (size_t)(batch * c.stride) + j * (size_t)c.ld + i);
                size_t to = (size_t)(batch * d.stride) + j * (size_t)d.ld + i;
                if (d.type == F32) ((float *)d_at)[to] = sum;
                else ((u16 *)d_at)[to] = d.type == F16 ? kvemu::f32_to_f16(sum) : kvemu::f32_to_bf16(sum);
            }
    }
}

template <typename T> int set(T &field, const void *from, size_t bytes) {
    if (bytes != sizeof(T)) return INVALID_VALUE;
    memcpy(&field, from, bytes);
    return SUCCESS;
}

} // namespace

API int cublasLtCreate(void **handle) {
    *handle = malloc(1);
    return SUCCESS;
}
API int cublasLtDestroy(void *handle) {
    free(handle);
    return SUCCESS;
}
API size_t cublasLtGetVersion() { return 120800; }
API int cublasLtMatrixLayoutCreate(void **layout, int type, u64 rows, u64 cols, i64 ld) {
    auto *fresh = new Layout;
    fresh->type = type, fresh->rows = rows, fresh->cols = cols, fresh->ld = ld;
    *layout = fresh;
    return SUCCESS;
}
API int cublasLtMatrixLayoutSetAttribute(void *layout, int attribute, const void *from, size_t bytes) {
    auto *it = (Layout *)layout;
    switch (attribute) {
    case 0: return set(it->type, from, bytes);
    case 1: return set(it->order, from, bytes);
    case 2: return set(it->rows, from, bytes);
    case 3: return set(it->cols, from, bytes);
    case 4: return set(it->ld, from, bytes);
    case 5: return set(it->batch, from, bytes);
    case 6: return set(it->stride, from, bytes);
    default: return NOT_SUPPORTED;
    }
}
API int cublasLtMatrixLayoutDestroy(void *layout) {
    delete (Layout *)layout;
    return SUCCESS;
}
API int cublasLtMatmulDescCreate(void **desc, int compute, int scale_type) {
    auto *fresh = new Desc;
    fresh->compute = compute, fresh->scale_type = scale_type;
    *desc = fresh;
    return SUCCESS;
}
API int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *from, size_t bytes) {
    auto *it = (Desc *)desc;
    switch (attribute) {
    case 0: return set(it->compute, from, bytes);
    case 1: return set(it->scale_type, from, bytes);
    case 2: return set(it->pointer_mode, from, bytes);
    case 3: return set(it->a_transposed, from, bytes);
    case 4: return set(it->b_transposed, from, bytes);
    case 7: return set(it->epilogue, from, bytes);
    default: return NOT_SUPPORTED;
    }
}
API int cublasLtMatmulDescDestroy(void *desc) {
    delete (Desc *)desc;
    return SUCCESS;
}
API int cublasLtMatmulPreferenceCreate(void **preference) {
    *preference = new Preference;
    return SUCCESS;
}
API int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *from, size_t bytes) {
    // 1: most workspace; the others only narrow the choice.
    return attribute == 1 ? set(((Preference *)preference)->workspace, from, bytes) : SUCCESS;
}
API int cublasLtMatmulPreferenceDestroy(void *preference) {
    delete (Preference *)preference;
    return SUCCESS;
}
API int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted, Heuristic *out, int *found) {
    *found = 0;
    if (handle == nullptr || preference == nullptr || wanted < 1) return INVALID_VALUE;
    if (!fits(*(Desc *)desc, *(Layout *)a, *(Layout *)b, *(Layout *)c, *(Layout *)d)) return NOT_SUPPORTED;
    // Two ways that are the same, so that a choice between several is made.
    for (int i = 0; i < wanted && i < 2; i++) {
        out[i] = Heuristic{};
        out[i].algo.data[0] = (u64)i + 1;
        out[i].waves = 1;
        (*found)++;
    }
    return SUCCESS;
}
API int cublasLtMatmul(void *handle, void *desc_at, const void *alpha_at, const void *a, void *a_layout, const void *b, void *b_layout, const void *beta_at,
                       const void *c, void *c_layout, void *d, void *d_layout, const Algo *algo, void *workspace, size_t workspace_bytes, void *stream) {
    if (handle == nullptr) return NOT_INITIALIZED;
    // EMULATED_CUBLAS_FAIL: every product fails.
    if (const char *fail = getenv("EMULATED_CUBLAS_FAIL"); fail != nullptr && *fail != 0) return EXECUTION_FAILED;
    Desc desc = *(Desc *)desc_at;
    Layout la = *(Layout *)a_layout, lb = *(Layout *)b_layout, lc = *(Layout *)c_layout, ld = *(Layout *)d_layout;
    if (!fits(desc, la, lb, lc, ld)) return INVALID_VALUE;
    if (algo != nullptr && (algo->data[0] < 1 || algo->data[0] > 2)) return INVALID_VALUE;
    if (workspace_bytes > 0 && !kvemu_on_device(workspace, workspace_bytes)) return INVALID_VALUE;
    float alpha, beta;
    memcpy(&alpha, alpha_at, 4);
    memcpy(&beta, beta_at, 4);
    if (!kvemu_on_device(a, la.bytes()) || !kvemu_on_device(b, lb.bytes()) || !kvemu_on_device(d, ld.bytes()) || (beta != 0 && !kvemu_on_device(c, lc.bytes()))) {
        fprintf(stderr, "emulated device: a matrix of cublasLtMatmul is not within one allocation of device memory\n");
        return INVALID_VALUE;
    }
    int result = kvemu_add_work(stream, [=] { multiply(desc, alpha, a, la, b, lb, beta, c, lc, d, ld); return 0; }, 1);
    return result == 0 ? SUCCESS : EXECUTION_FAILED;
}
