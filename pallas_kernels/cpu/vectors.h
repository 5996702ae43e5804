// Vectors, threads, and scratch memory: what the kernels are written in.
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
#include <utility>

namespace kernels {

// A vector is a register, and no more: compilers keep sums of longer ones in memory.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif
template <int n>
using int_ = std::integral_constant<int, n>;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
inline Vector all(float a) { return Vector{} + a; }

// Lanes of two vectors exchanged in groups of `w`, the step of a transposition: the groups at even places
// of both, or those at odd places.
template <size_t w, size_t... i>
Vector even_groups(Vector a, Vector b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (i & w ? kLanes + i - w : i)...);
}
template <size_t w, size_t... i>
Vector odd_groups(Vector a, Vector b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (i & w ? kLanes + i : i + w)...);
}
template <size_t w>
Vector even(Vector a, Vector b) { return even_groups<w>(a, b, std::make_index_sequence<kLanes>()); }
template <size_t w>
Vector odd(Vector a, Vector b) { return odd_groups<w>(a, b, std::make_index_sequence<kLanes>()); }

template <size_t w>
void exchange(Vector (&rows)[kLanes]) {
  for (size_t i = 0; i < kLanes; ++i) {
    if (i & w) continue;
    Vector a = rows[i], b = rows[i + w];
    rows[i] = even<w>(a, b);
    rows[i + w] = odd<w>(a, b);
  }
}

// The transpose of a matrix of `kLanes` vectors, in place.
inline void transpose(Vector (&rows)[kLanes]) {
  exchange<1>(rows), exchange<2>(rows);
  if constexpr (kLanes > 4) exchange<4>(rows);
  if constexpr (kLanes > 8) exchange<8>(rows);
}

// The first half of `rows`, each the sum of groups of `w` lanes of two neighbours.
template <size_t w>
void add_pairs(Vector (&rows)[kLanes]) {
  for (size_t i = 0; i < kLanes / 2 / w; ++i) {
    Vector a = rows[2 * i], b = rows[2 * i + 1];
    rows[i] = even<w>(a, b) + odd<w>(a, b);
  }
}

// The sums of `kLanes` vectors, as one vector; they are overwritten.
inline Vector sums(Vector (&rows)[kLanes]) {
  add_pairs<1>(rows), add_pairs<2>(rows);
  if constexpr (kLanes > 4) add_pairs<4>(rows);
  if constexpr (kLanes > 8) add_pairs<8>(rows);
  return rows[0];
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
