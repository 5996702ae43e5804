// Vectors of 16 floats, threads, and scratch memory: what the kernels are written in.
//
// The compiler cuts a vector of 16 into as many registers as the machine needs (one of AVX-512, two of
// AVX2, four of NEON).
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>

namespace kernels {

constexpr int kLanes = 16;
template <int n>
using int_ = std::integral_constant<int, n>;
typedef float Vector __attribute__((vector_size(64)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline Vector all(float a) { return Vector{} + a; }

#define KERNELS_PAIRS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

// Rows a and b of two vectors, exchanged in groups of 1, 2, 4, 8 lanes: the steps of a transposition.
inline Vector low1(Vector a, Vector b) {
  return KERNELS_PAIRS(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
}
inline Vector high1(Vector a, Vector b) {
  return KERNELS_PAIRS(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
inline Vector low2(Vector a, Vector b) {
  return KERNELS_PAIRS(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
inline Vector high2(Vector a, Vector b) {
  return KERNELS_PAIRS(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
inline Vector low4(Vector a, Vector b) {
  return KERNELS_PAIRS(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
}
inline Vector high4(Vector a, Vector b) {
  return KERNELS_PAIRS(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
}
inline Vector low8(Vector a, Vector b) {
  return KERNELS_PAIRS(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
}
inline Vector high8(Vector a, Vector b) {
  return KERNELS_PAIRS(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

#undef KERNELS_PAIRS

#define KERNELS_STEP(width)                        \
  for (int i = 0; i < kLanes; ++i) {               \
    if (i & width) continue;                       \
    Vector a = rows[i], b = rows[i + width];       \
    rows[i] = low##width(a, b);                    \
    rows[i + width] = high##width(a, b);           \
  }

// The transpose of a 16 x 16 matrix, in place.
inline void transpose(Vector (&rows)[kLanes]) {
  KERNELS_STEP(1)
  KERNELS_STEP(2)
  KERNELS_STEP(4)
  KERNELS_STEP(8)
}

#undef KERNELS_STEP

// The sums of 16 vectors, as one vector.
inline Vector sums(Vector (&rows)[kLanes]) {
  Vector half[8], quarter[4], two[2];
  for (int i = 0; i < 8; ++i) {
    half[i] = low1(rows[2 * i], rows[2 * i + 1]) + high1(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    quarter[i] = low2(half[2 * i], half[2 * i + 1]) + high2(half[2 * i], half[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    two[i] = low4(quarter[2 * i], quarter[2 * i + 1]) + high4(quarter[2 * i], quarter[2 * i + 1]);
  }
  return low8(two[0], two[1]) + high8(two[0], two[1]);
}

// to[column, row] = from[row, column], for matrices of any size; rows past `rows` become zeros up to
// `padded_rows`, a multiple of 16.
inline void transpose_matrix(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                             float* to, int64_t to_stride, int64_t padded_rows) {
  for (int64_t r = 0; r < padded_rows; r += kLanes) {
    int64_t height = std::min<int64_t>(kLanes, rows - r);
    int64_t c = 0;
    for (; c + kLanes <= columns && height > 0; c += kLanes) {
      Vector tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        tile[i] = i < height ? load(from + (r + i) * from_stride + c) : Vector{};
      }
      transpose(tile);
      for (int64_t i = 0; i < kLanes; ++i) store(to + (c + i) * to_stride + r, tile[i]);
    }
    for (; c < columns; ++c) {
      for (int64_t i = 0; i < kLanes; ++i) {
        to[c * to_stride + r + i] = i < height ? from[(r + i) * from_stride + c] : 0.0f;
      }
    }
  }
}

// Floats, aligned to a cache line and not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<float*>(::operator new(std::max<int64_t>(size, 1) * sizeof(float),
                                                 std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

// Calls f(0), ..., f(n - 1) on the threads of a pool, in any order, and returns when all have returned.
//
// The calling thread works too and waits for calls that have begun only: a pool whose threads are all
// busy, or all waiting in here, cannot block it.
template <class Pool, class F>
void parallel_for(Pool& pool, int64_t n, const F& f) {
  struct State {
    std::atomic<int64_t> next{0}, finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), n) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  auto state = std::make_shared<State>();
  const F* call = &f;  // alive for as long as an index below n is to be had
  auto work = [state, call, n] {
    int64_t mine = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < n; ++mine) (*call)(i);
    if (mine > 0 && state->finished.fetch_add(mine) + mine == n) {
      std::lock_guard<std::mutex> lock(state->mutex);
      state->all_finished.notify_all();
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_finished.wait(lock, [&] { return state->finished.load() == n; });
}

}  // namespace kernels
