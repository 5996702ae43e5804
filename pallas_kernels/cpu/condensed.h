// Products with a matrix [in, out] of which each output stores `fan_in` values at rows in any order, or
// at row `in` what fills it up.
//
// x is cut into tiles of batch rows and transposed, [in, tile]: one stored value then multiplies one
// row of a tile, contiguous in memory, and a tile stays in the second cache while all outputs pass.
#pragma once

#include "vectors.h"

namespace kernels {

struct Condensed {
  const float* values;  // [out, fan_in]
  const int32_t* rows;  // [out, fan_in], in [0, in]
  int64_t in, out, fan_in;

  // How many values output o has, with those that fill it up before others.
  int64_t count(int64_t o) const {
    const int32_t* r = rows + o * fan_in;
    int64_t n = fan_in;
    while (n > 0 && r[n - 1] == in) --n;
    return n;
  }
};

// Whether all rows are in [0, in].
inline bool rows_in_range(const Condensed& w) {
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < w.out * w.fan_in; ++i) {
    low = std::min(low, w.rows[i]);
    high = std::max(high, w.rows[i]);
  }
  return low >= 0 && high <= w.in;
}

// A batch of rows [batch, width], cut into transposed tiles [width + 1, kLanes n]: the last of those that are
// read is zero, for what fills up an output.
template <int n, class Pool>
class Tiles {
 public:
  static constexpr int kRows = kLanes * n;

  Tiles(Pool& pool, int64_t batch, int64_t width, int64_t copies = 1)
      : pool_(pool), batch_(batch), width_(width), count_((batch + kRows - 1) / kRows),
        data_(copies * count_ * kRows * (width + 1)) {}

  int64_t count() const { return count_; }
  float* tile(int64_t i) const { return data_.get() + i * kRows * (width_ + 1); }

  void read(const float* x) {
    over_pieces([&](int64_t t, int64_t from, int64_t columns) {
      int64_t rows = std::min<int64_t>(kRows, batch_ - t * kRows);
      transpose_matrix(x + t * kRows * width_ + from, width_, rows, columns,
                       tile(t) + from * kRows, kRows, kRows);
    });
    for (int64_t t = 0; t < count_; ++t) std::fill_n(tile(t) + width_ * kRows, kRows, 0.0f);
  }

  // Writes columns [from, from + columns) of tile t, given as [columns, kLanes n].
  void write(float* y, const float* piece, int64_t t, int64_t from, int64_t columns) const {
    int64_t rows = std::min<int64_t>(kRows, batch_ - t * kRows);
    float* to = y + t * kRows * width_ + from;
    int64_t r = 0;
    for (; columns == kLanes && r + kLanes <= rows; r += kLanes) {
      Vector square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(piece + i * kRows + r);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(to + (r + i) * width_, square[i]);
    }
    for (; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[r * width_ + c] = piece[c * kRows + r];
    }
  }

  // Calls f(tile, first column, columns) over all tiles, in pieces for the threads.
  template <class F>
  void over_pieces(const F& f) const {
    int64_t pieces = std::min<int64_t>(16, (width_ + 63) / 64);
    int64_t step = ((width_ + pieces - 1) / pieces + kLanes - 1) / kLanes * kLanes;
    parallel_for(pool_, count_ * pieces, [&](int64_t i) {
      int64_t from = i % pieces * step;
      if (from < width_) f(i / pieces, from, std::min(step, width_ - from));
    });
  }

 private:
  Pool& pool_;
  int64_t batch_, width_, count_;
  Scratch data_;
};

// How many parts the outputs are cut into, so that there is work for all threads.
template <class Pool>
int64_t parts_of(Pool& pool, int64_t out, int64_t tiles) {
  int64_t wanted = (4 * pool.num_threads() + tiles - 1) / tiles;
  return std::max<int64_t>(1, std::min<int64_t>(wanted, out / kLanes));
}

// y [batch, out] = x [batch, in] w.
template <int n, class Pool>
void matmul(Pool& pool, const Condensed& w, const float* x, int64_t batch, float* y) {
  constexpr int kRows = kLanes * n, kUnroll = std::max(1, 8 / n);
  Tiles<n, Pool> xs(pool, batch, w.in), ys(pool, batch, w.out, 0);
  xs.read(x);
  int64_t parts = parts_of(pool, w.out, xs.count());
  int64_t step = ((w.out + parts - 1) / parts + kLanes - 1) / kLanes * kLanes;
  parallel_for(pool, xs.count() * parts, [&](int64_t task) {
    int64_t t = task / parts, first = task % parts * step;
    const float* tile = xs.tile(t);
    alignas(64) float piece[kLanes * kRows];
    for (int64_t o = first; o < std::min(first + step, w.out); o += kLanes) {
      int64_t columns = std::min<int64_t>(kLanes, w.out - o);
      for (int64_t c = 0; c < columns; ++c) {
        const float* v = w.values + (o + c) * w.fan_in;
        const int32_t* r = w.rows + (o + c) * w.fan_in;
        int64_t count = w.count(o + c);
        Vector sum[kUnroll][n] = {};
        int64_t j = 0;
        for (; j + kUnroll <= count; j += kUnroll) {
          for (int u = 0; u < kUnroll; ++u) {
            const float* row = tile + int64_t{r[j + u]} * kRows;
            for (int k = 0; k < n; ++k) sum[u][k] += v[j + u] * load(row + k * kLanes);
          }
        }
        for (; j < count; ++j) {
          const float* row = tile + int64_t{r[j]} * kRows;
          for (int k = 0; k < n; ++k) sum[0][k] += v[j] * load(row + k * kLanes);
        }
        for (int k = 0; k < n; ++k) {
          Vector total = sum[0][k];
          for (int u = 1; u < kUnroll; ++u) total += sum[u][k];
          store(piece + c * kRows + k * kLanes, total);
        }
      }
      ys.write(y, piece, t, o, columns);
    }
  });
}

