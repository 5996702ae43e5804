// The kernels as XLA calls them: buffers checked, threads from XLA's own pool.
#include <string>

#include "blocks.h"
#include "condensed.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<Floats>;

// Runs one of the kernels in the best width of tiles, if all rows are rows of the matrix.
template <class F>
ffi::Error run(const kernels::Condensed& w, int64_t batch, const F& f) {
  if (!kernels::rows_in_range(w)) {
    return ffi::Error::InvalidArgument("rows must be in [0, " + std::to_string(w.in) + "]");
  }
  kernels::with_tile(batch, w.in, f);
  return ffi::Error::Success();
}

kernels::Condensed condensed_of(const float* values, const Integers& rows, int64_t in) {
  auto shape = rows.dimensions();
  return {values, rows.typed_data(), in, shape[0], shape[1]};
}

ffi::Error condensed_matmul(ffi::ThreadPool pool, Floats x, Floats values, Integers rows, Result y) {
  auto w = condensed_of(values.typed_data(), rows, x.dimensions()[1]);
  int64_t batch = x.dimensions()[0];
  return run(w, batch, [&](auto n) {
    kernels::matmul<n>(pool, w, x.typed_data(), batch, y->typed_data());
  });
}

ffi::Error condensed_matmul_transposed(ffi::ThreadPool pool, Floats dy, Floats values,
                                       Integers rows, Result dx) {
  auto w = condensed_of(values.typed_data(), rows, dx->dimensions()[1]);
  int64_t batch = dy.dimensions()[0];
  return run(w, batch, [&](auto n) {
    kernels::matmul_transposed<n>(pool, w, dy.typed_data(), batch, dx->typed_data());
  });
}

ffi::Error condensed_value_gradient(ffi::ThreadPool pool, Floats x, Floats dy, Integers rows,
                                    Result dvalues) {
  auto w = condensed_of(nullptr, rows, x.dimensions()[1]);
  int64_t batch = x.dimensions()[0];
  return run(w, batch, [&](auto n) {
    kernels::value_gradient<n>(pool, w, x.typed_data(), dy.typed_data(), batch,
                               dvalues->typed_data());
  });
}

kernels::Blocks blocks_of(const float* values, const Integers& places, int64_t in, int64_t out,
                          int64_t height, int64_t width) {
  int64_t count = places.dimensions()[1];
  const int32_t* p = places.typed_data();
  return {values, p, p + count, p + 2 * count, in, out, count, height, width};
}

ffi::Error blocks_matmul(ffi::ThreadPool pool, Floats x, Floats values, Integers places, Result y,
                         bool transposed) {
  auto block = values.dimensions();
  int64_t x_width = x.dimensions()[1], y_width = y->dimensions()[1];
  auto w = blocks_of(values.typed_data(), places, transposed ? y_width : x_width,
                     transposed ? x_width : y_width, block[1], block[2]);
  if (!kernels::order_in_range(w)) {
    return ffi::Error::InvalidArgument("the order of places must be in [0, " +
                                       std::to_string(w.count) + ")");
  }
  kernels::matmul(pool, w, x.typed_data(), x.dimensions()[0], transposed, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error blocks_value_gradient(ffi::ThreadPool pool, Floats x, Floats dy, Integers places,
                                 Result dvalues) {
  auto block = dvalues->dimensions();
  auto w = blocks_of(nullptr, places, x.dimensions()[1], dy.dimensions()[1], block[1], block[2]);
  kernels::value_gradient(pool, w, x.typed_data(), dy.typed_data(), x.dimensions()[0],
                          dvalues->typed_data());
  return ffi::Error::Success();
}

// Two arrays of numbers, one of places, and a result, on XLA's threads.
auto three_operands() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Integers>()
      .Ret<Floats>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CondensedMatmul, condensed_matmul, three_operands());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CondensedMatmulTransposed, condensed_matmul_transposed,
                              three_operands());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CondensedValueGradient, condensed_value_gradient, three_operands());
XLA_FFI_DEFINE_HANDLER_SYMBOL(BlocksMatmul, blocks_matmul,
                              three_operands().Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(BlocksValueGradient, blocks_value_gradient, three_operands());
