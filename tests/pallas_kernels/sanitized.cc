// The C++ kernels on a pool of plain threads, against loops, for the sanitizers: prints the largest error.
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "blocks.h"
#include "condensed.h"

struct Pool {
  std::vector<std::thread> threads;
  int64_t num_threads() const { return 3; }
  template <class F>
  void Schedule(F f) { threads.emplace_back(std::move(f)); }
  ~Pool() { for (auto& t : threads) t.join(); }
};

std::mt19937 generator(0);
std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> d;
  std::vector<float> a(n);
  for (float& x : a) x = d(generator);
  return a;
}

double worst = 0;
void compare(const std::vector<float>& a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    double error = std::abs(a[i] - b[i]);
    worst = error <= worst ? worst : error;  // NaN counts
  }
}

// y = x w, dx = dy w^T and x^T dy, by loops over the dense matrix.
struct Dense {
  std::vector<double> y, dx, full;
  Dense(const std::vector<float>& x, const std::vector<float>& dy, const std::vector<float>& w,
        int64_t batch, int64_t in, int64_t out)
      : y(batch * out), dx(batch * in), full(in * out) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < in; ++i)
        for (int64_t o = 0; o < out; ++o) {
          y[b * out + o] += double(x[b * in + i]) * w[i * out + o];
          dx[b * in + i] += double(dy[b * out + o]) * w[i * out + o];
          full[i * out + o] += double(x[b * in + i]) * dy[b * out + o];
        }
  }
};

void condensed(int64_t batch, int64_t in, int64_t out, int64_t fan_in) {
  auto x = normal(batch * in), dy = normal(batch * out), values = normal(out * fan_in);
  std::vector<int32_t> rows(out * fan_in);
  std::vector<float> w(in * out);
  for (int64_t o = 0; o < out; ++o)
    for (int64_t j = 0; j < fan_in; ++j) {
      rows[o * fan_in + j] = o % 3 + j * (in - 3) / fan_in;
      w[rows[o * fan_in + j] * out + o] = values[o * fan_in + j];
    }
  // Uneven outputs: the last ones are filled up, also before others, with values that do not count.
  for (int64_t o = out / 2; o < out && fan_in > 4; ++o)
    for (int64_t j = 1; j < fan_in; ++j) {
      if (j == 2 || (j == fan_in - 1 && o % 2)) continue;
      w[rows[o * fan_in + j] * out + o] = 0;
      rows[o * fan_in + j] = in;
    }
  Dense want(x, dy, w, batch, in, out);
  kernels::Condensed c{values.data(), rows.data(), in, out, fan_in};
  std::vector<float> y(batch * out), dx(batch * in), dvalues(out * fan_in);
  std::vector<double> picked(out * fan_in);
  for (int64_t i = 0; i < out * fan_in; ++i) {
    picked[i] = rows[i] == in ? 0.0 : want.full[rows[i] * out + i / fan_in];
  }
  auto run = [&](auto n) {
    Pool pool;
    kernels::matmul<n>(pool, c, x.data(), batch, y.data());
    kernels::matmul_transposed<n>(pool, c, dy.data(), batch, dx.data());
    kernels::value_gradient<n>(pool, c, x.data(), dy.data(), batch, dvalues.data());
    compare(y, want.y), compare(dx, want.dx), compare(dvalues, picked);
  };
  run(kernels::int_<1>{}), run(kernels::int_<2>{}), run(kernels::int_<4>{});
}

void blocks(int64_t batch, int64_t in, int64_t out, int64_t height, int64_t width) {
  auto x = normal(batch * in), dy = normal(batch * out);
  int64_t grid_rows = (in + height - 1) / height, grid_columns = (out + width - 1) / width;
  std::vector<int32_t> rows, columns, order;
  for (int64_t c = 0; c < grid_columns; ++c)
    for (int64_t r = 0; r < grid_rows; ++r)
      if ((r + 2 * c) % 3 != 0) rows.push_back(r), columns.push_back(c);
  for (int64_t r = 0; r < grid_rows; ++r)
    for (size_t i = 0; i < rows.size(); ++i)
      if (rows[i] == r) order.push_back(i);
  order.push_back(rows.size()), rows.push_back(grid_rows), columns.push_back(grid_columns);  // unused
  int64_t count = rows.size();
  auto values = normal(count * height * width);
  std::vector<float> w(in * out);
  auto each = [&](auto f) {
    for (int64_t n = 0; n < count - 1; ++n)
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) {
          int64_t r = rows[n] * height + i, c = columns[n] * width + j;
          f((n * height + i) * width + j, r < in && c < out ? r * out + c : -1);
        }
  };
  each([&](int64_t stored, int64_t at) { if (at >= 0) w[at] = values[stored]; });
  Dense want(x, dy, w, batch, in, out);
  kernels::Blocks b{values.data(), rows.data(), columns.data(), order.data(), in, out, count, height, width};
  std::vector<float> y(batch * out), dx(batch * in), dvalues(values.size(), NAN);
  std::vector<double> picked(values.size());
  each([&](int64_t stored, int64_t at) { picked[stored] = at >= 0 ? want.full[at] : 0.0; });
  Pool pool;
  kernels::matmul(pool, b, x.data(), batch, false, y.data());
  kernels::matmul(pool, b, dy.data(), batch, true, dx.data());
  kernels::value_gradient(pool, b, x.data(), dy.data(), batch, dvalues.data());
  compare(y, want.y), compare(dx, want.dx), compare(dvalues, picked);
}

int main() {
  for (int64_t batch : {1, 5, 16, 33, 70}) condensed(batch, 75, 90, 20), condensed(batch, 4, 7, 1);
  for (int64_t batch : {1, 7, 50})
    for (int64_t side : {16, 48, 64, 112}) blocks(batch, 200, 170, side, 16), blocks(batch, 90, 310, 32, side);
  std::printf("%g\n", worst);
}