// dx [batch, in] = dy [batch, out] w^T. Where there are fewer tiles than threads, the outputs are cut
// into parts with a sum of their own each, which are added up in order.
template <int n, class Pool>
void matmul_transposed(Pool& pool, const Condensed& w, const float* dy, int64_t batch, float* dx) {
  constexpr int kRows = kLanes * n;
  Tiles<n, Pool> dys(pool, batch, w.out);
  dys.read(dy);
  int64_t tiles = dys.count();
  int64_t parts = (std::min<int64_t>(pool.num_threads(), 16) + tiles - 1) / tiles;
  Tiles<n, Pool> dxs(pool, batch, w.in, parts);
  int64_t step = (w.out + parts - 1) / parts;
  parallel_for(pool, tiles * parts, [&](int64_t task) {
    int64_t t = task % tiles, first = task / tiles * step;
    float* sums = dxs.tile(task);
    std::fill(sums, sums + (w.in + 1) * kRows, 0.0f);
    for (int64_t o = first; o < std::min(first + step, w.out); ++o) {
      const float* v = w.values + o * w.fan_in;
      const int32_t* r = w.rows + o * w.fan_in;
      Vector d[n];
      for (int k = 0; k < n; ++k) d[k] = load(dys.tile(t) + o * kRows + k * kLanes);
      for (int64_t j = 0, count = w.count(o); j < count; ++j) {
        float* row = sums + int64_t{r[j]} * kRows;
        for (int k = 0; k < n; ++k) {
          store(row + k * kLanes, load(row + k * kLanes) + v[j] * d[k]);
        }
      }
    }
  });
  dxs.over_pieces([&](int64_t t, int64_t from, int64_t columns) {
    alignas(64) float piece[kLanes * kRows];
    for (int64_t c = from; c < from + columns; c += kLanes) {
      int64_t width = std::min<int64_t>(kLanes, from + columns - c);
      const float* sums = dxs.tile(t) + c * kRows;
      std::copy(sums, sums + width * kRows, piece);
      for (int64_t p = 1; p < parts; ++p) {
        const float* more = dxs.tile(p * tiles + t) + c * kRows;
        for (int64_t i = 0; i < width * kRows; ++i) piece[i] += more[i];
      }
      dxs.write(dx, piece, t, c, width);
    }
  });
}

// dvalues [out, fan_in]: the stored elements of x^T dy.
template <int n, class Pool>
void value_gradient(Pool& pool, const Condensed& w, const float* x, const float* dy, int64_t batch,
                    float* dvalues) {
  constexpr int kRows = kLanes * n;
  Tiles<n, Pool> xs(pool, batch, w.in), dys(pool, batch, w.out);
  xs.read(x);
  dys.read(dy);
  int64_t parts = parts_of(pool, w.out, 1);
  int64_t step = (w.out + parts - 1) / parts;
  parallel_for(pool, parts, [&](int64_t part) {
    int64_t first = part * step, last = std::min(first + step, w.out);
    for (int64_t t = 0; t < xs.count(); ++t) {
      const float* tile = xs.tile(t);
      for (int64_t o = first; o < last; ++o) {
        const int32_t* r = w.rows + o * w.fan_in;
        float* to = dvalues + o * w.fan_in;
        Vector d[n];
        for (int k = 0; k < n; ++k) d[k] = load(dys.tile(t) + o * kRows + k * kLanes);
        auto product = [&](int64_t j) {
          const float* row = tile + int64_t{r[j]} * kRows;
          Vector sum = d[0] * load(row);
          for (int k = 1; k < n; ++k) sum += d[k] * load(row + k * kLanes);
          return sum;
        };
        int64_t j = 0, count = w.count(o);
        for (; j + kLanes <= count; j += kLanes) {
          Vector products[kLanes];
          for (int i = 0; i < kLanes; ++i) products[i] = product(j + i);
          Vector sum = sums(products);
          store(to + j, t == 0 ? sum : load(to + j) + sum);
        }
        for (; j < count; ++j) {
          Vector products = product(j);
          float sum = 0;
          for (int i = 0; i < kLanes; ++i) sum += products[i];
          to[j] = t == 0 ? sum : to[j] + sum;
        }
        std::fill(to + count, to + w.fan_in, 0.0f);
      }
    }
  });
}

// Calls f with the vectors of a tile, as a type: as many as the batch fills and the second cache takes.
template <class F>
void with_tile(int64_t batch, int64_t width, const F& f) {
  constexpr int line = 16 / kLanes;  // vectors of a cache line
  if (batch <= 16 || width > 8192) {
    f(int_<line>{});
  } else if (batch <= 32 || width > 2048) {
    f(int_<2 * line>{});
  } else {
    f(int_<4 * line>{});
  }
}

}  // namespace kernels
