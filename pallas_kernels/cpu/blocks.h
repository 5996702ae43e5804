// Products with a matrix [in, out] of which blocks [height, width] are stored.
//
// Operands are cut into slabs, [blocks, batch, side], so that a block meets contiguous memory. The sums
// of a few batch rows and of one to four vectors of columns stay in registers over all blocks of a block column.
#pragma once

#include <vector>

#include "vectors.h"

namespace kernels {

constexpr int kSums = kRegisters * 3 / 4;  // registers for sums; the others hold what they are made of

struct Blocks {
  const float* values;   // [count, height, width]
  const int32_t* rows;   // [count], block row; outside of the grid: not used
  const int32_t* columns;  // [count], block column, in any order
  const int32_t* order;  // [count], the blocks sorted by row, then column
  int64_t in, out, count, height, width;
  int64_t grid_rows() const { return (in + height - 1) / height; }
  int64_t grid_columns() const { return (out + width - 1) / width; }
  bool used(int64_t i) const {
    return rows[i] >= 0 && rows[i] < grid_rows() && columns[i] >= 0 && columns[i] < grid_columns();
  }
};

// Whether all places of `order` are in [0, count).
inline bool order_in_range(const Blocks& w) {
  return std::all_of(w.order, w.order + w.count, [&](int32_t i) { return i >= 0 && i < w.count; });
}

// [batch, width] as [slabs, batch, side] for each chunk of the batch; the last slab is filled up with
// zeros.
class Slabs {
 public:
  Slabs(const float* x, int64_t batch, int64_t width, int64_t side, int64_t chunk)
      : x_(x), batch_(batch), width_(width), side_(side), chunk_(chunk),
        count_((width + side - 1) / side), data_(count_ * side * batch) {}

  int64_t chunks() const { return (batch_ + chunk_ - 1) / chunk_; }
  int64_t slabs() const { return count_; }
  int64_t rows(int64_t chunk) const { return std::min(chunk_, batch_ - chunk * chunk_); }
  float* slab(int64_t chunk, int64_t s) const {
    return data_.get() + (chunk * chunk_ * count_ + s * rows(chunk)) * side_;
  }

  void read(int64_t chunk, int64_t s) const {
    const float* from = x_ + chunk * chunk_ * width_ + s * side_;
    float* to = slab(chunk, s);
    int64_t columns = std::min(side_, width_ - s * side_);
    for (int64_t b = 0; b < rows(chunk); ++b, from += width_, to += side_) {
      std::fill(std::copy(from, from + columns, to), to + side_, 0.0f);
    }
  }
  template <class Pool>
  void read_all(Pool& pool) const {
    parallel_for(pool, chunks() * slabs(), [&](int64_t i) { read(i / slabs(), i % slabs()); });
  }

 private:
  const float* x_;
  int64_t batch_, width_, side_, chunk_, count_;
  Scratch data_;
};

// A block as one product sees it: `weight` is [inner, panel] with a stride.
struct Step {
  int64_t slab;
  const float* weight;
};

// y[b, 0..kLanes n) = sum over steps of x[b, :] weight[:, 0..kLanes n), for `m` batch rows from `first`.
template <int m, int n>
void panel(const std::vector<Step>& steps, int64_t shift, const float* x, int64_t slab_size,
           int64_t first, int64_t inner, int64_t stride, float* y, int64_t y_stride,
           int64_t columns) {
  Vector sum[m][n] = {};
  for (const Step& step : steps) {
    const float* rows = x + step.slab * slab_size + first * inner;
    for (int64_t k = 0; k < inner; ++k) {
      Vector w[n];
      for (int j = 0; j < n; ++j) w[j] = load(step.weight + shift + k * stride + j * kLanes);
      for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) sum[i][j] += rows[i * inner + k] * w[j];
      }
    }
  }
  for (int i = 0; i < m; ++i) {
    float* to = y + (first + i) * y_stride;
    for (int j = 0; j < n; ++j) {
      if ((j + 1) * kLanes <= columns) {
        store(to + j * kLanes, sum[i][j]);
      } else {
        for (int64_t c = j * kLanes; c < columns; ++c) to[c] = sum[i][j][c - j * kLanes];
      }
    }
  }
}

// y [batch, out] = x w, or x [batch, out] w^T -> [batch, in]. Sides are multiples of 16.
//
// A chunk of x stays in the second cache while the block columns pass.
template <class Pool>
void matmul(Pool& pool, const Blocks& w, const float* x, int64_t batch, bool transposed, float* y) {
  int64_t inner = transposed ? w.width : w.height, side = transposed ? w.height : w.width;
  int64_t x_width = transposed ? w.out : w.in, y_width = transposed ? w.in : w.out;
  int64_t area = w.height * w.width, groups = (y_width + side - 1) / side;
  Scratch turned(transposed ? w.count * area : 0);  // the blocks transposed, in the order of use
  if (transposed) {
    parallel_for(pool, w.count, [&](int64_t i) {
      transpose_matrix(w.values + w.order[i] * area, w.width, w.height, w.width,
                       turned.get() + i * area, w.height, w.height);
    });
  }
  std::vector<std::vector<Step>> steps(groups);
  for (int64_t i = 0; i < w.count; ++i) {
    int64_t at = transposed ? w.order[i] : i;
    if (!w.used(at)) continue;
    const float* weight = (transposed ? turned.get() : w.values) + i * area;
    steps[transposed ? w.rows[at] : w.columns[at]].push_back(
        {transposed ? w.columns[at] : w.rows[at], weight});
  }
  Slabs xs(x, batch, x_width, inner, std::max<int64_t>(24, (1 << 17) / x_width / 24 * 24));
  int64_t parts = (4 * pool.num_threads() + xs.chunks() - 1) / xs.chunks();
  parts = std::min(parts, groups);
  if (parts > 1) xs.read_all(pool);
  parallel_for(pool, xs.chunks() * parts, [&](int64_t task) {
    int64_t chunk = task / parts, part = task % parts, rows = xs.rows(chunk);
    for (int64_t s = 0; parts == 1 && s < xs.slabs(); ++s) xs.read(chunk, s);
    const float* slabs = xs.slab(chunk, 0);
    for (int64_t g = groups * part / parts; g < groups * (part + 1) / parts; ++g) {
      int64_t columns = std::min(side, y_width - g * side);
      float* out = y + (task / parts * xs.rows(0)) * y_width + g * side;
      auto all_rows = [&](auto m, auto n, int64_t c) {
        int64_t b = 0, left = std::min<int64_t>(columns - c, n * kLanes);
        for (; b + m <= rows; b += m) {
          panel<m, n>(steps[g], c, slabs, rows * inner, b, inner, side, out + c, y_width, left);
        }
        for (; b < rows; ++b) {
          panel<1, n>(steps[g], c, slabs, rows * inner, b, inner, side, out + c, y_width, left);
        }
      };
      int64_t c = 0;
      auto panels = [&](auto n) {
        constexpr int columns_of_panel = n * kLanes;
        for (; c + columns_of_panel <= side && c < columns; c += columns_of_panel) {
          all_rows(int_<kSums / n>{}, n, c);
        }
      };
      if constexpr (kSums == 24) panels(int_<4>{});
      panels(int_<2>{});
      panels(int_<1>{});
    }
  });
}

// [m, kLanes n] of a block: sum over the batch of x[b, i] dy[b, j].
template <int m, int n>
void outer(const float* x, int64_t x_stride, const float* dy, int64_t dy_stride, int64_t batch,
           float* to, int64_t stride) {
  Vector sum[m][n] = {};
  for (int64_t b = 0; b < batch; ++b) {
    Vector d[n];
    for (int j = 0; j < n; ++j) d[j] = load(dy + b * dy_stride + j * kLanes);
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) sum[i][j] += x[b * x_stride + i] * d[j];
    }
  }
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) store(to + i * stride + j * kLanes, sum[i][j]);
  }
}

// dvalues [count, height, width]: the stored blocks of x^T dy; those not used are zero.
template <class Pool>
void value_gradient(Pool& pool, const Blocks& w, const float* x, const float* dy, int64_t batch,
                    float* dvalues) {
  Slabs xs(x, batch, w.in, w.height, batch), dys(dy, batch, w.out, w.width, batch);
  xs.read_all(pool);
  dys.read_all(pool);
  int64_t area = w.height * w.width;
  parallel_for(pool, w.count, [&](int64_t at) {
    float* to = dvalues + at * area;
    if (!w.used(at)) {
      std::fill(to, to + area, 0.0f);
      return;
    }
    const float *a = xs.slab(0, w.rows[at]), *d = dys.slab(0, w.columns[at]);
    auto all_rows = [&](auto m, auto n, int64_t c) {
      for (int64_t i = 0; i < w.height; i += m) {
        outer<m, n>(a + i, w.height, d + c, w.width, batch, to + i * w.width + c, w.width);
      }
    };
    int64_t c = 0;
    auto panels = [&](auto n) {  // of a number of rows that divides 16
      constexpr int columns = n * kLanes;
      for (; c + columns <= w.width; c += columns) all_rows(int_<kRegisters / 2 / n>{}, n, c);
    };
    if constexpr (kRegisters == 32) panels(int_<4>{});
    panels(int_<2>{});
    panels(int_<1>{});
  });
}

}  // namespace kernels
